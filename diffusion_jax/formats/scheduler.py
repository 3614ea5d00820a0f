"""scheduler_config.json of diffusers <-> our noise schedule, prediction, sampler and grid.

A scheduler of diffusers is all of these at once. A config may carry keys of other classes, which
diffusers ignores, as is done here; a key that its class heeds and that has no counterpart is an
error that names it. `scheduler_classes` lists every argument of every class.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from diffusion_jax.diffusion.noise import BETAS, MOST_TIMESTEPS, NoiseConfig, NoiseSchedule
from diffusion_jax.errors import UserError, require
from diffusion_jax.formats.scheduler_classes import (
  CLASSES,
  SchedulerClass,
  place_steps,
  told_timesteps,
)


@dataclasses.dataclass(frozen=True)
class Scheduler:
  """What a scheduler_config.json says, in our terms.

  schedule, prediction, data_std: of the `NoiseSchedule` and the `Parameterization`.
  sampler, options: for `diffusion.samplers.sampler(name, **options)`.
  spacing, grid: for `sampling_grid(schedule, count, spacing, **grid)`.
  threshold and its limit and percentile, timesteps, scaled_noise: as in
  `pipelines.sampling.SampleConfig`.
  """

  schedule: NoiseConfig = NoiseConfig()
  prediction: str = 'epsilon'
  sampler: str = 'ddim'
  options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  spacing: str = 'leading'
  grid: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  threshold: str = 'none'
  threshold_limit: float = 1.0
  threshold_percentile: float = 0.995
  timesteps: str = 'exact'
  scaled_noise: bool = False
  data_std: float = 1.0


Values = Mapping[str, Any]
Choice = tuple[str, dict[str, Any]]
"""A sampler's name and its options."""

LARGEST = 1e6
"""Of any number that a config holds, but infinity."""

FEW_STEPS = 15
"""On grids of fewer steps, diffusers lowers the order of the last ones."""

TAU_TIMESTEPS = (200, 800)
"""Where SA-Solver adds noise: timesteps from the first to the second."""

T_MIN = 1e-3
"""The time of the least noise in training on a process, `NoiseSchedule.t_min`."""


def read_scheduler(values: Values, where: str) -> Scheduler:
  """A scheduler_config.json.

  Raises:
    UserError: a class or a setting that has no counterpart here; it is named.
  """
  name = values.get('_class_name')
  require(
    isinstance(name, str) and name in CLASSES,
    f'{where}: the scheduler {name!r} is not implemented; one of {", ".join(CLASSES)} is.',
  )
  spec = CLASSES[name]
  try:
    _check_only(name, spec, values)
    read = _read(name, spec, values)
    if spec.family in _CONTINUOUS:
      return _CONTINUOUS[spec.family](name, read)
    return _noised(name, spec, read)
  except UserError as error:
    raise UserError(f'{where}: {error}') from error


def _check_only(name: str, spec: SchedulerClass, values: Values) -> None:
  for key, allowed in spec.only.items():
    value = values.get(key)
    require(
      value is None or value in allowed, f'{key}={value!r} of {name} is not implemented; only '
      f'{" and ".join(map(repr, allowed))} is.',
    )


def _read(name: str, spec: SchedulerClass, values: Values) -> dict[str, Any]:
  """The arguments that the class reads, of the type of their defaults."""
  found = {}
  for key, default in {**dict.fromkeys(spec.hidden), **spec.reads}.items():
    value = values.get(key)
    value = default if value is None else value
    number = isinstance(value, int | float) and not isinstance(value, bool) and (
      abs(value) <= LARGEST or abs(value) == math.inf
    )
    kinds = {
      bool: isinstance(value, bool), str: isinstance(value, str),
      int: number and abs(value) < math.inf and value == int(value),
    }
    fits = kinds.get(type(default), number)
    require(
      value is default or fits, f'{key}={value!r} of {name} is not what it should be, like '
      f'{1.0 if default is None else default!r}.',
    )
    # A whole number of many digits is one that no array takes.
    found[key] = type(default)(value) if type(default) in (int, float) else value
  require(
    2 <= found.get('num_train_timesteps', 1000) <= MOST_TIMESTEPS,
    f'num_train_timesteps={found.get("num_train_timesteps")} is outside 2 to {MOST_TIMESTEPS}.',
  )
  return found


