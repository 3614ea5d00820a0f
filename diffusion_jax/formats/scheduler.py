"""scheduler_config.json of diffusers <-> our noise schedule, prediction, sampler and grid.

Keys of other classes are ignored, as in diffusers; one in use without a counterpart is an error
that names it. Whatever is written is read back, and refused unless the same.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from diffusion_jax.diffusion.noise import BETAS, NoiseConfig, NoiseSchedule
from diffusion_jax.errors import UserError, require
from diffusion_jax.formats.scheduler_classes import (
  CLASSES,
  DDIM,
  DDPM,
  DPM,
  LCM,
  LOWERED,
  OPTIONS,
  PNDM,
  SA,
  SIZE_SHIFT,
  STEPS,
  TCD,
  SchedulerClass,
  Steps,
  read_arguments,
)


@dataclasses.dataclass(frozen=True)
class Scheduler:
  """A scheduler_config.json in our terms.

  sampler, options: of `diffusion.samplers.sampler`. spacing, grid: of `sampling_grid`. Others as in
  `NoiseSchedule`, `Parameterization` and `pipelines.sampling.SampleConfig`.
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

Grid = tuple[str, dict[str, Any]]
"""Spacing, and arguments of `sampling_grid`."""

TAU_TIMESTEPS = (200, 800)
"""Where SA-Solver adds noise: timesteps from the first to the second."""

T_MIN = 1e-3
"""The time of the least noise in training on a process, `NoiseSchedule.t_min`."""

_LEVELS = {
  'use_karras_sigmas': 'karras', 'use_lu_lambdas': 'exponential',
  'use_exponential_sigmas': 'exponential',
}
"""Arguments that choose noise levels -> our spacing, the first that is set counts."""
def read_scheduler(values: Values, where: str) -> Scheduler:
  """Read a scheduler_config.json; UserError names a class or setting without a counterpart."""
  name = values.get('_class_name')
  require(
    isinstance(name, str) and name in CLASSES,
    f'{where}: the scheduler {name!r} is not implemented; one of {", ".join(CLASSES)} is.',
  )
  try:
    read = {'flow': _flow, 'edm': _edm}.get(CLASSES[name].family, _noised)
    return read(name, read_arguments(name, values))
  except UserError as error:
    raise UserError(f'{where}: {error}') from error


def _noised(name: str, values: Values) -> Scheduler:
  """On a table of betas."""
  spec = CLASSES[name]
  schedule = _schedule(spec, values)
  spacing, grid = _GRIDS[spec.family](name, values)
  threshold = _threshold(values)
  timesteps = _timesteps(name, spec.family, values)
  sampler, options = _steps(name, values)
  if name == SA:
    options |= _tau_window(schedule, timesteps)
  if name == DDIM and threshold:
    options |= {'keep_epsilon': True}
  scaled = spec.family == 'sigma' and values['timestep_spacing'] != 'leading'
  return Scheduler(
    schedule, values['prediction_type'], sampler, options, spacing, grid, **threshold,
    timesteps=timesteps, scaled_noise=scaled,
  )


def _schedule(spec: SchedulerClass, values: Values) -> NoiseConfig:
  for key in ('beta_start', 'beta_end'):
    require(0 <= values[key] < 1, f'{key}={values[key]!r} is not a beta; it lies in [0, 1).')
  keys = ('beta_schedule', 'beta_start', 'beta_end', 'num_train_timesteps')
  rescaled = values.get('rescale_betas_zero_snr', False)
  # In sigma / alpha there has to be some signal left.
  last = 2.0**-24 if rescaled and spec.family != 'table' else 0.0
  return NoiseConfig(
    **{key: values[key] for key in keys}, rescale_betas_zero_snr=rescaled, last_alpha_bar=last
  )


