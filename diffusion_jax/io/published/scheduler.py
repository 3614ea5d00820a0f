"""scheduler_config.json of diffusers <-> our schedule, prediction, sampler and grid.

A scheduler of diffusers is all of these at once. A config may carry keys of other classes, which
diffusers ignores, as is done here; a key that its class heeds and that has no counterpart is an
error that names it.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from diffusion_jax.diffusion.schedules import BETAS, ScheduleConfig
from diffusion_jax.errors import UserError
from diffusion_jax.models.checks import require


@dataclasses.dataclass(frozen=True)
class Scheduler:
  """What a scheduler_config.json says, in our terms.

  sampler, options: for `diffusion.samplers.sampler(name, **options)`.
  spacing, grid: for `sampling_grid(schedule, count, spacing, **grid)`.
  threshold and its limit and percentile: as in `pipelines.sampling.SampleConfig`.
  """

  schedule: ScheduleConfig = ScheduleConfig()
  prediction: str = 'epsilon'
  sampler: str = 'ddim'
  options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  spacing: str = 'leading'
  grid: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  threshold: str = 'none'
  threshold_limit: float = 1.0
  threshold_percentile: float = 0.995


Choice = tuple[str, dict[str, Any]]
"""A sampler's name and its options."""


@dataclasses.dataclass(frozen=True)
class _Class:
  """How one class of diffusers is read.

  sampler: its config -> our sampler.
  defaults: of keys that its config may leave out, where they are not `_DEFAULTS`.
  family: 'table', by timesteps and alpha-bar; 'sigma', after k-diffusion; 'solver', in log-SNR, the
  last timestep left out; 'flow'.
  fixed: keys that it heeds, with the only values that have a counterpart.
  """

  sampler: Callable[[Mapping[str, Any]], Choice]
  family: str
  defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  fixed: Mapping[str, tuple] = dataclasses.field(default_factory=dict)


_DEFAULTS = {
  'num_train_timesteps': 1000, 'beta_start': 0.0001, 'beta_end': 0.02, 'beta_schedule': 'linear',
  'rescale_betas_zero_snr': False, 'prediction_type': 'epsilon', 'steps_offset': 0,
}
_K_DIFFUSION = {'beta_start': 0.00085, 'beta_end': 0.012}
_CONSISTENCY = _K_DIFFUSION | {'beta_schedule': 'scaled_linear'}
_SOLVER = {
  'use_flow_sigmas': (False,), 'use_lu_lambdas': (False,), 'use_dynamic_shifting': (False,),
  'variance_type': (None,),
}


# Classes that heed final_sigmas_type, and those that always end at the table's first level.
_FREE_ENDS = (
  'EulerDiscreteScheduler', 'DPMSolverMultistepScheduler', 'UniPCMultistepScheduler'
)
_NOISY_ENDS = ('DEISMultistepScheduler', 'SASolverScheduler')


def _always(name: str, **options) -> Callable[[Mapping[str, Any]], Choice]:
  return lambda values: (name, options)


def _ddpm(values: Mapping[str, Any]) -> Choice:
  variance = values.get('variance_type', 'fixed_small')
  names = {
    'fixed_small': ('ddpm', {}), 'fixed_large': ('ddpm_large', {}),
    'learned_range': ('ddpm', {'variance': 'learned'}),
  }
  return _pick('variance_type', variance, names)


def _dpm(values: Mapping[str, Any]) -> Choice:
  order = values.get('solver_order', 2)
  algorithm = values.get('algorithm_type', 'dpmsolver++')
  slope = {'heun': {'slope': 'exact'}}.get(values.get('solver_type', 'midpoint'), {})
  exact = {'eta': 0.0, 'slope': 'exact'} if slope else None
  return _pick('algorithm_type and solver_order', (algorithm, order), {
    ('dpmsolver++', 1): ('ddim', {}), ('dpmsolver', 1): ('ddim', {}),
    ('dpmsolver++', 2): ('dpmpp_2m_sde', exact) if exact else ('dpmpp_2m', {}),
    ('dpmsolver++', 3): ('dpmpp_3m_sde', {'eta': 0.0}),
    ('sde-dpmsolver++', 2): ('dpmpp_2m_sde', slope),
  })


