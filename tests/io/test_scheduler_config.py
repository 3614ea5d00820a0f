"""scheduler_config.json: what is refused, by name. Agreement with diffusers: tests/parity."""

import pytest

from diffusion_jax.diffusion.schedules import ScheduleConfig
from diffusion_jax.errors import UserError
from diffusion_jax.io.published.scheduler import Scheduler, read_scheduler
from diffusion_jax.io.published.scheduler_writing import write_scheduler

TABLE = dict(beta_start=0.00085, beta_end=0.012, beta_schedule='scaled_linear')


@pytest.mark.parametrize(('values', 'words'), [
  ({'_class_name': 'EDMEulerScheduler'}, "'EDMEulerScheduler' is not implemented; one of DDIM"),
  ({}, 'scheduler None'),
  ({'_class_name': 'DDIMScheduler', 'trained_betas': [0.1]}, 'trained_betas'),
  ({'_class_name': 'DDIMScheduler', 'prediction_type': 'x'}, "prediction_type='x'"),
  ({'_class_name': 'DDIMScheduler', 'beta_schedule': 'exp'}, "beta_schedule is 'exp'"),
  ({'_class_name': 'DDIMScheduler', 'beta_schedule': 'flow'}, "beta_schedule='flow'"),
  ({'_class_name': 'DDIMScheduler', 'timestep_spacing': 'x'}, "timestep_spacing='x'"),
  ({'_class_name': 'EulerDiscreteScheduler', 'use_beta_sigmas': True}, 'use_beta_sigmas=True'),
  ({'_class_name': 'EulerDiscreteScheduler', 'timestep_type': 'continuous'}, 'timestep_type'),
  ({'_class_name': 'DPMSolverMultistepScheduler', 'algorithm_type': 'dpmsolver'},
   r"algorithm_type and solver_order \('dpmsolver', 2\)"),
  ({'_class_name': 'DDPMScheduler', 'variance_type': 'learned'}, "variance_type 'learned'"),
  ({'_class_name': 'FlowMatchEulerDiscreteScheduler', 'use_dynamic_shifting': True},
   'use_dynamic_shifting=True'),
])
def test_what_has_no_counterpart_is_named(values, words):
  with pytest.raises(UserError, match=f'here.*{words}'):
    read_scheduler(values, 'here')


@pytest.mark.parametrize(('values', 'name', 'options'), [
  ({}, 'dpmpp_2m', {}), ({'solver_order': 1}, 'ddim', {}),
  ({'solver_order': 3}, 'dpmpp_3m_sde', {'eta': 0.0}),
  ({'solver_type': 'heun'}, 'dpmpp_2m_sde', {'eta': 0.0, 'slope': 'exact'}),
  ({'algorithm_type': 'sde-dpmsolver++'}, 'dpmpp_2m_sde', {}),
])
def test_dpm_solvers(values, name, options):
  found = read_scheduler({'_class_name': 'DPMSolverMultistepScheduler', **TABLE, **values}, 'here')
  assert (found.sampler, found.options) == (name, options)


def test_thresholds_and_keys_of_other_classes():
  dynamic = dict(TABLE, thresholding=True, sample_max_value=1.5, dynamic_thresholding_ratio=0.9)
  found = read_scheduler({'_class_name': 'DDIMScheduler', **dynamic}, 'here')
  assert (found.threshold, found.threshold_limit, found.threshold_percentile) == (
    'dynamic', 1.5, 0.9
  )
  assert read_scheduler(write_scheduler(found), 'there') == found
  # Euler has neither.
  found = read_scheduler(
    {'_class_name': 'EulerDiscreteScheduler', 'clip_sample': True, **dynamic}, 'here'
  )
  assert found.threshold == 'none'
  found = read_scheduler({'_class_name': 'DDIMScheduler', **TABLE}, 'here')
  assert (found.threshold, found.threshold_limit) == ('static', 1.0)


@pytest.mark.parametrize(('scheduler', 'words'), [
  (Scheduler(sampler='restart'), "no scheduler for the sampler 'restart'"),
  (Scheduler(spacing='beta'), "timestep_spacing='beta'"),
  (Scheduler(ScheduleConfig(shift=2.0)), 'cannot have schedule'),
  (Scheduler(ScheduleConfig('log_linear')), "beta_schedule 'log_linear'"),
  (Scheduler(sampler='dpmpp_2m'), 'cannot have grid'),
  (Scheduler(sampler='lcm'), 'cannot have spacing'),
])
def test_what_diffusers_cannot_say_is_refused(scheduler, words):
  with pytest.raises(UserError, match=words):
    write_scheduler(scheduler)


def test_a_cosine_schedule_has_another_name_there():
  cosine = Scheduler(ScheduleConfig('cosine', beta_end=0.999), 'v_prediction', spacing='trailing')
  assert write_scheduler(cosine)['beta_schedule'] == 'squaredcos_cap_v2'