def _threshold(values: Values) -> dict[str, Any]:
  """Clipping of the estimates of x_0; `_threshold_values` is the inverse."""
  if values.get('thresholding'):
    return {
      'threshold': 'dynamic', 'threshold_limit': float(values['sample_max_value']),
      'threshold_percentile': values['dynamic_thresholding_ratio'],
    }
  if values.get('clip_sample'):
    return {'threshold': 'static', 'threshold_limit': float(values['clip_sample_range'])}
  return {}


def _threshold_values(scheduler: Scheduler) -> dict[str, Any]:
  kind, limit = scheduler.threshold, scheduler.threshold_limit
  values = {'clip_sample': kind == 'static', 'thresholding': kind == 'dynamic'}
  return values | {
    'none': {}, 'static': {'clip_sample_range': limit}, 'dynamic': {
      'sample_max_value': limit, 'dynamic_thresholding_ratio': scheduler.threshold_percentile,
    },
  }[kind]


def _steps(name: str, values: Values) -> tuple[str, dict[str, Any]]:
  """The sampler and its options, the inverse of `_steps_values`; UserError: steps of no sampler."""
  own = [steps for steps in STEPS if steps.kind == name]
  fits = [s for s in own if all(values[key] == value for key, value in s.there.items())]
  keys = dict.fromkeys(key for steps in own for key in steps.there)
  require(
    bool(fits), f'{", ".join(f"{key}={values[key]!r}" for key in keys)} of {name} is not '
    'implemented; of these only '
    f'{" or ".join(", ".join(map(repr, steps.there.values())) for steps in own)} is.',
  )
  _check_steps(name, values)
  options = dict(fits[0].options)
  for option, (key, default) in OPTIONS.get(name, {}).items():
    options |= {option: values[key]} if values[key] != default else {}
  if name in LOWERED and not (name == DPM and values['solver_order'] == 1):
    lowered = LOWERED[name][values['lower_order_final']]
    clean = name == DPM and values['final_sigmas_type'] == 'zero'
    if lowered is not None and not (clean and values['solver_order'] < 3):
      options['lower_order_final'] = lowered  # A step to sigma = 0 is of order 1 anyway.
    if values.get('euler_at_final') and not clean:
      options['euler_at_final'] = True
  return fits[0].sampler, options


def _check_steps(name: str, values: Values) -> None:
  """Raise a UserError for steps of a class that are not those of its sampler."""
  if name == DDPM:
    variance, spacing = values['variance_type'], values['timestep_spacing']
    last_is_zero = spacing == 'linspace' or (spacing == 'leading' and not values['steps_offset'])
    require(
      last_is_zero or variance.startswith('fixed_small'),
      f'variance_type {variance!r} adds noise in the last step, too, where that is not from '
      'timestep 0; only steps_offset 0 with leading or linspace timestep_spacing is implemented.',
    )
  if name == LCM:
    # The fraction of x that LCM mixes into x_0 is .25 / ((s t)^2 + .25) at timestep t.
    least = values['num_train_timesteps'] // max(values['original_inference_steps'], 1) - 1
    require(
      values['timestep_scaling'] * least >= 50, f'timestep_scaling={values["timestep_scaling"]:g} '
      f'and a first timestep of {least} mix x into the estimates of x_0, which is not implemented; '
      'their product has to be 50 or more.',
    )
  require(
    values.get('corrector_order') != 1,
    f'corrector_order=1 of {name} is not implemented; only 2 or more is.',
  )


def _steps_values(steps: Steps, options: Values) -> dict[str, Any]:
  lowered = LOWERED.get(steps.kind, {})
  ours = options.get('lower_order_final')
  return {
    **steps.there, 'euler_at_final': options.get('euler_at_final', False),
    'lower_order_final': next((theirs for theirs, own in lowered.items() if own == ours), True),
    **{key: options.get(ours, default) for ours, (key, default) in
       OPTIONS.get(steps.kind, {}).items()},
  }