def _renamed(name: str, keys: Mapping[str, tuple[str, Any, Any]]) -> Callable:
  """A sampler with the options that differ; option -> (key, default there, default here)."""

  def choose(values: Mapping[str, Any]) -> Choice:
    given = {o: (values.get(key, there), here) for o, (key, there, here) in keys.items()}
    return name, {option: value for option, (value, here) in given.items() if value != here}

  return choose


OPTIONS = {
  'unipc': {
    'order': ('solver_order', 2, 2), 'variant': ('solver_type', 'bh2', 'bh2'),
    'lower_order_final': ('lower_order_final', True, True),
  },
  'deis': {'order': ('solver_order', 2, 3)},
  'sa_solver': {
    'order': ('predictor_order', 2, 2), 'corrector_order': ('corrector_order', 2, 2),
    'lower_order_final': ('lower_order_final', True, True),
  },
}
"""Options of samplers: ours -> (the key of diffusers, its default, ours)."""


def _pick(key: str, value: Any, table: Mapping[Any, Choice]) -> Choice:
  try:
    return table[value]
  except (KeyError, TypeError):
    raise UserError(
      f'A scheduler with {key} {value!r} is not implemented; choose one of '
      f'{", ".join(map(repr, table))}.'
    ) from None


CLASSES: dict[str, _Class] = {
  'DDIMScheduler': _Class(_always('ddim'), 'table'),
  'DDPMScheduler': _Class(_ddpm, 'table'),
  'PNDMScheduler': _Class(
    lambda values: ('plms' if values.get('skip_prk_steps', False) else 'pndm', {}), 'table',
    {'set_alpha_to_one': False},
  ),
  'LCMScheduler': _Class(_always('lcm'), 'table', _CONSISTENCY),
  'TCDScheduler': _Class(_always('tcd'), 'table', _CONSISTENCY),
  'EulerDiscreteScheduler': _Class(_always('euler'), 'sigma', {}, {
    'interpolation_type': ('linear',), 'timestep_type': ('discrete',), 'sigma_min': (None,),
    'sigma_max': (None,),
  }),
  'EulerAncestralDiscreteScheduler': _Class(_always('euler_ancestral'), 'sigma'),
  'LMSDiscreteScheduler': _Class(_always('lms'), 'sigma'),
  'HeunDiscreteScheduler': _Class(_always('heun'), 'sigma', _K_DIFFUSION),
  'KDPM2DiscreteScheduler': _Class(_always('dpm2'), 'sigma', _K_DIFFUSION),
  'KDPM2AncestralDiscreteScheduler': _Class(_always('dpm2_ancestral'), 'sigma', _K_DIFFUSION),
  'DPMSolverSDEScheduler': _Class(_always('dpmpp_sde'), 'sigma', _K_DIFFUSION),
  'DPMSolverMultistepScheduler': _Class(_dpm, 'solver', {}, _SOLVER),
  'UniPCMultistepScheduler': _Class(_renamed('unipc', OPTIONS['unipc']), 'solver', {}, _SOLVER | {
    'predict_x0': (True,), 'disable_corrector': ([],), 'solver_p': (None,),
  }),
  'DEISMultistepScheduler': _Class(_renamed('deis', OPTIONS['deis']), 'solver', {}, _SOLVER | {
    'solver_type': ('logrho',),
  }),
  'SASolverScheduler': _Class(_renamed('sa_solver', OPTIONS['sa_solver']), 'solver', {}, _SOLVER | {
    'algorithm_type': ('data_prediction',),
  }),
  'FlowMatchEulerDiscreteScheduler': _Class(_always('flow_euler'), 'flow', {}, {
    'use_dynamic_shifting': (False,), 'invert_sigmas': (False,), 'shift_terminal': (None,),
    'use_karras_sigmas': (False,), 'use_exponential_sigmas': (False,),
    'stochastic_sampling': (False,),
  }),
  'FlowMatchHeunDiscreteScheduler': _Class(_always('flow_heun'), 'flow'),
}
"""Classes of diffusers that have a counterpart here.

Three differences remain. LCM and TCD take their timesteps from those of the distillation; ours are
spaced by 'trailing', which is close. With use_karras_sigmas, the classes after k-diffusion run
between the levels of their first and last timestep, ours between the ends of the table. Flow
matching with a shift ends there at a level that is shifted twice.
"""


