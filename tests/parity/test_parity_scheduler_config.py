"""scheduler_config.json: every argument of every class of diffusers, and whole trajectories.

Both are drawn side by side from the same config. What remains is the rounding of noise levels to
float32, which diffusers does on the way.
"""

import inspect

import diffusers
import numpy as np
import pytest
import torch
from diffusers import SchedulerMixin

from diffusion_jax.diffusion.noise import Schedule
from diffusion_jax.errors import UserError
from diffusion_jax.formats.scheduler import read_scheduler, write_scheduler
from diffusion_jax.formats.scheduler_classes import CLASSES, SIZE_SHIFT
from tests.parity.drawn_schedulers import (
  NOISES,
  X,
  difference,
  make,
  ours,
  scale_of,
  scheduler_class,
  theirs,
)

pytestmark = pytest.mark.filterwarnings('ignore')  # Of the schedulers: NumPy's, and deprecations.

TABLE = {'beta_start': 0.00085, 'beta_end': 0.012, 'beta_schedule': 'scaled_linear'}
LINEAR = {'beta_start': 0.0001, 'beta_end': 0.02, 'beta_schedule': 'linear'}
COSINE = {'beta_schedule': 'squaredcos_cap_v2'}
STEPS = 5
CLOSE = 5e-6

ENDS_NOISY = {'final_sigmas_type': 'sigma_min'}
KARRAS, EXPONENTIAL = {'use_karras_sigmas': True}, {'use_exponential_sigmas': True}
V = {'prediction_type': 'v_prediction'}

OTHERWISE = {
  'num_train_timesteps': 900, 'beta_start': 0.002, 'beta_end': 0.015,
  'beta_schedule': 'squaredcos_cap_v2', 'prediction_type': 'v_prediction',
  'rescale_betas_zero_snr': True, 'timestep_spacing': 'trailing', 'steps_offset': 1,
  'thresholding': True, 'dynamic_thresholding_ratio': 0.6, 'sample_max_value': 0.5,
  'clip_sample_range': 0.3, 'variance_type': 'fixed_large', 'skip_prk_steps': True,
  'original_inference_steps': 60, 'timestep_scaling': 5.0, 'use_karras_sigmas': True,
  'use_exponential_sigmas': True, 'use_lu_lambdas': True, 'sigma_min': 0.1, 'sigma_max': 2.0,
  'final_sigmas_type': 'sigma_min', 'solver_order': 3, 'algorithm_type': 'sde-dpmsolver++',
  'solver_type': 'heun', 'lower_order_final': False, 'euler_at_final': True,
  'lambda_min_clipped': -1.0, 'predictor_order': 3, 'corrector_order': 3, 'shift': 3.0,
  'use_beta_sigmas': True, 'interpolation_type': 'log_linear', 'timestep_type': 'continuous',
  'trained_betas': [0.1], 'use_flow_sigmas': True, 'use_dynamic_shifting': True,
  'predict_x0': False, 'disable_corrector': [0], 'solver_p': 'x', 'shift_terminal': 0.1,
  'tau_func': 'x', 'invert_sigmas': True, 'stochastic_sampling': True, 'flow_shift': 3.0,
  'time_shift_type': 'linear', 'noise_sampler_seed': 3, 'base_shift': 0.7, 'max_shift': 2.0,
  'base_image_seq_len': 128, 'max_image_seq_len': 2048, 'sigma_data': 0.7, 'rho': 5.0,
  'sigma_schedule': 'exponential',
}
"""Another value than the default for every argument of which the defaults of all classes agree."""

TABLE_KEYS = (
  'num_train_timesteps', 'beta_start', 'beta_end', 'beta_schedule', 'rescale_betas_zero_snr'
)

