"""Our schedule, prediction, sampler and grid as a scheduler_config.json of diffusers."""

import dataclasses
from typing import Any

from diffusion_jax.diffusion.schedules import BETAS
from diffusion_jax.io.published.scheduler import CLASSES, OPTIONS, Scheduler, read_scheduler
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
  'unipc': ('UniPCMultistepScheduler', {}), 'deis': ('DEISMultistepScheduler', {}),
  'sa_solver': ('SASolverScheduler', {}),
  'flow_euler': ('FlowMatchEulerDiscreteScheduler', {}),
  'flow_heun': ('FlowMatchHeunDiscreteScheduler', {}),
}
"""Our sampler -> the class of diffusers and what names it there."""


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
  values = {'_class_name': name, **more, **_schedule(scheduler), **_options(scheduler)}
  if CLASSES[name].family != 'flow':
    values |= _spacing(CLASSES[name].family, scheduler)
  known = (set(BETAS) - {'cosine'}) | {'flow'}
  require(
    scheduler.schedule.beta_schedule in known,
    f'diffusers has no beta_schedule {scheduler.schedule.beta_schedule!r}.',
  )
  again = read_scheduler(values, 'scheduler_config.json')
  for field in dataclasses.fields(Scheduler):
    has, will = getattr(scheduler, field.name), getattr(again, field.name)
    unused = scheduler.threshold == 'none' and field.name.startswith('threshold_')
    require(
      has == will or unused,
      f'{name} of diffusers cannot have {field.name} {has!r} (it would be {will!r}); choose '
      'another sampler.',
    )
  return values


def _schedule(scheduler: Scheduler) -> dict[str, Any]:
  config = scheduler.schedule
  if config.beta_schedule == 'flow':
    return {'num_train_timesteps': config.num_train_timesteps, 'shift': config.shift}
  values = dataclasses.asdict(config)
  del values['shift']
  return values | {'prediction_type': scheduler.prediction, 'trained_betas': None}


def _options(scheduler: Scheduler) -> dict[str, Any]:
  """Those options of samplers that diffusers names otherwise; the threshold."""
  names = OPTIONS.get(scheduler.sampler, {})
  values = {key: scheduler.options.get(option, here) for option, (key, _, here) in names.items()}
  if scheduler.options.get('variance') == 'learned':
    values['variance_type'] = 'learned_range'
  if scheduler.options.get('slope') == 'exact':
    values |= {'solver_type': 'heun', 'solver_order': 2}
    if scheduler.options.get('eta') == 0:
      values['algorithm_type'] = 'dpmsolver++'
  if scheduler.schedule.beta_schedule != 'flow':
    values['clip_sample'] = scheduler.threshold == 'static'
    values['thresholding'] = scheduler.threshold == 'dynamic'
  key = 'sample_max_value' if scheduler.threshold == 'dynamic' else 'clip_sample_range'
  if scheduler.threshold != 'none':
    values[key] = scheduler.threshold_limit
  if scheduler.threshold == 'dynamic':
    values['dynamic_thresholding_ratio'] = scheduler.threshold_percentile
  return values


def _spacing(family: str, scheduler: Scheduler) -> dict[str, Any]:
  clean = scheduler.grid.get('set_alpha_to_one', True)
  if family == 'table':
    values: dict[str, Any] = {'set_alpha_to_one': clean}
  else:
    values = {'final_sigmas_type': 'zero' if clean else 'sigma_min'}
  levels = {'karras': 'use_karras_sigmas', 'exponential': 'use_exponential_sigmas'}
  if scheduler.spacing in levels:
    return values | {levels[scheduler.spacing]: True}
  return values | {
    'timestep_spacing': scheduler.spacing, 'steps_offset': scheduler.grid.get('steps_offset', 0)
  }
