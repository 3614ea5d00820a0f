"""The tables of speed in README.md, made of the figures under benchmarks/speed.

  python -m benchmarks.table
"""

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
README, FIGURES = ROOT / 'README.md', ROOT / 'benchmarks' / 'speed'
BEGIN = '<!-- Speed: written by python -m benchmarks.table -->'
END = '<!-- End of speed -->'


def read() -> dict[str, dict[str, Any]]:
  """File name -> figures, in order."""
  return {path.name: json.loads(path.read_text()) for path in sorted(FIGURES.glob('*.json'))}


def markdown(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
  """A table."""
  line = lambda cells: f'| {" | ".join(cells)} |'
  return '\n'.join([line(head), '|' + '---|' * len(head), *map(line, rows)])


def seconds(value: float) -> str:
  """Three digits."""
  return f'{value:.3g} s' if value >= 1 else f'{1e3 * value:.3g} ms'


def machine(found: dict[str, Any]) -> str:
  """The device, with its cores where it is a CPU."""
  device = found['device']
  name = device.get('kind') or device['device']
  count = device.get('devices', 1)
  if device.get('platform') == 'cpu':
    return f'CPU, {device["cpu_cores"]} cores'
  return f'{count} x {name}' if count > 1 else name


def peer_rows(found: dict[str, Any]) -> list[tuple[str, ...]]:
  """A row for each kind of work and each peer."""
  config, rows = found['config'], []
  words = {
    'step': f'training step, batch {config["batch"]}',
    'sample': f'{config["steps"]} steps of DDIM with guidance, {config["images"]} images',
  }
  size = f'U-Net, {found["parameters"] / 1e6:.2f} M'
  for what in ('step', 'sample'):
    for kind, one in found.get(what, {}).items():
      ratio = one['ratio']
      rows.append((
        f'{size}, {words[what]}, {config["dtype"]}', machine(found),
        seconds(one['ours_seconds']['median']), kind.replace('_', ' '),
        seconds(one['theirs_seconds']['median']),
        f'{ratio["median"]:.2f} ({ratio["quartiles"][0]:.2f} to {ratio["quartiles"][1]:.2f})',
      ))
  return rows


def run_row(found: dict[str, Any]) -> tuple[str, ...]:
  """A row for what the command `benchmark` has measured."""
  times = found.get('step_seconds') or found.get('batch_seconds')
  compiling = found.get('compile', {})
  start = f'{compiling["cold_seconds"]:.0f} s' if compiling else '-'
  if 'cached_seconds' in compiling:
    start += f', {compiling["cached_seconds"]:.1f} s'
  share = f'{found["mfu"]:.0%}' if 'mfu' in found else '-'
  one = f'{seconds(times["median"])} for {found["batch_size"]}' if times else '-'
  memory = found['memory']
  peak = memory.get('device_peak_bytes') or memory['host_peak_bytes']
  return (
    f'{found["what"]}, `{found["config_file"]}`', machine(found), one,
    f'{found["images_per_second"]:,.4g}', share, f'{peak / 1e9:.2f} GB', start,
  )


def scaling_rows(found: dict[str, Any]) -> list[tuple[str, ...]]:
  """A row for each mesh."""
  megabytes = lambda values: f'{sum(values.values()) / 1e6:.2f} MB'
  return [
    (f'`{found["config_file"]}`', str(one['devices']), one['mesh'],
     megabytes(one['moved_bytes']), ', '.join(one['moved_bytes']) or '-',
     megabytes(one['formula_bytes']), str(len(one['beside_parameters'])))
    for one in found['meshes']
  ]


def tables() -> str:
  """What stands between the two marks."""
  every = read().values()
  peers = [row for found in every if 'what' not in found for row in peer_rows(found)]
  runs = [run_row(found) for found in every if found.get('what', 'scaling') != 'scaling']
  scaling = [r for found in every if found.get('what') == 'scaling' for r in scaling_rows(found)]
  parts = []
  if peers:
    parts.append('Beside diffusers in PyTorch, in turn in one run, each in a process of its own '
                 '(`benchmarks/peers.py`); a ratio below 1 is faster than it:')
    parts.append(markdown(('work', 'device', 'ours', 'diffusers', 'theirs', 'ratio'), peers))
  if runs:
    parts.append('By `python -m diffusion_jax benchmark`:')
    parts.append(markdown(('what', 'device', 'median', 'images/s', 'MFU', 'peak memory',
                           'compiling, from the cache'), runs))
  if scaling:
    parts.append('What a device sends in a step (`--scaling`), of simulated devices. XLA for CPUs '
                 'writes a reduce-scatter as an all-reduce, which sends twice as much:')
    parts.append(markdown(('config', 'devices', 'mesh', 'sent', 'as', 'by formula',
                           'beside parameters'), scaling))
  return '\n\n'.join(parts)


def replaced(text: str) -> str:
  """README.md with the tables in force."""
  before, rest = text.split(BEGIN)
  return f'{before}{BEGIN}\n\n{tables()}\n\n{END}{rest.split(END)[1]}'


if __name__ == '__main__':
  README.write_text(replaced(README.read_text()))