THRESHOLD = {
  'thresholding': True, 'dynamic_thresholding_ratio': 0.87, 'sample_max_value': 0.5
}
LARGE = {'sample_max_value': 3.0, 'thresholding': True, 'dynamic_thresholding_ratio': 0.9}
WITH = {
  'steps_offset': {'timestep_spacing': 'leading'}, 'rescale_betas_zero_snr': V,
  'thresholding': {'sample_max_value': 3.0}, 'dynamic_thresholding_ratio': LARGE,
  'sample_max_value': LARGE, 'clip_sample_range': {'clip_sample': True}, 'sigma_min': EXPONENTIAL,
  'sigma_max': EXPONENTIAL, 'final_sigmas_type': {'timestep_spacing': 'trailing'},
  'lower_order_final': {'solver_order': 3} | ENDS_NOISY,
  'euler_at_final': {'lower_order_final': False} | ENDS_NOISY,
  'set_alpha_to_one': {'timestep_spacing': 'trailing'},
  **{key: {'use_dynamic_shifting': True} for key in SIZE_SHIFT},
}
"""Without which an argument has no effect."""

NO_EFFECT = {
  ('LCMScheduler', 'timestep_scaling'),  # At the timesteps of a distillation; less is refused.
  # Names of other classes, which these take for their own.
  ('DEISMultistepScheduler', 'solver_type'), ('DEISMultistepScheduler', 'algorithm_type'),
  ('UniPCMultistepScheduler', 'solver_type'),
}


def table_of(kind):
  """Some of the classes after k-diffusion take long to search a long table."""
  short = {'num_train_timesteps': 200}
  return {'table': LINEAR, 'solver': LINEAR, 'sigma': LINEAR | short, 'flow': {}, 'edm': {}}[
    CLASSES[kind].family
  ]


def otherwise(kind, key):
  """(config without, config with a value that is not the default) of one argument."""
  reads = CLASSES[kind].reads
  value = OTHERWISE.get(key)
  if key in ('set_alpha_to_one', 'clip_sample'):
    value = not reads.get(key, False)
  if (kind, key) == ('DEISMultistepScheduler', 'algorithm_type'):
    value = 'dpmsolver++'
  context = {'final_sigmas_type': 'zero'} if 'final_sigmas_type' in reads else {}
  with_it = WITH.get(key, {}) if key not in CLASSES[kind].idle else {}
  return table_of(kind) | context | with_it, {key: value}


def signature(cls):
  return {
    name: argument.default for name, argument in inspect.signature(cls.__init__).parameters.items()
    if name not in ('self', 'args', 'kwargs')
  }


def alike(default, ours):
  return default == ours and (isinstance(default, bool) == isinstance(ours, bool))


def test_every_class_is_read_or_refused_by_name():
  found = {
    name for name in dir(diffusers)
    if inspect.isclass(cls := getattr(diffusers, name)) and name.endswith('Scheduler')
    and (issubclass(cls, SchedulerMixin) or name == 'DPMSolverSDEScheduler')
  }
  assert len(found) > 40 and found > set(CLASSES)
  for name in found - set(CLASSES):
    with pytest.raises(UserError, match=f"here: the scheduler '{name}' is not implemented"):
      read_scheduler({'_class_name': name, **TABLE}, 'here')


@pytest.mark.parametrize('kind', CLASSES)
def test_the_table_has_every_argument_with_its_default(kind):
  spec, arguments = CLASSES[kind], signature(scheduler_class(kind))
  groups = [set(spec.reads), set(spec.only), set(spec.idle), set(spec.hidden)]
  assert sum(map(len, groups)) == len(set().union(*groups))
  assert set().union(*groups[:3]) == set(arguments)
  for key, default in spec.reads.items():
    assert alike(arguments[key], default), key
  for key, allowed in spec.only.items():
    assert alike(arguments[key], allowed[0]), key
  assert all(reason for reason in spec.idle.values())


NOISED = [kind for kind, spec in CLASSES.items() if spec.family not in ('flow', 'edm')]


@pytest.mark.parametrize('kind', NOISED)
def test_tables(kind):
  """Of every argument that the table of noise levels depends on."""
  changes = [{}, *({key: OTHERWISE[key]} for key in TABLE_KEYS if key in CLASSES[kind].reads)]
  for change in changes:
    table = table_of(kind)
    found = read_scheduler({'_class_name': kind, **table, **change}, 'here')
    wanted = make(kind, table | change).alphas_cumprod.numpy()
    np.testing.assert_allclose(Schedule(found.schedule).alpha_bar, wanted, rtol=5e-4, atol=1e-12)
    assert len(changes) > 4 and (not change or not np.array_equal(
      wanted, make(kind, table).alphas_cumprod.numpy()
    ))