def _noised(name: str, spec: SchedulerClass, values: Values) -> Scheduler:
  schedule = _schedule(spec, values)
  prediction = values['prediction_type']
  require(
    prediction in spec.predictions, f'prediction_type={prediction!r} of {name} is not known; use '
    f'{" or ".join(spec.predictions)}.',
  )
  spacing, grid = place_steps(name, spec.family, values, schedule)
  threshold = _threshold(values)
  told = told_timesteps(name, spec.family, values)
  sampler, options = SAMPLERS[name](values)
  if name == 'SASolverScheduler':
    options = options | _tau_window(schedule, told)
  if name == 'DDIMScheduler' and threshold:
    options = options | {'keep_epsilon': True}
  scaled = spec.family == 'sigma' and values['timestep_spacing'] != 'leading'
  return Scheduler(
    schedule, prediction, sampler, options, spacing, grid, **threshold, timesteps=told,
    scaled_noise=scaled,
  )


def _schedule(spec: SchedulerClass, values: Values) -> NoiseConfig:
  for key in ('beta_start', 'beta_end'):
    require(0 <= values[key] < 1, f'{key}={values[key]!r} is not a beta; it lies in [0, 1).')
  require(
    values['beta_schedule'] in BETAS,
    f'beta_schedule={values["beta_schedule"]!r} is not one of {", ".join(BETAS)}.',
  )
  keys = ('beta_schedule', 'beta_start', 'beta_end', 'num_train_timesteps')
  rescaled = values.get('rescale_betas_zero_snr', False)
  # In sigma / alpha there has to be some signal left.
  last = 2.0**-24 if rescaled and spec.family != 'table' else 0.0
  return NoiseConfig(
    **{key: values[key] for key in keys}, rescale_betas_zero_snr=rescaled, last_alpha_bar=last
  )


def _threshold(values: Values) -> dict[str, Any]:
  """Clipping of the estimates of x_0."""
  if values.get('thresholding'):
    return {
      'threshold': 'dynamic', 'threshold_limit': float(values['sample_max_value']),
      'threshold_percentile': values['dynamic_thresholding_ratio'],
    }
  if values.get('clip_sample'):
    return {'threshold': 'static', 'threshold_limit': float(values['clip_sample_range'])}
  return {}


def _flow(name: str, values: Values) -> Scheduler:
  """The levels are shifted twice at their end: between those of the shifted table, once more."""
  total, shift = values['num_train_timesteps'], values['shift']
  schedule = NoiseConfig('flow', num_train_timesteps=total, shift=shift)
  end = shift / (total + shift - 1)
  grid = {'fractional': True} | ({'last': total * end - 1} if shift != 1 else {})
  sampler, options = SAMPLERS[name](values)
  return Scheduler(
    schedule, 'flow_prediction', sampler, options, 'linspace', grid, timesteps='sigma'
  )


def _edm(name: str, values: Values) -> Scheduler:
  """Levels from sigma_max to sigma_min, which our process has at the time where training begins."""
  low, high, rho = values['sigma_min'], values['sigma_max'], values['rho']
  require(
    0 < low < high < math.inf and 0 < rho <= 100 and 0 < values['sigma_data'] < math.inf,
    f'sigma_min={low!r}, sigma_max={high!r}, rho={rho!r} and sigma_data={values["sigma_data"]!r} '
    'must be positive numbers, sigma_min below sigma_max.',
  )
  first, last = low ** (1 / rho), high ** (1 / rho)
  start = (first - T_MIN * last) / (1 - T_MIN)
  require(start > 0, f'sigma_min={low!r} is too small for sigma_max={high!r}.')
  process = {'sigma_min': start**rho, 'sigma_max': float(high), 'rho': float(rho)}
  spacing = values['sigma_schedule']
  require(
    spacing in ('karras', 'exponential'),
    f'sigma_schedule={spacing!r} is not known; use karras or exponential.',
  )
  sampler, options = SAMPLERS[name](values)
  return Scheduler(
    NoiseConfig(process='karras', process_options=process, label='log_snr'), 'edm', sampler,
    options, spacing, {'rho': float(rho)} if spacing == 'karras' and rho != 7 else {},
    data_std=float(values['sigma_data']),
  )


_CONTINUOUS = {'flow': _flow, 'edm': _edm}
"""How families without a table of betas are read."""


def _always(name: str) -> Callable[[Values], Choice]:
  return lambda values: (name, {})