def _tau_window(config: NoiseConfig, timesteps: str) -> dict[str, Any]:
  """Noise levels of `TAU_TIMESTEPS`, by the network's timesteps."""
  alphas, sigmas = config.table()
  if len(alphas) <= TAU_TIMESTEPS[0]:
    return {'tau': 0.0}
  shift = np.array([0.0, 1.0] if timesteps == 'down' else [-0.5, 0.5])
  places = np.array(TAU_TIMESTEPS) + shift
  logs = np.log(sigmas / alphas)
  low, high = np.exp(np.interp(places, np.arange(len(logs)), logs))
  beyond = 2.0 if places[1] >= len(logs) - 1 else 1.0
  return {'low': float(low), 'high': float(high * beyond)}


def _timesteps(name: str, family: str, values: Values) -> str:
  """Return one of LABELS: the timesteps of noise levels between those of the table."""
  key = next((key for key in _LEVELS if values.get(key)), None)
  if family == 'solver' and key:
    fine = name == DPM and values['beta_schedule'] == 'squaredcos_cap_v2'
    return 'down' if key == 'use_exponential_sigmas' or fine else 'nearest'
  rounds = key == 'use_karras_sigmas' and name == 'KDPM2DiscreteScheduler'
  return 'nearest' if rounds else 'exact'


def _spacing(values: Values) -> Grid:
  spacing, offset = values['timestep_spacing'], values['steps_offset']
  return spacing, {'steps_offset': offset} if spacing == 'leading' and offset else {}


def _table_grid(name: str, values: Values) -> Grid:
  """DDIM and PNDM step by T // count timesteps, wherever the next of them is."""
  if name in (LCM, TCD):
    original = values['original_inference_steps']
    grid = {} if original == 50 else {'original_inference_steps': original}
    return 'distilled', grid | ({'set_alpha_to_one': False, 'via': 'share'} if name == TCD else {})
  spacing, grid = _spacing(values)
  grid |= {} if values.get('set_alpha_to_one', True) else {'set_alpha_to_one': False}
  if name == DDIM and spacing != 'leading':
    grid |= {'via': 'stride'}
  if name == PNDM:
    require(
      spacing != 'linspace', "timestep_spacing='linspace' of PNDMScheduler is not implemented, as "
      'its steps end beside where the next ones start; use leading or trailing.',
    )
    grid |= {'even': True} if spacing == 'trailing' else {}
    grid |= {} if values['skip_prk_steps'] else {'via': 'half_stride'}
  return spacing, grid


def _levels(values: Values) -> str | None:
  """The spacing of noise levels, if any."""
  return next((ours for key, ours in _LEVELS.items() if values.get(key)), None)


def _bounds(values: Values) -> dict[str, Any]:
  given = {}
  for key, ours in (('sigma_min', 'low'), ('sigma_max', 'high')):
    if values.get(key) is not None:
      given[ours] = float(values[key])
      require(0 < given[ours] < math.inf, f'{key}={values[key]!r} is no noise level above 0.')
  return given


def _sigma_grid(name: str, values: Values) -> Grid:
  """Levels run between those of the first and the last timestep."""
  spacing, grid = _spacing(values)
  clean = values.get('final_sigmas_type', 'zero') == 'zero'
  grid |= {} if clean else {'set_alpha_to_one': False}
  levels = _levels(values)
  if levels:
    without = ('LMSDiscreteScheduler', 'DPMSolverSDEScheduler')
    bounds = {} if levels == 'karras' and name in without else _bounds(values)
    return levels, grid | bounds | ({} if spacing == 'linspace' else {'within': spacing})
  return spacing, grid | ({'fractional': True} if spacing == 'linspace' else {})


