"""scheduler_config.json: what is refused, by name. Agreement with diffusers: tests/parity."""

import pytest

from diffusion_jax.diffusion.noise import NoiseConfig
from diffusion_jax.errors import UserError
from diffusion_jax.formats.scheduler import Scheduler, read_scheduler, write_scheduler

TABLE = dict(beta_start=0.00085, beta_end=0.012, beta_schedule='scaled_linear')


@pytest.mark.parametrize(('values', 'words'), [
  ({'_class_name': 'KarrasVeScheduler'}, "'KarrasVeScheduler' is not implemented; one of DDIM"),
  ({'_class_name': 'EDMEulerScheduler', 'prediction_type': 'v_prediction'}, 'prediction_type'),
  ({'_class_name': 'EDMEulerScheduler', 'sigma_min': 90.0}, 'sigma_min below sigma_max'),
  ({'_class_name': 'EDMEulerScheduler', 'sigma_schedule': 'x'}, "sigma_schedule='x'"),
  ({}, 'scheduler None'), ({'_class_name': ['DDIMScheduler']}, 'scheduler .*DDIMScheduler'),
  ({'_class_name': 'DDIMScheduler', 'trained_betas': [0.1]}, 'trained_betas'),
  ({'_class_name': 'DDIMScheduler', 'prediction_type': 'x'}, "prediction_type='x'"),
  ({'_class_name': 'PNDMScheduler', 'prediction_type': 'sample'}, "prediction_type='sample'"),
  ({'_class_name': 'DDIMScheduler', 'beta_schedule': 'exp'}, "beta_schedule='exp'"),
  ({'_class_name': 'DDIMScheduler', 'beta_schedule': 'flow'}, "beta_schedule='flow'"),
  ({'_class_name': 'DDIMScheduler', 'timestep_spacing': 'x'}, "timestep_spacing='x'"),
  ({'_class_name': 'PNDMScheduler', 'timestep_spacing': 'linspace'}, "timestep_spacing='linspace'"),
  ({'_class_name': 'EulerDiscreteScheduler', 'use_beta_sigmas': True}, 'use_beta_sigmas=True'),
  ({'_class_name': 'EulerDiscreteScheduler', 'timestep_type': 'continuous'}, 'timestep_type'),
  ({'_class_name': 'EulerDiscreteScheduler', 'final_sigmas_type': 'x'}, "final_sigmas_type='x'"),
  ({'_class_name': 'DPMSolverMultistepScheduler', 'algorithm_type': 'dpmsolver'},
   "algorithm_type='dpmsolver', solver_order=2"),
  ({'_class_name': 'DPMSolverMultistepScheduler', 'algorithm_type': 'sde-dpmsolver++',
    'solver_order': 3}, r"algorithm_type='sde-dpmsolver\+\+', solver_order=3"),
  ({'_class_name': 'DPMSolverMultistepScheduler', 'lambda_min_clipped': -5.1,
    'beta_schedule': 'squaredcos_cap_v2', 'timestep_spacing': 'trailing'}, 'lambda_min_clipped'),
  ({'_class_name': 'DDPMScheduler', 'variance_type': 'learned'}, "variance_type='learned'"),
  ({'_class_name': 'DDPMScheduler', 'variance_type': 'fixed_large', 'steps_offset': 1},
   "variance_type 'fixed_large' adds noise in the last step"),
  ({'_class_name': 'LCMScheduler', 'original_inference_steps': 1000}, 'timestep_scaling=10'),
  ({'_class_name': 'SASolverScheduler', 'corrector_order': 1}, 'corrector_order=1'),
  ({'_class_name': 'FlowMatchEulerDiscreteScheduler', 'invert_sigmas': True},
   'invert_sigmas=True'),
  # Damaged, or without end.
  ({'_class_name': 'DDIMScheduler', 'num_train_timesteps': 10**9}, 'num_train_timesteps'),
  ({'_class_name': 'DDIMScheduler', 'num_train_timesteps': 1}, 'num_train_timesteps'),
  ({'_class_name': 'DDIMScheduler', 'num_train_timesteps': '1000'}, "num_train_timesteps='1000'"),
  ({'_class_name': 'DDIMScheduler', 'num_train_timesteps': float('nan')}, 'num_train_timesteps'),
  ({'_class_name': 'DDIMScheduler', 'num_train_timesteps': 10.5}, 'num_train_timesteps=10.5'),
  ({'_class_name': 'DDPMScheduler', 'steps_offset': 10**30}, 'steps_offset=1000'),
  ({'_class_name': 'FlowMatchHeunDiscreteScheduler', 'shift': 10**40}, 'shift=1000'),
  ({'_class_name': 'DDIMScheduler', 'beta_end': [0.1]}, 'beta_end='),
  ({'_class_name': 'DDIMScheduler', 'beta_end': 1.5}, 'beta_end=1.5'),
  ({'_class_name': 'DDIMScheduler', 'clip_sample': 'yes'}, "clip_sample='yes'"),
  ({'_class_name': 'UniPCMultistepScheduler', 'use_karras_sigmas': True, 'sigma_min': -1},
   'sigma_min=-1'),
])
def test_what_has_no_counterpart_is_named(values, words):
  with pytest.raises(UserError, match=f'here.*{words}'):
    read_scheduler(values, 'here')