def _pick(key: str, value: Any, table: Mapping[Any, Choice]) -> Choice:
  require(
    value in table, f'A scheduler with {key} {value!r} is not implemented; choose one of '
    f'{", ".join(map(repr, table))}.',
  )
  return table[value]


def _ddpm(values: Values) -> Choice:
  variance = values['variance_type']
  last_is_zero = values['timestep_spacing'] != 'trailing' and (
    values['timestep_spacing'] == 'linspace' or not values['steps_offset']
  )
  require(
    last_is_zero or variance.startswith('fixed_small'),
    f'variance_type {variance!r} adds noise in the last step, too, where that is not from timestep '
    '0; only steps_offset 0 with leading or linspace timestep_spacing is implemented.',
  )
  return _pick('variance_type', variance, {
    'fixed_small': ('ddpm', {}), 'fixed_small_log': ('ddpm', {}), 'fixed_large': ('ddpm_large', {}),
    'learned_range': ('ddpm', {'variance': 'learned'}),
  })


def _pndm(values: Values) -> Choice:
  """diffusers averages what the network predicts."""
  averaged = {'average': 'v_prediction'} if values['prediction_type'] == 'v_prediction' else {}
  return ('plms' if values['skip_prk_steps'] else 'pndm'), averaged


def _lcm(values: Values) -> Choice:
  """The share of x that LCM mixes into x_0 is .25 / ((s t)^2 + .25) at timestep t."""
  least = values['num_train_timesteps'] // max(values['original_inference_steps'], 1) - 1
  require(
    values['timestep_scaling'] * least >= 50, f'timestep_scaling={values["timestep_scaling"]:g} '
    f'and a first timestep of {least} mix x into the estimates of x_0, which is not implemented; '
    'their product has to be 50 or more.',
  )
  return 'lcm', {}


def _dpm(values: Values) -> Choice:
  order, heun = values['solver_order'], values['solver_type'] == 'heun'
  algorithm = {'deis': 'dpmsolver++'}.get(values['algorithm_type'], values['algorithm_type'])
  _pick('solver_type', values['solver_type'], dict.fromkeys(
    ('midpoint', 'heun', 'logrho', 'bh1', 'bh2'), ('', {})
  ))
  clean = values['final_sigmas_type'] == 'zero'
  final = {'lower_order_final': FEW_STEPS} if values['lower_order_final'] else {}
  final = {} if clean and order < 3 else final  # A step to sigma = 0 is of order 1 anyway.
  final |= {'euler_at_final': True} if values['euler_at_final'] and not clean else {}
  slope = {'slope': 'exact'} if heun else {}
  name, options = _pick('algorithm_type and solver_order', (algorithm, order), {
    ('dpmsolver++', 1): ('ddim', {}), ('dpmsolver', 1): ('ddim', {}),
    ('sde-dpmsolver++', 1): ('euler_ancestral', {}),
    ('dpmsolver++', 2): ('dpmpp_2m_sde', {'eta': 0.0} | slope) if heun else ('dpmpp_2m', {}),
    ('dpmsolver++', 3): ('dpmpp_3m_sde', {'eta': 0.0} | ({} if heun else {'slope': 'midpoint'})),
    ('sde-dpmsolver++', 2): ('dpmpp_2m_sde', slope),
  })
  return name, options | (final if order > 1 else {})


def _unipc(values: Values) -> Choice:
  variant = values['solver_type']
  variant = 'bh2' if variant in ('midpoint', 'heun', 'logrho') else variant
  options = {'order': values['solver_order'], 'variant': variant}
  return 'unipc', _but(options | _lowered(values), order=2, variant='bh2')


def _deis(values: Values) -> Choice:
  others = ('midpoint', 'heun', 'bh1', 'bh2'), ('dpmsolver', 'dpmsolver++')
  for key, known in zip(('solver_type', 'algorithm_type'), others, strict=True):
    own = CLASSES['DEISMultistepScheduler'].reads[key]
    _pick(key, values[key], dict.fromkeys((own, *known), ('', {})))
  final = {'lower_order_final': FEW_STEPS} if values['lower_order_final'] else {}
  return 'deis', _but({'order': values['solver_order']}, order=3) | final


def _sa_solver(values: Values) -> Choice:
  require(
    values['corrector_order'] != 1, 'corrector_order=1 of SASolverScheduler is not implemented; '
    'only 2 or more is.',
  )
  options = {'order': values['predictor_order'], 'corrector_order': values['corrector_order']}
  return 'sa_solver', _but(options | _lowered(values), order=2, corrector_order=2)