def _solver_grid(name: str, values: Values) -> Grid:
  """Levels run between the ends of the table, and may stay at the last of their own."""
  clean = values.get('final_sigmas_type') == 'zero'  # DEIS and SA-Solver have no such argument.
  end = {} if clean else {'set_alpha_to_one': False}
  levels = _levels(values)
  if levels:
    stays = not clean and name != DPM
    return levels, end | _bounds(values) | ({'stay_at_end': True} if stays else {})
  spacing, grid = _spacing(values)
  grid |= {} if spacing == 'trailing' else {'drop_last': True}
  alphas, sigmas = _schedule(CLASSES[name], values).table()
  least = math.exp(min(values.get('lambda_min_clipped', -math.inf), 50.0))
  clipped = int((alphas < sigmas * least).sum())
  require(
    not clipped or spacing != 'trailing', f'lambda_min_clipped={values.get("lambda_min_clipped")} '
    'with trailing timestep_spacing is not implemented; use leading or linspace.',
  )
  return spacing, end | grid | ({'clipped': clipped} if clipped else {})


_GRIDS = {'table': _table_grid, 'sigma': _sigma_grid, 'solver': _solver_grid}


def _grid_values(scheduler: Scheduler) -> dict[str, Any]:
  """The inverse of all grids."""
  grid, spacing = scheduler.grid, scheduler.spacing
  clean = grid.get('set_alpha_to_one', True)
  values = {
    'set_alpha_to_one': clean, 'final_sigmas_type': 'zero' if clean else 'sigma_min',
    'sigma_min': grid.get('low'), 'sigma_max': grid.get('high'),
    'original_inference_steps': grid.get('original_inference_steps', 50),
    'timestep_spacing': spacing, 'steps_offset': grid.get('steps_offset', 0),
    'use_dynamic_shifting': 'max_shift' in grid, 'shift_terminal': grid.get('shift_terminal'),
    **{key: grid.get(key, default) for key, default in SIZE_SHIFT.items()},
  }
  if spacing in ('karras', 'exponential'):
    lu = spacing == 'exponential' and scheduler.timesteps == 'nearest'
    key = 'use_lu_lambdas' if lu else f'use_{spacing}_sigmas'
    values |= {key: True, 'timestep_spacing': grid.get('within', 'linspace')}
  return values


def _flow(name: str, values: Values) -> Scheduler:
  """The levels are shifted twice at their end: between those of the shifted table, once more.

  With dynamic shifting the table is not shifted, but the grid, by the size of the image.
  """
  total, dynamic = values['num_train_timesteps'], values.get('use_dynamic_shifting', False)
  shift = 1.0 if dynamic else values['shift']
  schedule = NoiseConfig('flow', num_train_timesteps=total, shift=shift, label='sigma')
  end = shift / (total + shift - 1)
  grid = {'fractional': True} | ({'last': total * end - 1} if shift != 1 else {})
  grid |= _grid_shift(values) if dynamic else {}
  if terminal := values.get('shift_terminal'):
    require(0 < terminal < 1, f'shift_terminal={terminal!r} lies outside 0 to 1.')
    grid['shift_terminal'] = float(terminal)
  sampler, options = _steps(name, values)
  return Scheduler(
    schedule, 'flow_prediction', sampler, options, 'linspace', grid, timesteps='sigma'
  )


def _grid_shift(values: Values) -> Values:
  """How a grid is shifted by the size of the image. UserError for what names no line."""
  first, last = values['base_image_seq_len'], values['max_image_seq_len']
  require(
    0 < first < last, f'base_image_seq_len={first} and max_image_seq_len={last} must be lengths, '
    'the first below the second.',
  )
  for key in ('base_shift', 'max_shift'):
    require(math.isfinite(values[key]), f'{key}={values[key]!r} must be a finite number.')
  return {key: values[key] for key in SIZE_SHIFT}


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
  sampler, options = _steps(name, values)
  return Scheduler(
    NoiseConfig(process='karras', process_options=process, label='log_snr'), 'edm', sampler,
    options, spacing, {'rho': float(rho)} if spacing == 'karras' and rho != 7 else {},
    data_std=float(values['sigma_data']),
  )


