"""The scheduler classes of diffusers that are read, and every argument of each.

An argument is read, allowed one value alone, or without effect on samples, for the reason given.
The table of samplers and steps is read by `scheduler` in both directions.
"""

import dataclasses
import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from diffusion_jax.diffusion.noise import BETAS, MOST_TIMESTEPS
from diffusion_jax.errors import require


@dataclasses.dataclass(frozen=True)
class SchedulerClass:
  """One class: what of it is read.

  family: 'table', by timesteps and alpha-bar; 'sigma', after k-diffusion; 'solver', in log-SNR, the
  last timestep left out; 'flow'; 'edm'. reads: argument -> default. only: argument -> allowed
  values, the default first. idle: argument -> why it has no effect. hidden: keys that are no
  arguments, but used. predictions: those the class has formulas for. names: argument -> values
  known by other names.
  """

  family: str
  reads: Mapping[str, Any]
  only: Mapping[str, tuple] = dataclasses.field(default_factory=dict)
  idle: Mapping[str, str] = dataclasses.field(default_factory=dict)
  hidden: tuple[str, ...] = ()
  predictions: tuple[str, ...] = ('epsilon', 'sample', 'v_prediction')
  names: Mapping[str, Mapping[str, str]] = dataclasses.field(default_factory=dict)


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
SIZE_SHIFT = {
  'base_shift': 0.5, 'max_shift': 1.15, 'base_image_seq_len': 256, 'max_image_seq_len': 4096,
  'time_shift_type': 'exponential',
}
"""Arguments of dynamic shifting, by the size of the image, with their defaults."""
_DISTILLED = 'its timesteps are those of the distillation'