DRAWN = {}


def theirs_once(kind, config):
  """Their states in STEPS; contexts are shared by many arguments."""
  name = f'{kind} {sorted(config.items())}'
  if name not in DRAWN:
    DRAWN[name] = theirs(kind, config, STEPS)
  return DRAWN[name]


ARGUMENTS = [
  (kind, key) for kind, spec in CLASSES.items() for key in (*spec.reads, *spec.hidden)
  if spec.family in ('flow', 'edm') or key not in TABLE_KEYS[:4]
]


@pytest.mark.parametrize(('kind', 'key'), ARGUMENTS)
def test_what_is_read_is_drawn(kind, key):
  context, change = otherwise(kind, key)
  changed, plain = (theirs_once(kind, config) for config in (context | change, context))
  assert difference(kind, context | change, STEPS, wanted=changed) < CLOSE
  same = changed.shape == plain.shape and np.abs(changed - plain).max() < 1e-4
  assert same == ((kind, key) in NO_EFFECT)


ONLY = [(kind, key) for kind, spec in CLASSES.items() for key in spec.only]


@pytest.mark.parametrize(('kind', 'key'), ONLY)
def test_what_is_not_read_is_refused_by_name(kind, key):
  _, change = otherwise(kind, key)
  own = {'algorithm_type': 'noise_prediction', 'variance_type': 'learned'}
  change = {key: own.get(key, change[key])}
  with pytest.raises(UserError, match=f'{key}=.*{kind} is not implemented; only'):
    read_scheduler({'_class_name': kind, **change}, 'here')


IDLE = [(kind, key) for kind, spec in CLASSES.items() for key in spec.idle]


@pytest.mark.parametrize(('kind', 'key'), IDLE)
def test_what_has_no_effect_has_none_there(kind, key):
  context, change = otherwise(kind, key)
  np.testing.assert_array_equal(
    theirs(kind, context | change, STEPS), theirs_once(kind, context)
  )
  values = {'_class_name': kind, **context}
  assert read_scheduler(values | change, 'here') == read_scheduler(values, 'here')


