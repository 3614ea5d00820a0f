"""A plan for people."""

from collections.abc import Iterator, Sequence

from diffusion_jax.planning.estimate import COMPILER
from diffusion_jax.planning.plan import Plan
from diffusion_jax.viz.plan import Row

GIGA, TERA = 1e9, 1e12
NOTE = """Nothing here was measured. Memory and programs are those of the real compilers; times on
TPUs are the compiler's estimate, with kernels at the chip's peak and the network at its links' full
speed added by formula; times on GPUs are a bound: no step can be faster."""


def plan_lines(plan: Plan, price: float | None = None) -> list[str]:
  """Return one plan: a line on the program, then lines on what it needs."""
  if plan.error:
    return [f'{plan.target}: {plan.error}']
  f, step = plan.facts, plan.facts['step']
  mesh = ' x '.join(f'{axis} {size}' for axis, size in f['mesh'].items())
  when = 'kept from before' if plan.kept else f'compiled in {step["seconds"]:.0f} s'
  several = f'; {f["programs"]} sizes, this is the largest' if f['programs'] > 1 else ''
  accumulated = f' in {f["accumulation_steps"]} parts' if f['accumulation_steps'] > 1 else ''
  return [
    f'{plan.target}: {f["devices"]} x {f["device"]}{f" ({mesh})" if mesh else ""}, batch '
    f'{f["batch_size"]}{accumulated}, {f["dtype"]}, remat {f["remat"]}, {when}{several}',
    *(f'  {line}' for line in _needs(plan)), *(f'  {line}' for line in _times(plan, price)),
  ]


def _needs(plan: Plan) -> Iterator[str]:
  f, step, chip = plan.facts, plan.facts['step'], plan.target.chip
  size = lambda count: f'{count / GIGA:,.3g} GB'
  free = ''
  if chip:
    free = f'; {size(chip.memory - plan.bytes)} of {size(chip.memory)} are free'
  more = plan.bytes - step['bytes']
  rest = f' + padding, results and code {size(more)}' if more else ''
  yield (
    f'memory of a device: {size(plan.bytes)} = state {size(step["state"])}, of which '
    f'optimizer {size(step["optimizer"])}, + batch {size(step["batch"])} + temporary '
    f'{size(step["temporary"])}{rest}{free}'
  )
  by_program = f', {step["flops"] / TERA:,.3g} as XLA counts the program' if step['flops'] else ''
  least = 'at least ' * bool(f['uncounted'])
  yield f'work of a step: {least}{f["model_flops"] / TERA:,.3g} TFLOP by formula{by_program}'
  for kind, row in f['collectives'].items():
    share = row['overlapping_bytes'] / row['bytes'] if row['bytes'] else 0
    yield f'{kind}: {row["count"]} x, {row["bytes"] / 1e6:,.1f} MB sent, {share:.0%} meanwhile'
  for one in f['attention']:
    masked = ', masked' * one['masked']
    yield (
      f'attention {one["way"]}: {one["count"]} x, {one["n"]} queries, {one["keys"]} keys, '
      f'{one["heads"]} heads of {one["d"]}{masked}'
    )
  for name, row in f['kernels'].items():
    work = '' if row['flops'] is None else f', {row["flops"] / TERA:,.3g} TFLOP by formula'
    yield f'kernel {name}: {row["calls"]} x{work}'


def _times(plan: Plan, price: float | None) -> Iterator[str]:
  e, f = plan.estimate, plan.facts
  if e is None:
    yield 'time: not estimated for CPUs'
    return
  yield (
    f'roofline: arithmetic {seconds(e.arithmetic)}, memory {seconds(e.memory)}, network '
    f'{seconds(e.network)}: bounded by {e.bounded_by}'
  )
  if e.basis == COMPILER:
    parts = (
      f' = {seconds(e.computing)} by {f["cycles"] / 1e6:,.1f} M cycles of the compiler + kernels '
      f'{seconds(e.kernels)} + waiting for the network {seconds(e.waiting)}'
    )
    yield f'step: about {seconds(e.step)}{parts}'
    total = f['cycles']
    top = sorted(f['cycles_by_source'].items(), key=lambda item: -item[1])[:4]
    yield 'most cycles: ' + ', '.join(f'{name} {count / total:.0%}' for name, count in top)
  else:
    yield f'step: at least {seconds(e.step)}, by the roofline'
  about, most = ('about', 'about') if e.basis == COMPILER else ('at most', 'at least')
  yield (
    f'speed: {about} {e.images_per_second:,.4g} images/s, '
    f'{e.images_per_second / f["devices"]:,.4g} on a device, MFU {e.mfu:.1%}'
  )
  money = '' if price is None else f', {e.chip_hours * price:,.2f} at {price:g} for one'
  yield (
    f'{f["steps"]:,} steps: {most} {e.days:,.3g} days, {e.chip_hours:,.4g} hours of a chip{money}'
  )


def table(plans: Sequence[Plan], prices: Sequence[float | None]) -> list[str]:
  """Return a line for each target, side by side."""
  head = ('target', 'memory', 'free', 'step', 'images/s', 'MFU', 'bounded by', 'days', 'cost')
  rows = [head]
  for plan, price in zip(plans, prices, strict=True):
    e, chip = plan.estimate, plan.target.chip
    if plan.error:
      rows.append((str(plan.target), plan.error))
      continue
    row = [str(plan.target), f'{plan.bytes / GIGA:.3g} GB']
    if e and chip:
      bound = '' if e.basis == COMPILER else '>'
      row += [
        f'{(chip.memory - plan.bytes) / GIGA:.3g} GB', bound + seconds(e.step),
        f'{e.images_per_second:,.4g}', f'{e.mfu:.1%}', e.bounded_by, f'{e.days:.3g}',
        '' if price is None else f'{e.chip_hours * price:,.2f}',
      ]
    rows.append(tuple(row))
  widths = [max((len(row[i]) for row in rows if len(row) > max(i, 2) or i == 0), default=0)
            for i in range(len(head))]
  return ['  '.join(cell.ljust(w) for cell, w in zip(row, widths, strict=False)).rstrip()
          for row in rows]


def page_row(plan: Plan, price: float | None = None) -> Row:
  """Return one plan for `viz.plan`."""
  e, chip, step = plan.estimate, plan.target.chip, plan.facts.get('step', {})
  memory = {name: step[name] / GIGA for name in ('state', 'batch', 'temporary') if step}
  if step and plan.bytes > step['bytes']:
    memory['padding, results and code'] = (plan.bytes - step['bytes']) / GIGA
  times = {}
  if e and e.basis == COMPILER:
    times = {
      'computing': e.computing, 'kernels, by formula': e.kernels, 'waiting': e.waiting,
    }
  elif e:
    times = {f'bound by {e.bounded_by}': e.step}
  return Row(
    str(plan.target), memory, chip.memory / GIGA if chip else 0.0,
    {name: 1e3 * value for name, value in times.items()}, plan_lines(plan, price),
  )


def seconds(value: float) -> str:
  """Return a time with its unit."""
  for unit, size in (('s', 1.0), ('ms', 1e-3)):
    if value >= size:
      return f'{value / size:.3g} {unit}'
  return f'{value * 1e6:.3g} µs'