_DPM_TYPES = {
  'midpoint': 'midpoint', 'heun': 'heun', **dict.fromkeys(('logrho', 'bh1', 'bh2'), 'midpoint')
}
_DEIS_TYPES = dict.fromkeys(('logrho', 'midpoint', 'heun', 'bh1', 'bh2'), 'logrho')
_BH2 = {'bh1': 'bh1', **dict.fromkeys(('bh2', 'midpoint', 'heun', 'logrho'), 'bh2')}

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
    {'noise_sampler_seed': 'noise is made from the keys that the sampler is given'},
    hidden=tuple(_BOUNDS), predictions=_EPSILON_OR_V,
  ),
  'DPMSolverMultistepScheduler': SchedulerClass(
    'solver', _SOLVER | _RESCALED | {
      'solver_order': 2, 'algorithm_type': 'dpmsolver++', 'solver_type': 'midpoint',
      'euler_at_final': False, 'use_lu_lambdas': False, 'final_sigmas_type': 'zero',
      'lambda_min_clipped': -math.inf,
    },
    _NO_FLOW | _NO_SHIFT | _NO_VARIANCE, _FLOW_IDLE | _SHIFT_IDLE, tuple(_BOUNDS),
    names={'solver_type': _DPM_TYPES, 'algorithm_type': {
      'dpmsolver++': 'dpmsolver++', 'sde-dpmsolver++': 'sde-dpmsolver++',
      'dpmsolver': 'dpmsolver', 'deis': 'dpmsolver++',
    }},
  ),
  'UniPCMultistepScheduler': SchedulerClass(
    'solver', _SOLVER | _RESCALED | _BOUNDS | {
      'solver_order': 2, 'solver_type': 'bh2', 'final_sigmas_type': 'zero',
    },
    _NO_FLOW | _NO_SHIFT | {
      'predict_x0': (True,), 'disable_corrector': ([],), 'solver_p': (None,),
      'shift_terminal': (None,),
    },
    _FLOW_IDLE | _SHIFT_IDLE, names={'solver_type': _BH2},
  ),
  'DEISMultistepScheduler': SchedulerClass(
    'solver', _SOLVER | {'solver_order': 2, 'solver_type': 'logrho', 'algorithm_type': 'deis'},
    _NO_FLOW | _NO_SHIFT, _FLOW_IDLE | _SHIFT_IDLE, tuple(_BOUNDS),
    names={'solver_type': _DEIS_TYPES, 'algorithm_type': dict.fromkeys(
      ('deis', 'dpmsolver', 'dpmsolver++'), 'deis'
    )},
  ),
  'SASolverScheduler': SchedulerClass(
    'solver', _SOLVER | {
      'predictor_order': 2, 'corrector_order': 2, 'lambda_min_clipped': -math.inf
    },
    _NO_FLOW | _NO_VARIANCE | {'algorithm_type': ('data_prediction',), 'tau_func': (None,)},
    _FLOW_IDLE, tuple(_BOUNDS),
  ),
  'FlowMatchEulerDiscreteScheduler': SchedulerClass(
    'flow', SIZE_SHIFT | {
      'num_train_timesteps': 1000, 'shift': 1.0, 'use_dynamic_shifting': False,
      'shift_terminal': None,
    },
    dict.fromkeys((
      'invert_sigmas', 'use_karras_sigmas', 'use_exponential_sigmas', 'use_beta_sigmas',
      'stochastic_sampling',
    ), (False,)),
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

LARGEST = 1e6
"""Of any number that a config holds, but infinity."""
_KNOWN = {
  'beta_schedule': BETAS, 'timestep_spacing': ('leading', 'trailing', 'linspace'),
  'final_sigmas_type': ('zero', 'sigma_min'), 'sigma_schedule': ('karras', 'exponential'),
  'time_shift_type': ('exponential', 'linear'),
}
"""Arguments that are one of a few names."""


def read_arguments(name: str, values: Mapping[str, Any]) -> dict[str, Any]:
  """The arguments that a class of CLASSES reads, of their defaults' types; or UserError."""
  spec = CLASSES[name]
  for key, allowed in spec.only.items():
    value = values.get(key)
    require(
      value is None or value in allowed, f'{key}={value!r} of {name} is not implemented; only '
      f'{" and ".join(map(repr, allowed))} is.',
    )
  found = {}
  known = _KNOWN | {'prediction_type': spec.predictions} | spec.names
  for key, default in {**dict.fromkeys(spec.hidden), **spec.reads}.items():
    value = values.get(key)
    value = default if value is None else value
    require(
      value is default or _is_like(value, default), f'{key}={value!r} of {name} is not what it '
      f'should be, like {1.0 if default is None else default!r}.',
    )
    require(
      key not in known or value in known[key],
      f'{key}={value!r} of {name} is not known; use one of {", ".join(known.get(key, ()))}.',
    )
    # A whole number of many digits is one that no array takes.
    value = type(default)(value) if type(default) in (int, float) else value
    found[key] = spec.names[key][value] if key in spec.names else value
  total = found.get('num_train_timesteps', 1000)
  require(
    2 <= total <= MOST_TIMESTEPS, f'num_train_timesteps={total} is outside 2 to {MOST_TIMESTEPS}.'
  )
  return found


def _is_like(value: Any, default: Any) -> bool:
  """Return whether a value is of the type of a default; a default of None is of a number."""
  if isinstance(default, bool | str) or isinstance(value, bool):
    return type(value) is type(default)
  number = isinstance(value, int | float) and (abs(value) <= LARGEST or abs(value) == math.inf)
  return number and (not isinstance(default, int) or value % 1 == 0)


FEW_STEPS = 15
"""On grids of fewer steps, diffusers lowers the order of the last ones."""


DDIM, DDPM, PNDM = 'DDIMScheduler', 'DDPMScheduler', 'PNDMScheduler'
LCM, TCD = 'LCMScheduler', 'TCDScheduler'
DPM, UNIPC = 'DPMSolverMultistepScheduler', 'UniPCMultistepScheduler'
DEIS, SA = 'DEISMultistepScheduler', 'SASolverScheduler'
EDM = 'EDMEulerScheduler'


class Steps(NamedTuple):
  """A class of diffusers with values of its arguments, and the sampler with options for it."""

  kind: str
  there: Mapping[str, Any]
  sampler: str
  options: Mapping[str, Any] = MappingProxyType({})


def _dpm(algorithm: str, order: int, sampler: str, heun: bool = False, **options) -> Steps:
  there = {'algorithm_type': algorithm, 'solver_order': order}
  return Steps(DPM, there | ({'solver_type': 'heun'} if heun else {}), sampler, options)


_V = {'prediction_type': 'v_prediction'}
STEPS = (
  Steps(DDIM, {}, 'ddim'),
  Steps(DDPM, {'variance_type': 'fixed_small'}, 'ddpm'),
  Steps(DDPM, {'variance_type': 'fixed_small_log'}, 'ddpm'),
  Steps(DDPM, {'variance_type': 'fixed_large'}, 'ddpm_large'),
  Steps(DDPM, {'variance_type': 'learned_range'}, 'ddpm', {'variance': 'learned'}),
  # diffusers averages what the network predicts.
  Steps(PNDM, {'skip_prk_steps': True} | _V, 'plms', {'average': 'v_prediction'}),
  Steps(PNDM, {'skip_prk_steps': False} | _V, 'pndm', {'average': 'v_prediction'}),
  Steps(PNDM, {'skip_prk_steps': True}, 'plms'), Steps(PNDM, {'skip_prk_steps': False}, 'pndm'),
  Steps(LCM, {}, 'lcm'), Steps(TCD, {}, 'tcd'),
  Steps('EulerDiscreteScheduler', {}, 'euler'),
  Steps('EulerAncestralDiscreteScheduler', {}, 'euler_ancestral'),
  Steps('LMSDiscreteScheduler', {}, 'lms'), Steps('HeunDiscreteScheduler', {}, 'heun'),
  Steps('KDPM2DiscreteScheduler', {}, 'dpm2'),
  Steps('KDPM2AncestralDiscreteScheduler', {}, 'dpm2_ancestral'),
  Steps('DPMSolverSDEScheduler', {}, 'dpmpp_sde'),
  _dpm('dpmsolver++', 1, 'ddim'), _dpm('dpmsolver', 1, 'ddim'),
  _dpm('sde-dpmsolver++', 1, 'euler_ancestral'),
  _dpm('dpmsolver++', 2, 'dpmpp_2m_sde', heun=True, eta=0.0, slope='exact'),
  _dpm('dpmsolver++', 2, 'dpmpp_2m'),
  _dpm('dpmsolver++', 3, 'dpmpp_3m_sde', heun=True, eta=0.0),
  _dpm('dpmsolver++', 3, 'dpmpp_3m_sde', eta=0.0, slope='midpoint'),
  _dpm('sde-dpmsolver++', 2, 'dpmpp_2m_sde', heun=True, slope='exact'),
  _dpm('sde-dpmsolver++', 2, 'dpmpp_2m_sde'),
  Steps(UNIPC, {}, 'unipc'), Steps(DEIS, {}, 'deis'), Steps(SA, {}, 'sa_solver'),
  Steps('FlowMatchEulerDiscreteScheduler', {}, 'flow_euler'),
  Steps('FlowMatchHeunDiscreteScheduler', {}, 'flow_heun'), Steps(EDM, {}, 'euler'),
)
"""Read by class, the first that fits; written by sampler, the first of most options."""

OPTIONS = {
  UNIPC: {'order': ('solver_order', 2), 'variant': ('solver_type', 'bh2')},
  DEIS: {'order': ('solver_order', 3)},
  SA: {'order': ('predictor_order', 2), 'corrector_order': ('corrector_order', 2)},
}
"""Options that are arguments there: ours -> (theirs, our default)."""

LOWERED = {
  **{name: {True: FEW_STEPS, False: None} for name in (DPM, DEIS)},
  **{name: {True: None, False: False} for name in (UNIPC, SA)},
}
"""lower_order_final: theirs -> ours, None where it is our default."""