def _lowered(values: Values) -> dict[str, Any]:
  return {} if values['lower_order_final'] else {'lower_order_final': False}


def _but(options: dict[str, Any], **defaults) -> dict[str, Any]:
  """The options that are not our defaults."""
  return {k: v for k, v in options.items() if k not in defaults or v != defaults[k]}


def _tau_window(config: NoiseConfig, told: str) -> dict[str, Any]:
  """The noise levels of `TAU_TIMESTEPS`, by the timesteps that the network is told."""
  alphas, sigmas = config.table()
  if len(alphas) <= TAU_TIMESTEPS[0]:
    return {'tau': 0.0}
  shift = np.array([0.0, 1.0] if told == 'down' else [-0.5, 0.5])
  places = np.array(TAU_TIMESTEPS) + shift
  logs = np.log(sigmas / alphas)
  low, high = np.exp(np.interp(places, np.arange(len(logs)), logs))
  beyond = 2.0 if places[1] >= len(logs) - 1 else 1.0
  return {'low': float(low), 'high': float(high * beyond)}


SAMPLERS: dict[str, Callable[[Values], Choice]] = {
  'DDIMScheduler': _always('ddim'), 'DDPMScheduler': _ddpm, 'PNDMScheduler': _pndm,
  'LCMScheduler': _lcm, 'TCDScheduler': _always('tcd'),
  'EulerDiscreteScheduler': _always('euler'),
  'EulerAncestralDiscreteScheduler': _always('euler_ancestral'),
  'LMSDiscreteScheduler': _always('lms'), 'HeunDiscreteScheduler': _always('heun'),
  'KDPM2DiscreteScheduler': _always('dpm2'),
  'KDPM2AncestralDiscreteScheduler': _always('dpm2_ancestral'),
  'DPMSolverSDEScheduler': _always('dpmpp_sde'), 'DPMSolverMultistepScheduler': _dpm,
  'UniPCMultistepScheduler': _unipc, 'DEISMultistepScheduler': _deis,
  'SASolverScheduler': _sa_solver, 'FlowMatchEulerDiscreteScheduler': _always('flow_euler'),
  'FlowMatchHeunDiscreteScheduler': _always('flow_heun'), 'EDMEulerScheduler': _always('euler'),
}
"""Class of diffusers -> our sampler, from what the class reads."""


_WRITTEN: dict[str, tuple[str, dict[str, Any]]] = {
  'ddim': ('DDIMScheduler', {}),
  'ddpm': ('DDPMScheduler', {'variance_type': 'fixed_small'}),
  'ddpm_large': ('DDPMScheduler', {'variance_type': 'fixed_large'}),
  'plms': ('PNDMScheduler', {'skip_prk_steps': True}),
  'pndm': ('PNDMScheduler', {'skip_prk_steps': False}),
  'lcm': ('LCMScheduler', {}), 'tcd': ('TCDScheduler', {}),
  'euler': ('EulerDiscreteScheduler', {}),
  'euler_ancestral': ('EulerAncestralDiscreteScheduler', {}),
  'lms': ('LMSDiscreteScheduler', {}), 'heun': ('HeunDiscreteScheduler', {}),
  'dpm2': ('KDPM2DiscreteScheduler', {}),
  'dpm2_ancestral': ('KDPM2AncestralDiscreteScheduler', {}),
  'dpmpp_sde': ('DPMSolverSDEScheduler', {}),
  'dpmpp_2m': ('DPMSolverMultistepScheduler', {'algorithm_type': 'dpmsolver++'}),
  'dpmpp_2m_sde': ('DPMSolverMultistepScheduler', {'algorithm_type': 'sde-dpmsolver++'}),
  'dpmpp_3m_sde': (
    'DPMSolverMultistepScheduler', {'algorithm_type': 'dpmsolver++', 'solver_order': 3}
  ),
  'unipc': ('UniPCMultistepScheduler', {}), 'deis': ('DEISMultistepScheduler', {}),
  'sa_solver': ('SASolverScheduler', {}),
  'flow_euler': ('FlowMatchEulerDiscreteScheduler', {}),
  'flow_heun': ('FlowMatchHeunDiscreteScheduler', {}),
}
"""Our sampler -> the class of diffusers and what names it there."""

