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
KINDS = {name: name for name in ('peers', 'features', 'scaling', 'time_to_loss')}
"""By what a file says it is of; all others are of `benchmarks.run`."""
PEERS = (
  'Beside diffusers in PyTorch, in turn in one run, each in a process of its own '
  '(`benchmarks/peers.py`); a ratio below 1 is faster than it:'
)
FEATURES = (
  "The FID Inception's features of 256 x 256 images beside torch-fidelity's, in turn in one run "
  '(`benchmarks/features.py`):'
)
RUNS = 'By `python -m benchmarks.run`:'
SCALING = (
  'What a device sends in a step (`scaling`), of simulated devices. XLA for CPUs writes a '
  'reduce-scatter as an all-reduce, which sends twice as much:'
)


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
  if device.get('platform') == 'cpu':
    return f'CPU, {device["cpu_cores"]} cores'
  name, count = device.get('kind') or device['device'], device.get('devices', 1)
  return f'{count} x {name}' if count > 1 else name


def compiling(found: dict[str, Any]) -> str:
  """Seconds at a first start and, where they were taken, at a second."""
  cold = f'{found["cold_seconds"]:.0f} s' if found else '-'
  return f'{cold}, {found["cached_seconds"]:.1f} s' if 'cached_seconds' in found else cold


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
        compiling(found['compiling'][what]),
      ))
  return rows


def run_row(found: dict[str, Any]) -> tuple[str, ...]:
  """A row for what the command `benchmark` has measured."""
  times = found.get('step_seconds') or found.get('batch_seconds')
  share = f'{found["mfu"]:.0%}' if 'mfu' in found else '-'
  one = f'{seconds(times["median"])} for {found["batch_size"]}' if times else '-'
  memory = found['memory']
  peak = memory.get('device_peak_bytes') or memory['host_peak_bytes']
  return (
    f'{found["what"]}, `{found["config_file"]}`', machine(found), one,
    f'{found["images_per_second"]:,.4g}', share, f'{peak / 1e9:.2f} GB',
    compiling(found.get('compile', {})),
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


def loss_rows(found: dict[str, Any]) -> list[tuple[str, ...]]:
  """A row for each run."""
  return [
    (f'`{found["config_file"]}`, {name}', machine(found),
     *(seconds(at['seconds']) if at else 'never' for at in one['losses'].values()),
     seconds(one['seconds_by_phase']['compile']))
    for name, one in found['runs'].items()
  ]


def feature_rows(found: dict[str, Any]) -> list[tuple[str, ...]]:
  """A row for each side."""
  ratio = found['time_over_ours']
  return [
    (name.replace('_', ' '), machine(found), f'{one["images_per_second"]:.3g}',
     f'{ratio[name]:.2f}' if name in ratio else '-')
    for name, one in found['figures'].items()
  ]


def loss_table(found: dict[str, Any]) -> str:
  """When runs reached losses."""
  losses = next(iter(found['runs'].values()))['losses']
  head = ('run', 'device', *(f'loss {loss}' for loss in losses), 'of these compiling')
  text = (
    f'Time from the start of a run until the mean of {found["lines"]} lines of its loss was as low '
    '(`benchmarks/time_to_loss.py`), quiet, on one machine and one day:'
  )
  return f'{text}\n\n{markdown(head, loss_rows(found))}'


def tables() -> str:
  """Return the text between the two marks."""
  of_kind: dict[str, list] = {}
  for found in read().values():
    of_kind.setdefault(KINDS.get(found.get('what', 'peers'), 'runs'), []).append(found)
  rows = lambda kind, make: [row for found in of_kind.get(kind, []) for row in make(found)]
  parts = []
  for kind, make, head, text in (
    ('peers', peer_rows,
     ('work', 'device', 'ours', 'diffusers', 'theirs', 'ratio', 'compiling, from the cache'),
     PEERS),
    ('features', feature_rows, ('FID features', 'device', 'images/s', 'its time over ours'),
     FEATURES),
    ('runs', lambda found: [run_row(found)],
     ('what', 'device', 'median', 'images/s', 'MFU', 'peak memory', 'compiling, from the cache'),
     RUNS),
    ('scaling', scaling_rows,
     ('config', 'devices', 'mesh', 'sent', 'as', 'by formula', 'beside parameters'), SCALING),
  ):
    if kind in of_kind:
      parts += [text, markdown(head, rows(kind, make))]
  return '\n\n'.join([*parts, *map(loss_table, of_kind.get('time_to_loss', []))])


def replaced(text: str) -> str:
  """README.md with the tables in force."""
  before, rest = text.split(BEGIN)
  return f'{before}{BEGIN}\n\n{tables()}\n\n{END}{rest.split(END)[1]}'


if __name__ == '__main__':
  README.write_text(replaced(README.read_text()))
