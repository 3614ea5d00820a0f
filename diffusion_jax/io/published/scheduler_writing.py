"""Our schedule, prediction, sampler and grid as a scheduler_config.json of diffusers."""

import dataclasses
from typing import Any

from diffusion_jax.diffusion.schedules import BETAS
from diffusion_jax.io.published.scheduler import Scheduler, read_scheduler
from diffusion_jax.io.published.scheduler_classes import CLASSES
from diffusion_jax.models.checks import require

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
  """The scheduler_config.json that `read_scheduler` and diffusers read back.

  Raises:
    UserError: diffusers has no class for the sampler, or none with such a schedule or spacing.
  """
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
  wanted = {**more, **_schedule(scheduler), **_options(scheduler), **_spacing(scheduler)}
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


def _schedule(scheduler: Scheduler) -> dict[str, Any]:
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
