"""The scheduler classes of diffusers that are read, every argument of each, and their grids.

An argument is read, or allowed one value alone, or has no effect on what is sampled, for the reason
given. `scheduler` turns what is read into our terms; where a class places its steps is told here,
in terms of `sampling_grid`.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from diffusion_jax.diffusion.noise import ScheduleConfig
from diffusion_jax.errors import require


@dataclasses.dataclass(frozen=True)
class SchedulerClass:
  """How one class is read.

  family: 'table', by timesteps and alpha-bar; 'sigma', after k-diffusion; 'solver', in log-SNR, the
  last timestep left out; 'flow'; 'edm'.
  reads: argument -> its default, of those that are read.
  only: argument -> the values it may have, its default first; others are refused.
  idle: argument -> why it has no effect.
  hidden: keys beside the arguments that the class heeds if a config has them.
  predictions: what networks may predict; the class has no formula for others.
  """

  family: str
  reads: Mapping[str, Any]
  only: Mapping[str, tuple] = dataclasses.field(default_factory=dict)
  idle: Mapping[str, str] = dataclasses.field(default_factory=dict)
  hidden: tuple[str, ...] = ()
  predictions: tuple[str, ...] = ('epsilon', 'sample', 'v_prediction')


_TABLE = {
  'num_train_timesteps': 1000, 'beta_start': 0.0001, 'beta_end': 0.02, 'beta_schedule': 'linear',
  'prediction_type': 'epsilon',
}
_NARROW = _TABLE | {'beta_start': 0.00085, 'beta_end': 0.012}
_RESCALED = {'rescale_betas_zero_snr': False}
_LEADING = {'timestep_spacing': 'leading', 'steps_offset': 0}
_LINSPACE = {'timestep_spacing': 'linspace', 'steps_offset': 0}
_LEVELS = {'use_karras_sigmas': False, 'use_exponential_sigmas': False}
_BOUNDS = {'sigma_min': None, 'sigma_max': None}
_THRESHOLD = {'thresholding': False, 'dynamic_thresholding_ratio': 0.995, 'sample_max_value': 1.0}
_CLIP = {'clip_sample': False, 'clip_sample_range': 1.0}
_CLIPS = _CLIP | {'clip_sample': True}
_SOLVER = _TABLE | _LINSPACE | _LEVELS | _THRESHOLD | {'lower_order_final': True}

_NO_TABLE = {'trained_betas': (None,)}
_NO_BETA = _NO_TABLE | {'use_beta_sigmas': (False,)}
_NO_FLOW = _NO_BETA | {'use_flow_sigmas': (False,)}
_NO_SHIFT = {'use_dynamic_shifting': (False,)}
_NO_VARIANCE = {'variance_type': (None,)}

_FLOW_IDLE = {'flow_shift': 'it shifts flow sigmas alone, which are refused'}
_SHIFT_IDLE = {'time_shift_type': 'it is of dynamic shifting alone, which is refused'}
_DISTILLED = 'its timesteps are those of the distillation'

_EPSILON_OR_V = ('epsilon', 'v_prediction')

_CONSISTENCY = _NARROW | _RESCALED | {
  'beta_schedule': 'scaled_linear', 'original_inference_steps': 50,
}

CLASSES: dict[str, SchedulerClass] = {
  'DDIMScheduler': SchedulerClass(
    'table', _TABLE | _RESCALED | _LEADING | _THRESHOLD | _CLIPS | {'set_alpha_to_one': True},
    _NO_TABLE,
  ),
  'DDPMScheduler': SchedulerClass(
    'table', _TABLE | _RESCALED | _LEADING | _THRESHOLD | _CLIPS | {'variance_type': 'fixed_small'},
    _NO_TABLE,
  ),
  'PNDMScheduler': SchedulerClass(
    'table', _TABLE | _LEADING | {'skip_prk_steps': False, 'set_alpha_to_one': False}, _NO_TABLE,
    predictions=_EPSILON_OR_V,
  ),
  'LCMScheduler': SchedulerClass(
    'table', _CONSISTENCY | _THRESHOLD | _CLIP | {'timestep_scaling': 10.0}, _NO_TABLE, {
      'timestep_spacing': _DISTILLED, 'steps_offset': _DISTILLED,
      'set_alpha_to_one': 'its last step returns the estimate of x_0',
    },
  ),
  'TCDScheduler': SchedulerClass(
    'table', _CONSISTENCY, _NO_TABLE, {
      'timestep_spacing': _DISTILLED, 'steps_offset': _DISTILLED,
      'set_alpha_to_one': 'its last step ends at the first timestep',
      'timestep_scaling': 'its step has no boundary condition',
    } | dict.fromkeys(_THRESHOLD | _CLIP, 'its step clips nothing'),
  ),
  'EulerDiscreteScheduler': SchedulerClass(
    'sigma', _TABLE | _RESCALED | _LINSPACE | _LEVELS | _BOUNDS | {'final_sigmas_type': 'zero'},
    _NO_BETA | {'interpolation_type': ('linear',), 'timestep_type': ('discrete',)},
  ),
  'EulerAncestralDiscreteScheduler': SchedulerClass(
    'sigma', _TABLE | _RESCALED | _LINSPACE, _NO_TABLE, predictions=_EPSILON_OR_V
  ),
  'LMSDiscreteScheduler': SchedulerClass(
    'sigma', _TABLE | _LINSPACE | _LEVELS, _NO_BETA, hidden=tuple(_BOUNDS)
  ),
  'HeunDiscreteScheduler': SchedulerClass(
    'sigma', _NARROW | _LINSPACE | _LEVELS | _CLIP, _NO_BETA, hidden=tuple(_BOUNDS)
  ),
  'KDPM2DiscreteScheduler': SchedulerClass(
    'sigma', _NARROW | _LINSPACE | _LEVELS, _NO_BETA, hidden=tuple(_BOUNDS),
    predictions=_EPSILON_OR_V,
  ),
  # With Karras levels it tells the network a rounded timestep, and another at the same level.
  'KDPM2AncestralDiscreteScheduler': SchedulerClass(
    'sigma', _NARROW | _LINSPACE | {'use_exponential_sigmas': False},
    _NO_BETA | {'use_karras_sigmas': (False,)}, hidden=tuple(_BOUNDS), predictions=_EPSILON_OR_V,
  ),
  'DPMSolverSDEScheduler': SchedulerClass(
    'sigma', _NARROW | _LINSPACE | _LEVELS, _NO_BETA,
    {'noise_sampler_seed': 'noise is drawn from the keys that the sampler is given'},
    hidden=tuple(_BOUNDS), predictions=_EPSILON_OR_V,
  ),
  'DPMSolverMultistepScheduler': SchedulerClass(
    'solver', _SOLVER | _RESCALED | {
      'solver_order': 2, 'algorithm_type': 'dpmsolver++', 'solver_type': 'midpoint',
      'euler_at_final': False, 'use_lu_lambdas': False, 'final_sigmas_type': 'zero',
      'lambda_min_clipped': -math.inf,
    },
    _NO_FLOW | _NO_SHIFT | _NO_VARIANCE, _FLOW_IDLE | _SHIFT_IDLE, tuple(_BOUNDS),
  ),
  'UniPCMultistepScheduler': SchedulerClass(
    'solver', _SOLVER | _RESCALED | _BOUNDS | {
      'solver_order': 2, 'solver_type': 'bh2', 'final_sigmas_type': 'zero',
    },
    _NO_FLOW | _NO_SHIFT | {
      'predict_x0': (True,), 'disable_corrector': ([],), 'solver_p': (None,),
      'shift_terminal': (None,),
    },
    _FLOW_IDLE | _SHIFT_IDLE,
  ),
  'DEISMultistepScheduler': SchedulerClass(
    'solver', _SOLVER | {'solver_order': 2, 'solver_type': 'logrho', 'algorithm_type': 'deis'},
    _NO_FLOW | _NO_SHIFT, _FLOW_IDLE | _SHIFT_IDLE, tuple(_BOUNDS),
  ),
  'SASolverScheduler': SchedulerClass(
    'solver', _SOLVER | {
      'predictor_order': 2, 'corrector_order': 2, 'lambda_min_clipped': -math.inf
    },
    _NO_FLOW | _NO_VARIANCE | {'algorithm_type': ('data_prediction',), 'tau_func': (None,)},
    _FLOW_IDLE, tuple(_BOUNDS),
  ),
  'FlowMatchEulerDiscreteScheduler': SchedulerClass(
    'flow', {'num_train_timesteps': 1000, 'shift': 1.0}, _NO_SHIFT | {
      'invert_sigmas': (False,), 'shift_terminal': (None,), 'use_karras_sigmas': (False,),
      'use_exponential_sigmas': (False,), 'use_beta_sigmas': (False,),
      'stochastic_sampling': (False,),
    },
    _SHIFT_IDLE | dict.fromkeys(
      ('base_shift', 'max_shift', 'base_image_seq_len', 'max_image_seq_len'),
      _SHIFT_IDLE['time_shift_type'],
    ),
  ),
  'FlowMatchHeunDiscreteScheduler': SchedulerClass(
    'flow', {'num_train_timesteps': 1000, 'shift': 1.0}
  ),
  'EDMEulerScheduler': SchedulerClass(
    'edm', {
      'sigma_min': 0.002, 'sigma_max': 80.0, 'sigma_data': 0.5, 'sigma_schedule': 'karras',
      'rho': 7.0,
    },
    {'prediction_type': ('epsilon',), 'final_sigmas_type': ('zero',)},
    {'num_train_timesteps': 'its levels are placed between sigma_min and sigma_max'},
    predictions=('edm',),
  ),
}
"""Classes that have a counterpart here; all others are refused by name."""


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
  """Return one of LABELS: how the network is told noise levels that are not those of timesteps."""
  key = next((key for key in LEVEL_KEYS if values.get(key)), None)
  if family == 'solver' and key:
    fine = name == 'DPMSolverMultistepScheduler' and values['beta_schedule'] == 'squaredcos_cap_v2'
    return 'down' if key == 'use_exponential_sigmas' or fine else 'nearest'
  rounds = key == 'use_karras_sigmas' and name == 'KDPM2DiscreteScheduler'
  return 'nearest' if rounds else 'exact'