_OPTIONS = {
  'unipc': {'order': ('solver_order', 2), 'variant': ('solver_type', 'bh2')},
  'deis': {'order': ('solver_order', 3)},
  'sa_solver': {'order': ('predictor_order', 2), 'corrector_order': ('corrector_order', 2)},
}
"""Options of samplers: ours -> (the key of diffusers, our default)."""


def write_scheduler(scheduler: Scheduler) -> dict[str, Any]:
  """Return the scheduler_config.json that `read_scheduler` and diffusers read back.

  Raises:
    UserError: diffusers has no class for the sampler, or none with such a schedule or spacing.
  """
  if not scheduler.schedule.is_table:
    return _write_process(scheduler)
  require(
    scheduler.sampler in _WRITTEN,
    f'diffusers has no scheduler for the sampler {scheduler.sampler!r}; choose one of '
    f'{", ".join(_WRITTEN)}.',
  )
  if scheduler.schedule.beta_schedule == 'cosine' and scheduler.schedule.beta_end == 0.999:
    schedule = dataclasses.replace(scheduler.schedule, beta_schedule='squaredcos_cap_v2')
    scheduler = dataclasses.replace(scheduler, schedule=schedule)
  name, more = _WRITTEN[scheduler.sampler]
  known = (set(BETAS) - {'cosine'}) | {'flow'}
  require(
    scheduler.schedule.beta_schedule in known,
    f'diffusers has no beta_schedule {scheduler.schedule.beta_schedule!r}.',
  )
  wanted = {**more, **_schedule_values(scheduler), **_options(scheduler), **_spacing(scheduler)}
  spec = CLASSES[name]
  heeded = {*spec.reads, *spec.only, *spec.hidden}
  values = {'_class_name': name} | {k: v for k, v in wanted.items() if k in heeded}
  again = read_scheduler(values, 'scheduler_config.json')
  for field in dataclasses.fields(Scheduler):
    has, will = getattr(scheduler, field.name), getattr(again, field.name)
    if field.name == 'grid' and name == 'DDIMScheduler' and 'via' not in has:
      # Steps of T // count timesteps end where the next start, if the count divides T.
      will = {key: value for key, value in will.items() if key != 'via'}
    unused = scheduler.threshold == 'none' and field.name.startswith('threshold_')
    unused |= scheduler.threshold == 'static' and field.name == 'threshold_percentile'
    require(
      has == will or unused,
      f'{name} of diffusers cannot have {field.name} {has!r} (it would be {will!r}); choose '
      'another sampler.',
    )
  return values


def scheduler_or_plain(scheduler: Scheduler) -> tuple[dict[str, Any] | None, str | None]:
  """Return the scheduler_config.json for an export, and why it samples otherwise, if it does.

  Where diffusers has nothing for the sampler or the spacing, that is a scheduler with plain Euler
  or DDIM steps on the same noise schedule; None where it has no class for that either.
  """
  try:
    return write_scheduler(scheduler), None
  except UserError as error:
    why = str(error)
  ddim = dataclasses.replace(scheduler, sampler='ddim')
  if scheduler.sampler == 'euler' and not scheduler.options:  # The same steps on the same levels.
    try:
      return write_scheduler(ddim), None
    except UserError:
      pass
  spacing = {'flow': 'linspace', 'karras': 'karras'}.get(scheduler.schedule.process, 'trailing')
  plain = Scheduler(
    scheduler.schedule, scheduler.prediction, 'ddim', spacing=spacing, data_std=scheduler.data_std
  )
  try:
    return write_scheduler(plain), f'diffusers samples with other steps: {why}'
  except UserError as error:
    return None, f'diffusers cannot sample: {error}'