def write_scheduler(scheduler: Scheduler) -> dict[str, Any]:
  """The scheduler_config.json that `read_scheduler` and diffusers read back.

  UserError: diffusers has no class for the sampler, or none with such a schedule or spacing.
  """
  schedule, options = scheduler.schedule, scheduler.options
  if not schedule.is_table:
    return _write_process(scheduler)
  own = [steps for steps in STEPS if steps.sampler == scheduler.sampler]
  require(
    bool(own), f'diffusers has no scheduler for the sampler {scheduler.sampler!r}; choose one of '
    f'{", ".join(dict.fromkeys(steps.sampler for steps in STEPS))}.',
  )
  missing = lambda steps: [k for k, v in steps.options.items() if options.get(k) != v]
  steps = max(own, key=lambda steps: (not missing(steps), len(steps.options)))
  spec = CLASSES[steps.kind]
  if schedule.beta_schedule == 'cosine' and schedule.beta_end == 0.999:
    schedule = dataclasses.replace(schedule, beta_schedule='squaredcos_cap_v2')
    scheduler = dataclasses.replace(scheduler, schedule=schedule)
  require(
    schedule.beta_schedule in {*BETAS, 'flow'} - {'cosine'},
    f'diffusers has no beta_schedule {schedule.beta_schedule!r}.',
  )
  wanted = {
    **_steps_values(steps, options), **dataclasses.asdict(schedule), 'trained_betas': None,
    'prediction_type': scheduler.prediction, **_threshold_values(scheduler),
    **_grid_values(scheduler),
  }
  used = {*spec.reads, *spec.only, *spec.hidden}
  values = {'_class_name': steps.kind} | {k: v for k, v in wanted.items() if k in used}
  _check_same(scheduler, read_scheduler(values, 'scheduler_config.json'), steps.kind)
  return values


def _check_same(scheduler: Scheduler, again: Scheduler, name: str) -> None:
  """Raise a UserError where a scheduler is not what was read again."""
  unused = {
    'none': ('threshold_limit', 'threshold_percentile'), 'static': ('threshold_percentile',)
  }.get(scheduler.threshold, ())
  for field in (f.name for f in dataclasses.fields(Scheduler) if f.name not in unused):
    has, will = getattr(scheduler, field), getattr(again, field)
    if field == 'grid' and name == DDIM and 'via' not in has:
      # Steps of T // count timesteps end where the next start, if the count divides T.
      will = {key: value for key, value in will.items() if key != 'via'}
    require(
      has == will, f'{name} of diffusers cannot have {field} {has!r} (it would be {will!r}); '
      'choose another sampler.',
    )


def scheduler_or_plain(scheduler: Scheduler) -> tuple[dict[str, Any] | None, str | None]:
  """The scheduler_config.json for an export, and why it samples otherwise, if it does.

  Without a counterpart it has plain Euler or DDIM steps on the same noise schedule, or is None.
  """
  ddim = dataclasses.replace(scheduler, sampler='ddim')
  spacing = {'flow': 'linspace', 'karras': 'karras'}.get(scheduler.schedule.process, 'trailing')
  plain = Scheduler(
    scheduler.schedule, scheduler.prediction, 'ddim', spacing=spacing, data_std=scheduler.data_std
  )
  # On the same levels, Euler's steps are DDIM's.
  alike = [scheduler] + [ddim] * (scheduler.sampler == 'euler' and not scheduler.options)
  problems = []
  for one in (*alike, plain):
    try:
      other = f'diffusers samples with other steps: {problems[0]}' if one is plain else None
      return write_scheduler(one), other
    except UserError as error:
      problems.append(str(error))
  return None, f'diffusers cannot sample: {problems[-1]}'


def _write_process(scheduler: Scheduler) -> dict[str, Any]:
  """Config of Euler's (there also DDIM's) steps on a process in continuous time."""
  noise, grid = scheduler.schedule, scheduler.grid
  expected = {'flow': ('sigma', 'flow_prediction'), 'karras': ('log_snr', 'edm')}
  require(
    not noise.sub_vp and expected.get(noise.process) == (noise.label, scheduler.prediction),
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