# What one argument at a time does not show: counts of steps, orders, ends, and how they meet.
SIGMA = (
  'EulerDiscreteScheduler', 'LMSDiscreteScheduler', 'HeunDiscreteScheduler',
  'KDPM2DiscreteScheduler', 'KDPM2AncestralDiscreteScheduler', 'DPMSolverSDEScheduler',
)
DPM, UNIPC = 'DPMSolverMultistepScheduler', 'UniPCMultistepScheduler'
DEIS, SA = 'DEISMultistepScheduler', 'SASolverScheduler'
LEVELS = [KARRAS, EXPONENTIAL]
OFFSET = {'timestep_spacing': 'leading', 'steps_offset': 1}
TOGETHER = [
  # As published with Stable Diffusion 1 and XL.
  ('PNDMScheduler', TABLE | OFFSET | {'skip_prk_steps': True}, 10),
  ('DDIMScheduler', TABLE | OFFSET | {'clip_sample': False, 'set_alpha_to_one': False}, 10),
  ('EulerDiscreteScheduler', TABLE | OFFSET | KARRAS, 10),
  # Spacings whose steps do not divide the timesteps.
  *(('DDIMScheduler', TABLE | {'timestep_spacing': spacing, 'set_alpha_to_one': clean}, 7)
    for spacing in ('trailing', 'linspace') for clean in (True, False)),
  ('DDPMScheduler', COSINE | {'timestep_spacing': 'trailing', 'clip_sample': False}, 7),
  ('DDPMScheduler', {'variance_type': 'fixed_small_log', 'timestep_spacing': 'linspace'}, 7),
  *(('PNDMScheduler', LINEAR | {'skip_prk_steps': skip, 'timestep_spacing': 'trailing'} | more, 8)
    for skip in (True, False) for more in (V, {'set_alpha_to_one': True})),
  *((kind, {'original_inference_steps': 70, **V}, 4) for kind in ('LCMScheduler', 'TCDScheduler')),
  *((kind, table_of(kind) | levels | {'timestep_spacing': spacing, 'steps_offset': 1}, 4)
    for kind in SIGMA for levels in LEVELS for spacing in ('leading', 'trailing')
    if (kind, levels) != ('KDPM2AncestralDiscreteScheduler', KARRAS)),
  # Steps of 15 and more keep their order to the end.
  *((DPM, TABLE | {'solver_order': order} | end, steps) for order in (2, 3) for steps in (5, 15)
    for end in ({}, ENDS_NOISY, ENDS_NOISY | {'lower_order_final': False, 'euler_at_final': True})),
  *((DPM, TABLE | {'algorithm_type': algorithm, 'solver_type': kind} | ENDS_NOISY, 5)
    for algorithm in ('dpmsolver++', 'sde-dpmsolver++') for kind in ('heun', 'bh2')),
  (DPM, TABLE | {'algorithm_type': 'dpmsolver', 'solver_order': 1} | ENDS_NOISY, 5),
  (DPM, TABLE | {'algorithm_type': 'sde-dpmsolver++', 'solver_order': 1}, 5),
  (DPM, TABLE | {'algorithm_type': 'deis'} | ENDS_NOISY, 5),
  (DPM, COSINE | KARRAS, 5), (DPM, COSINE | {'lambda_min_clipped': -5.1}, 5),
  (DPM, COSINE | {'use_lu_lambdas': True, 'solver_order': 3} | ENDS_NOISY, 5),
  (DPM, LINEAR | {'lambda_min_clipped': -2.0, 'timestep_spacing': 'leading', 'steps_offset': 1}, 5),
  *((DEIS, TABLE | {'solver_order': order} | levels, steps) for order in (1, 3)
    for steps in (5, 15) for levels in ({}, KARRAS)),
  # Grids whose last two levels are equal: the last call corrects alone.
  *((UNIPC, TABLE | {'solver_order': order, 'solver_type': variant} | levels | ENDS_NOISY, 6)
    for order in (1, 2, 3) for variant in ('bh1', 'bh2') for levels in LEVELS),
  (UNIPC, TABLE | KARRAS | ENDS_NOISY | {'sigma_min': 0.1, 'lower_order_final': False}, 6),
  *((SA, TABLE | {'predictor_order': order, 'corrector_order': corrector} | levels, 6)
    for order, corrector in ((1, 2), (3, 4)) for levels in ({}, *LEVELS)),
  (SA, TABLE | EXPONENTIAL | {'lower_order_final': False, 'sigma_min': 0.1}, 6),
  *((kind, TABLE | THRESHOLD | {'prediction_type': prediction}, 5)
    for kind in ('DDIMScheduler', 'DDPMScheduler', DPM, UNIPC)
    for prediction in ('epsilon', 'v_prediction')),
]


@pytest.mark.parametrize(('kind', 'config', 'steps'), TOGETHER)
def test_trajectories(kind, config, steps):
  assert difference(kind, config, steps) < CLOSE


@pytest.mark.parametrize(('kind', 'config', 'steps'), [
  ('DDIMScheduler', {}, 10), ('EulerDiscreteScheduler', {}, 10), ('HeunDiscreteScheduler', {}, 10),
  (DPM, {'solver_order': 3}, 20), (DEIS, {}, 20),
  (UNIPC, KARRAS | ENDS_NOISY, 10), (SA, {}, 10),
])
def test_trajectories_from_a_noised_picture(kind, config, steps):
  """Half of the steps: those of 20 are still not few, and keep their order to the end."""
  config, half = LINEAR | config, steps // 2
  scheduler = make(kind, config)
  scheduler.set_timesteps(steps)
  t = scheduler.timesteps[half * scheduler.order :][:1]
  drawn = ours(kind, config, steps, strength=0.5)
  noised = scheduler.add_noise(torch.tensor(X), torch.tensor(NOISES[-1]), t).numpy()
  wanted = theirs(kind, config, steps, noised, first=half)
  assert len(drawn.states) == half
  alpha, sigma = drawn.first
  found = ours(kind, config, steps, alpha * X + sigma * NOISES[-1], strength=0.5)
  found = scale_of(kind, found)[-1] * found.states[-1]
  assert np.abs(found - wanted[-1]).max() < 1e-4 * np.abs(wanted[-1]).max()


