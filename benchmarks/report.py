"""Figures for people: a table of two columns."""

from typing import Any

from diffusion_jax.parallel.collectives import KINDS

NOTE = """MB that a device sends in a step. XLA for CPUs writes a reduce-scatter as an all-reduce,
which sends twice as much; on GPUs and TPUs it does not."""


def rows(result: dict[str, Any]) -> list[tuple[str, str]]:
  """(what, how much) of what one of the measurements returns; what it does not have is left out."""
  found = []
  for key, name in (('step_seconds', 'step'), ('batch_seconds', 'batch')):
    if key in result:
      times = result[key]
      found.append((f'{name}, median', f'{_seconds(times["median"])} (quartiles '
                    f'{_seconds(times["lower_quartile"])} to {_seconds(times["upper_quartile"])})'))
  if 'network_calls' in result:
    found.append(('sampler', f'{result["sampler"]}, {result["sampler_steps"]} steps, guidance '
                  f'{result["guidance"]:g}: {result["network_calls"]} calls'))
    found.append(('an image', _seconds(result['seconds_per_image'])))
  if 'images_per_second' in result:
    found.append(('speed', f'{result["images_per_second"]:,.4g} images/s in batches of '
                  f'{result["batch_size"]}'))
  found += _operations(result)
  for name in ('images', 'captions'):
    if isinstance(result.get(name), dict):
      found.append((name, f'{result[name]["per_second"]:,.4g} a second'))
      found += [(f'{name}, {what}', text) for what, text in _operations(result[name])]
  if 'data_wait_fraction' in result:
    found.append(('waiting for data', f'{result["data_wait_fraction"]:.1%} of the time'))
  if 'recompilations' in result:
    found.append(('recompilations', str(result['recompilations'])))
  return found + _compile(result.get('compile')) + _memory(result.get('memory', {}))


def _operations(result: dict[str, Any]) -> list[tuple[str, str]]:
  if 'flops' not in result:
    return []
  at_least = 'at least ' * ('uncounted_operations' in result)
  found = [('model FLOPs', f'{at_least}{_count(result["flops"])}FLOP')]
  if result.get('flops_by_xla'):
    found.append(("by XLA's count", f'{_count(result["flops_by_xla"])}FLOP'))
  found.append(('MFU', f'{at_least}{result["mfu"]:.1%} of '
                f'{_count(result["peak_flops_per_second"])}FLOP/s ({result["peak_source"]})'))
  return found


def _compile(times: dict[str, Any] | None) -> list[tuple[str, str]]:
  if not times:
    return []
  text = f'{times["cold_seconds"]:.1f} s'
  if 'cached_seconds' in times:
    hit = 'from the cache' if times['from_cache'] else 'again, as the cache did not have it'
    text += f', {times["cached_seconds"]:.1f} s {hit}'
  return [('compiling', text)]


def _memory(memory: dict[str, int]) -> list[tuple[str, str]]:
  names = {
    'device_peak_bytes': 'peak of a device', 'host_peak_bytes': 'peak of the process',
    'state_bytes': 'state on a device', 'temporary_bytes': 'temporary on a device',
  }
  return [(name, f'{memory[key] / 1e6:,.1f} MB') for key, name in names.items() if key in memory]


def _seconds(value: float) -> str:
  return f'{value:.3g} s' if value >= 1 else f'{1e3 * value:.3g} ms'


def _count(value: float) -> str:
  for size, letter in ((1e15, 'P'), (1e12, 'T'), (1e9, 'G'), (1e6, 'M')):
    if value >= size:
      return f'{value / size:,.4g} {letter}'
  return f'{value:,.4g} '


def collective_rows(results: list[dict[str, Any]]) -> list[tuple[str, ...]]:
  """A line for each mesh: MB that a device moves in a step by kind, and by the formula."""
  megabytes = lambda value: f'{value / 1e6:,.3f}' if value else '-'
  head = ('devices', 'mesh', *KINDS, 'in all', 'by formula', 'beyond')
  lines = [head]
  for one in results:
    found, formula = one['moved_bytes'], one['formula_bytes']
    lines.append((
      str(one['devices']), one['mesh'], *(megabytes(found.get(kind, 0)) for kind in KINDS),
      megabytes(sum(found.values())), megabytes(sum(formula.values())),
      'nothing' if not one['beside_parameters'] else f'{len(one["beside_parameters"])} arrays',
    ))
  return lines


def table(result: dict[str, Any]) -> str:
  """Return what one of the measurements returned, in columns as wide as their widest entry."""
  lines = collective_rows(result['meshes']) if 'meshes' in result else rows(result)
  widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
  text = '\n'.join(
    '  '.join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
    for line in lines
  )
  return f'{text}\n{NOTE}' if 'meshes' in result else text
