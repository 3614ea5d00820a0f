"""Where a scheduler of diffusers places its steps, in terms of `sampling_grid`."""

import math
from collections.abc import Mapping
from typing import Any

from diffusion_jax.diffusion.schedules import ScheduleConfig
from diffusion_jax.models.checks import require

Values = Mapping[str, Any]

LEVEL_KEYS = {
  'use_karras_sigmas': 'karras', 'use_lu_lambdas': 'exponential',
  'use_exponential_sigmas': 'exponential',
}
"""Arguments that choose noise levels -> our spacing, in the order in which they are heeded."""


def _spacing(values: Values) -> tuple[str, dict[str, Any]]:
  """(spacing in time, its arguments)."""
  spacing, offset = values['timestep_spacing'], values['steps_offset']
  require(
    spacing in ('leading', 'trailing', 'linspace'),
    f'timestep_spacing={spacing!r} is not known; use leading, trailing or linspace.',
  )
  return spacing, {'steps_offset': offset} if spacing == 'leading' and offset else {}


def _table_grid(name: str, values: Values, schedule: ScheduleConfig) -> tuple[str, dict]:
  """DDIM and PNDM step by T // count timesteps, wherever the next of them is."""
  del schedule
  if name in ('LCMScheduler', 'TCDScheduler'):
    original = values['original_inference_steps']
    grid = {} if original == 50 else {'original_inference_steps': original}
    tcd = {'set_alpha_to_one': False, 'via': 'share'} if name == 'TCDScheduler' else {}
    return 'distilled', grid | tcd
  spacing, grid = _spacing(values)
  grid |= {} if values.get('set_alpha_to_one', True) else {'set_alpha_to_one': False}
  if name == 'DDIMScheduler' and spacing != 'leading':
    grid |= {'via': 'stride'}
  if name == 'PNDMScheduler':
    require(
      spacing != 'linspace', "timestep_spacing='linspace' of PNDMScheduler is not implemented, as "
      'its steps end beside where the next ones start; use leading or trailing.',
    )
    grid |= {'even': True} if spacing == 'trailing' else {}
    grid |= {} if values['skip_prk_steps'] else {'via': 'half_stride'}
  return spacing, grid


def _levels(values: Values) -> str | None:
  """The spacing of noise levels, if the config chooses one."""
  return next((ours for key, ours in LEVEL_KEYS.items() if values.get(key)), None)


def _bounds(values: Values) -> dict[str, Any]:
  given = {}
  for key, ours in (('sigma_min', 'low'), ('sigma_max', 'high')):
    if values.get(key) is not None:
      given[ours] = float(values[key])
      require(0 < given[ours] < math.inf, f'{key}={values[key]!r} is no noise level above 0.')
  return given


def _ends_clean(values: Values) -> bool:
  final = values.get('final_sigmas_type', 'zero')
  require(
    final in ('zero', 'sigma_min'),
    f'final_sigmas_type={final!r} is not known; use zero or sigma_min.',
  )
  return final == 'zero'


def _sigma_grid(name: str, values: Values, schedule: ScheduleConfig) -> tuple[str, dict]:
  """Levels run between those of the first and the last timestep."""
  del schedule
  spacing, grid = _spacing(values)
  grid |= {} if _ends_clean(values) else {'set_alpha_to_one': False}
  levels = _levels(values)
  if levels:
    without = ('LMSDiscreteScheduler', 'DPMSolverSDEScheduler')
    bounds = {} if levels == 'karras' and name in without else _bounds(values)
    return levels, grid | bounds | ({} if spacing == 'linspace' else {'within': spacing})
  return spacing, grid | ({'fractional': True} if spacing == 'linspace' else {})


def _solver_grid(name: str, values: Values, schedule: ScheduleConfig) -> tuple[str, dict]:
  """Levels run between the ends of the table, and may stay at the last of their own."""
  clean = _ends_clean(values) and name not in ('DEISMultistepScheduler', 'SASolverScheduler')
  end = {} if clean else {'set_alpha_to_one': False}
  levels = _levels(values)
  if levels:
    stays = not clean and name != 'DPMSolverMultistepScheduler'
    return levels, end | _bounds(values) | ({'stay_at_end': True} if stays else {})
  spacing, grid = _spacing(values)
  grid |= {} if spacing == 'trailing' else {'drop_last': True}
  alphas, sigmas = schedule.table()
  least = math.exp(min(values.get('lambda_min_clipped', -math.inf), 50.0))
  clipped = int((alphas < sigmas * least).sum())
  require(
    not clipped or spacing != 'trailing', f'lambda_min_clipped={values.get("lambda_min_clipped")} '
    'with trailing timestep_spacing is not implemented; use leading or linspace.',
  )
  return spacing, end | grid | ({'clipped': clipped} if clipped else {})


def place_steps(
  name: str, family: str, values: Values, schedule: ScheduleConfig
) -> tuple[str, dict[str, Any]]:
  """(spacing, arguments of sampling_grid) of what a class reads.

  Raises:
    UserError: for what is not known or has no counterpart.
  """
  return {'table': _table_grid, 'sigma': _sigma_grid, 'solver': _solver_grid}[family](
    name, values, schedule
  )


def told_timesteps(name: str, family: str, values: Values) -> str:
  """What the network is told of noise levels that are not those of timesteps: one of LABELS."""
  key = next((key for key in LEVEL_KEYS if values.get(key)), None)
  if family == 'solver' and key:
    fine = name == 'DPMSolverMultistepScheduler' and values['beta_schedule'] == 'squaredcos_cap_v2'
    return 'down' if key == 'use_exponential_sigmas' or fine else 'nearest'
  rounds = key == 'use_karras_sigmas' and name == 'KDPM2DiscreteScheduler'
  return 'nearest' if rounds else 'exact'