SAMPLE = np.arange(768).reshape(3, 8, 8, 4).transpose(3, 0, 1, 2) / 768
LIKE_DPM = ENDS_NOISY | {'lower_order_final': False}


@pytest.mark.parametrize(('kind', 'config', 'mean', 'within'), [
  (DEIS, {}, 0.23916, 1e-5), (DEIS, V, 0.091, 1e-3),
  (UNIPC, ENDS_NOISY, 0.2464, 1e-3), (UNIPC, ENDS_NOISY | KARRAS, 0.2925, 1e-3),
  (UNIPC, ENDS_NOISY | V, 0.1014, 1e-3), (UNIPC, ENDS_NOISY | V | KARRAS, 0.1966, 1e-3),
  (DPM, LIKE_DPM, 0.3301, 1e-3), (DPM, LIKE_DPM | {'use_lu_lambdas': True} | V, 0.1554, 1e-3),
  (DPM, LIKE_DPM | THRESHOLD, 1.1364, 1e-3),
  ('DDIMScheduler', {}, 172.0067 / 768, 1e-5), ('DDIMScheduler', V, 52.5302 / 768, 1e-5),
  ('PNDMScheduler', {}, 198.1318 / 768, 1e-5), ('PNDMScheduler', V, 67.3986 / 768, 1e-5),
])
def test_values_of_the_tests_of_diffusers(kind, config, mean, within):
  """Ten steps of the usual table; means of absolute values."""
  drawn = ours(kind, LINEAR | config, 10, SAMPLE)
  assert abs(np.abs(drawn.states[-1]).mean() - mean) < within


@pytest.mark.parametrize(('config', 'total'), [
  ({}, 337.3943), (KARRAS, 837.2770), (V, 193.1464),  # In float32 theirs is 837.2555.
])
def test_values_of_sa_solver(config, total):
  """With the noise of torch's generator, 1100 timesteps, and tau for those from 200 to 800."""
  generator = torch.Generator().manual_seed(0)
  noises = [torch.randn(SAMPLE.shape, generator=generator).double().numpy() for _ in range(10)]
  config = LINEAR | config | {'num_train_timesteps': 1100}
  drawn = ours(SA, config, 10, SAMPLE, noises=np.stack(noises))
  assert abs(np.abs(drawn.states[-1]).sum() - total) < 1e-3


WRITTEN = TABLE | {
  'timestep_spacing': 'leading', 'steps_offset': 1, 'skip_prk_steps': True, 'clip_sample': False,
}


@pytest.mark.parametrize('kind', CLASSES)
@pytest.mark.parametrize('more', [
  {}, {'clip_sample': True, 'solver_order': 3, 'use_karras_sigmas': True, 'sigma_min': 0.1} | V,
  {'thresholding': True, 'use_exponential_sigmas': True, 'solver_type': 'heun'} | ENDS_NOISY,
])
def test_what_we_write_is_read_alike_by_both(kind, more):
  def read(scheduler):
    values = dict(scheduler.config) | {'_class_name': type(scheduler).__name__}
    return read_scheduler(values, 'scheduler_config.json')

  refused = {key: False for key in CLASSES[kind].only if key.startswith('use_')}
  if CLASSES[kind].family == 'edm':
    refused |= {'prediction_type': 'epsilon', 'final_sigmas_type': 'zero'}
  first = read(make(kind, WRITTEN | more | refused))
  values = write_scheduler(first)
  assert values['_class_name'] == kind
  assert read(make(kind, {k: v for k, v in values.items() if k != '_class_name'})) == first