def read_scheduler(values: Mapping[str, Any], where: str) -> Scheduler:
  """A scheduler_config.json.

  Raises:
    UserError: a class or a setting that has no counterpart here; it is named.
  """
  name = values.get('_class_name')
  require(
    name in CLASSES,
    f'{where}: the scheduler {name!r} is not implemented; one of {", ".join(CLASSES)} is.',
  )
  spec = CLASSES[name]
  always = {'trained_betas': (None,), 'use_beta_sigmas': (False,)}
  for key, allowed in (always | dict(spec.fixed)).items():
    value = values.get(key, allowed[0])
    require(
      value in allowed, f'{where}: {key}={value!r} of {name} is not implemented; only '
      f'{" and ".join(map(repr, allowed))} is.',
    )
  values = _DEFAULTS | dict(spec.defaults) | {k: v for k, v in values.items() if v is not None}
  try:
    sampler, options = spec.sampler(values)
    if spec.family == 'flow':
      return _flow(values, sampler, options)
    fields = {field.name for field in dataclasses.fields(ScheduleConfig)} - {'shift'}
    schedule = ScheduleConfig(**{key: values[key] for key in fields})
  except UserError as error:
    raise UserError(f'{where}: {error}') from error
  require(
    schedule.beta_schedule in BETAS,
    f'{where}: beta_schedule={schedule.beta_schedule!r} is not one of diffusers.',
  )
  spacing, grid = _grid(name, spec, values, where)
  prediction = values['prediction_type']
  require(
    prediction in ('epsilon', 'sample', 'v_prediction'),
    f'{where}: prediction_type={prediction!r} is not known; use epsilon, sample or v_prediction.',
  )
  threshold = _threshold(name, values)
  return Scheduler(schedule, prediction, sampler, options, spacing, grid, **threshold)


def _flow(values: Mapping[str, Any], sampler: str, options: dict[str, Any]) -> Scheduler:
  schedule = ScheduleConfig(
    'flow', num_train_timesteps=values['num_train_timesteps'], shift=values.get('shift', 1.0)
  )
  return Scheduler(
    schedule, 'flow_prediction', sampler, options, 'linspace', {'fractional': True}
  )


def _grid(
  name: str, spec: _Class, values: Mapping[str, Any], where: str
) -> tuple[str, dict[str, Any]]:
  """(spacing, arguments of sampling_grid)."""
  grid: dict[str, Any] = {}
  if not _ends_clean(name, spec.family, values):
    grid['set_alpha_to_one'] = False
  for key, spacing in (('use_karras_sigmas', 'karras'), ('use_exponential_sigmas', 'exponential')):
    if spec.family != 'table' and values.get(key):
      return spacing, grid
  if name in ('LCMScheduler', 'TCDScheduler'):
    return 'trailing', grid
  spacing = values.get('timestep_spacing', 'leading' if spec.family == 'table' else 'linspace')
  require(
    spacing in ('leading', 'trailing', 'linspace'),
    f'{where}: timestep_spacing={spacing!r} is not known; use leading, trailing or linspace.',
  )
  if spacing == 'leading' and values['steps_offset']:
    grid['steps_offset'] = values['steps_offset']
  if spacing == 'linspace' and spec.family == 'sigma':
    grid['fractional'] = True
  if spacing != 'trailing' and spec.family == 'solver':
    grid['drop_last'] = True
  return spacing, grid


def _ends_clean(name: str, family: str, values: Mapping[str, Any]) -> bool:
  if family == 'table':
    return values.get('set_alpha_to_one', True)
  if name in _FREE_ENDS:
    return values.get('final_sigmas_type', 'zero') == 'zero'
  return name not in _NOISY_ENDS


def _threshold(name: str, values: Mapping[str, Any]) -> dict[str, Any]:
  """Clipping of the estimates of x_0; those after k-diffusion have none, but Heun's."""
  family = CLASSES[name].family
  if family in ('table', 'solver') and name != 'PNDMScheduler' and values.get('thresholding'):
    return {
      'threshold': 'dynamic', 'threshold_limit': values.get('sample_max_value', 1.0),
      'threshold_percentile': values.get('dynamic_thresholding_ratio', 0.995),
    }
  default = name in ('DDIMScheduler', 'DDPMScheduler')
  clips = default or name in ('LCMScheduler', 'TCDScheduler', 'HeunDiscreteScheduler')
  if clips and values.get('clip_sample', default):
    return {'threshold': 'static', 'threshold_limit': values.get('clip_sample_range', 1.0)}
  return {}
