"""Time, speed and money of a compiled step, from the table of chips; nothing is measured."""

import dataclasses
from typing import Any

from diffusion_jax.planning.chips import Chip

HOUR, DAY = 3600.0, 86_400.0
COMPILER, BOUND = 'compiler', 'bound'
"""What a step's time is from: the compiler's cycles, or what no step can be faster than."""


@dataclasses.dataclass(frozen=True)
class Estimate:
  """Seconds of a step, and what follows.

  arithmetic, memory, network: what each alone would take at its peak (Williams et al. 2009, the
  roofline). computing: by the compiler's cycles, 0 where it counts none. kernels: of programs whose
  cycles it does not know, at the peak, by formula. waiting: of the network, while nothing is
  computed. basis: COMPILER or BOUND. mfu: of the model's FLOPs, nothing computed twice.
  """

  arithmetic: float
  memory: float
  network: float
  computing: float
  kernels: float
  waiting: float
  step: float
  basis: str
  bounded_by: str
  images_per_second: float
  mfu: float
  days: float
  chip_hours: float


def estimate(facts: dict[str, Any], chip: Chip) -> Estimate:
  """Estimate from `programs.compile_for` what a step takes on such chips.

  The network has the link's speed within a slice, and that between machines where GPUs are on
  several.
  """
  peak = chip.peak(facts['dtype'])
  flops = max(facts['model_flops'], facts['step']['flops'] or 0.0)
  several = chip.network and facts['target'].count('x')
  speed = chip.network if several else chip.link
  rows = facts['collectives'].values()
  sent, overlapping = (sum(row[key] for row in rows) for key in ('bytes', 'overlapping_bytes'))
  arithmetic, network = flops / peak, sent / speed
  # Arguments are read and results written; more where this is not to be a bound.
  moved = facts['accessed'] if chip.clock else 0
  memory = max(moved, facts['arguments'] + facts['outputs']) / chip.bandwidth
  computing = facts['cycles'] / chip.clock if chip.clock else 0.0
  kernels = sum(row['flops'] or 0.0 for row in facts['kernels'].values()) / peak
  waiting = (sent - overlapping) / speed + max(overlapping / speed - computing - kernels, 0.0)
  roofline = {'arithmetic': arithmetic, 'memory': memory, 'network': network}
  known = computing > 0
  kernels, waiting = (kernels, waiting) if known else (0.0, 0.0)
  step = computing + kernels + waiting if known else max(roofline.values())
  seconds = step * facts['steps']
  return Estimate(
    arithmetic, memory, network, computing, kernels, waiting, step, COMPILER if known else BOUND,
    max(roofline, key=roofline.get), facts['batch_size'] / step,
    facts['model_flops'] / peak / step, seconds / DAY, seconds / HOUR * facts['devices'],
  )