@pytest.mark.parametrize(('values', 'name', 'options'), [
  ({}, 'dpmpp_2m', {}), ({'solver_order': 1}, 'ddim', {}),
  ({'final_sigmas_type': 'sigma_min'}, 'dpmpp_2m', {'lower_order_final': 15}),
  ({'final_sigmas_type': 'sigma_min', 'lower_order_final': False, 'euler_at_final': True},
   'dpmpp_2m', {'euler_at_final': True}),
  ({'solver_order': 3}, 'dpmpp_3m_sde', {'eta': 0.0, 'slope': 'midpoint', 'lower_order_final': 15}),
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
  assert found.options == {'keep_epsilon': True}
  values = write_scheduler(found)
  assert values['thresholding'] and values['sample_max_value'] == 1.5
  assert read_scheduler(values, 'there') == found
  found = read_scheduler({'_class_name': 'DDIMScheduler', **TABLE}, 'here')
  assert (found.threshold, found.threshold_limit) == ('static', 1.0)


@pytest.mark.parametrize(('kind', 'others'), [
  ('EulerDiscreteScheduler', {'clip_sample': True, 'thresholding': True}),
  ('EulerAncestralDiscreteScheduler', {'use_karras_sigmas': True, 'final_sigmas_type': 'x'}),
  ('DDPMScheduler', {'set_alpha_to_one': False, 'use_karras_sigmas': True}),
  ('LMSDiscreteScheduler', {'rescale_betas_zero_snr': True}),
  ('DEISMultistepScheduler', {'final_sigmas_type': 'zero', 'euler_at_final': True}),
])
def test_keys_of_other_classes_have_no_effect(kind, others):
  plain = {'_class_name': kind, **TABLE}
  assert read_scheduler(plain | others, 'here') == read_scheduler(plain, 'here')


@pytest.mark.parametrize(('scheduler', 'words'), [
  (Scheduler(sampler='restart'), "no scheduler for the sampler 'restart'"),
  (Scheduler(spacing='beta'), "timestep_spacing='beta'"),
  (Scheduler(NoiseConfig(shift=2.0)), 'cannot have schedule'),
  (Scheduler(NoiseConfig('log_linear')), "beta_schedule 'log_linear'"),
  (Scheduler(sampler='dpmpp_2m'), 'cannot have grid'),
  (Scheduler(sampler='lcm'), 'cannot have spacing'),
  (Scheduler(threshold='static'), 'cannot have options'),  # Here eps follows the clipped x_0.
  (Scheduler(sampler='sa_solver', spacing='trailing', grid={'set_alpha_to_one': False}),
   'cannot have options'),  # Here tau acts at other levels.
])
def test_what_diffusers_cannot_say_is_refused(scheduler, words):
  with pytest.raises(UserError, match=words):
    write_scheduler(scheduler)


def test_a_cosine_schedule_has_another_name_there():
  cosine = Scheduler(NoiseConfig('cosine', beta_end=0.999), 'v_prediction', spacing='trailing')
  assert write_scheduler(cosine)['beta_schedule'] == 'squaredcos_cap_v2'