def _write_process(scheduler: Scheduler) -> dict[str, Any]:
  """The config of Euler's steps on a process in continuous time; DDIM's are the same there."""
  noise, grid = scheduler.schedule, scheduler.grid
  expected = {'flow': ('sigma', 'flow_prediction'), 'karras': ('log_snr', 'edm')}
  require(
    noise.process in expected and not noise.sub_vp
    and expected[noise.process] == (noise.label, scheduler.prediction),
    f'diffusers has no scheduler for the process {noise.process!r} with the label {noise.label!r} '
    f'and the prediction {scheduler.prediction!r}; it has them for flow, sigma, flow_prediction '
    'and for karras, log_snr, edm.',
  )
  require(
    scheduler.sampler in ('euler', 'ddim', 'flow_euler') and not scheduler.options
    and scheduler.threshold == 'none',
    f'diffusers has no scheduler for the sampler {scheduler.sampler!r} with these settings on a '
    'process; choose euler without options and threshold.',
  )
  ends = NoiseSchedule.of(noise).levels(2)
  if noise.process == 'flow':
    require(
      scheduler.spacing == 'linspace' and not grid
      and abs(noise.num_train_timesteps * ends[1][0] - 1) < 1e-6,
      f'FlowMatchEulerDiscreteScheduler of diffusers cannot have the spacing {scheduler.spacing!r} '
      f'with {noise.process_options} and num_train_timesteps {noise.num_train_timesteps}; choose '
      'linspace, no shift and 1000.',
    )
    return {
      '_class_name': 'FlowMatchEulerDiscreteScheduler', 'shift': 1.0,
      'num_train_timesteps': noise.num_train_timesteps,
    }
  require(
    scheduler.spacing in ('karras', 'exponential') and set(grid) <= {'rho'},
    f'EDMEulerScheduler of diffusers cannot have the spacing {scheduler.spacing!r}; choose karras '
    'or exponential.',
  )
  return {
    '_class_name': 'EDMEulerScheduler', 'prediction_type': 'epsilon', 'final_sigmas_type': 'zero',
    # Rounded, so that reading and writing many times changes nothing.
    'sigma_min': float(f'{ends[1][0]:.12g}'), 'sigma_max': float(f'{ends[1][-1]:.12g}'),
    'sigma_data': scheduler.data_std, 'sigma_schedule': scheduler.spacing,
    'rho': grid.get('rho', 7.0),
  }


def _schedule_values(scheduler: Scheduler) -> dict[str, Any]:
  config = dataclasses.asdict(scheduler.schedule)
  return config | {'prediction_type': scheduler.prediction, 'trained_betas': None}


def _options(scheduler: Scheduler) -> dict[str, Any]:
  """Those options of samplers that diffusers names otherwise; the threshold."""
  options, names = scheduler.options, _OPTIONS.get(scheduler.sampler, {})
  values = {key: options.get(option, here) for option, (key, here) in names.items()}
  own = scheduler.sampler in ('unipc', 'sa_solver')  # Their default is True.
  values['lower_order_final'] = bool(options.get('lower_order_final', own))
  values['euler_at_final'] = options.get('euler_at_final', False)
  if options.get('variance') == 'learned':
    values['variance_type'] = 'learned_range'
  if scheduler.sampler == 'dpmpp_2m_sde' and options.get('slope') == 'exact':
    values |= {'solver_type': 'heun', 'solver_order': 2}
  if scheduler.sampler == 'dpmpp_3m_sde' and 'slope' not in options:
    values['solver_type'] = 'heun'
  if options.get('eta') == 0:
    values['algorithm_type'] = 'dpmsolver++'
  values['clip_sample'] = scheduler.threshold == 'static'
  values['thresholding'] = scheduler.threshold == 'dynamic'
  key = 'sample_max_value' if scheduler.threshold == 'dynamic' else 'clip_sample_range'
  if scheduler.threshold != 'none':
    values[key] = scheduler.threshold_limit
  if scheduler.threshold == 'dynamic':
    values['dynamic_thresholding_ratio'] = scheduler.threshold_percentile
  return values


def _spacing(scheduler: Scheduler) -> dict[str, Any]:
  grid = scheduler.grid
  clean = grid.get('set_alpha_to_one', True)
  values = {'set_alpha_to_one': clean, 'final_sigmas_type': 'zero' if clean else 'sigma_min'}
  values |= {'sigma_min': grid.get('low'), 'sigma_max': grid.get('high')}
  values['original_inference_steps'] = grid.get('original_inference_steps', 50)
  levels = {'karras': 'use_karras_sigmas', 'exponential': 'use_exponential_sigmas'}
  spacing = scheduler.spacing
  if spacing in levels:
    values[levels[spacing]] = True
    if spacing == 'exponential' and scheduler.timesteps == 'nearest':
      values |= {'use_exponential_sigmas': False, 'use_lu_lambdas': True}
    spacing = grid.get('within', 'linspace')
  return values | {'timestep_spacing': spacing, 'steps_offset': grid.get('steps_offset', 0)}
