"""scheduler_config.json: the levels that a scheduler of diffusers visits, and whole trajectories.

diffusers' tables are float32; noise levels agree within what that allows.
"""

import inspect

import diffusers
import jax
import numpy as np
import pytest
import torch

from diffusion_jax.diffusion.samplers import sampler, sampling_grid
from diffusion_jax.diffusion.schedules import Schedule
from diffusion_jax.io.published.scheduler import CLASSES, read_scheduler
from diffusion_jax.io.published.scheduler_writing import write_scheduler
from tests.diffusion import exact_mixture
from tests.parity.test_parity_samplers_diffusers import denoise

pytestmark = pytest.mark.filterwarnings('ignore::DeprecationWarning')  # Numpy's, of the schedulers.

# As published with Stable Diffusion 1, 2.1 and XL.
TABLE = dict(
  num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule='scaled_linear',
  trained_betas=None, prediction_type='epsilon',
)
SD1 = dict(TABLE, clip_sample=False, set_alpha_to_one=False, steps_offset=1, skip_prk_steps=True)
SDXL = dict(TABLE, timestep_spacing='leading', steps_offset=1, interpolation_type='linear',
            use_karras_sigmas=False, sample_max_value=1.0, clip_sample=False, skip_prk_steps=True)
SHORT = TABLE | {'num_train_timesteps': 100}  # Some classes take long to search a longer table.
SHAPE, STEPS = (2, 1, 1, 2), 10
X = np.random.default_rng(0).standard_normal(SHAPE).astype(np.float32)


def ours_of(scheduler):
  """Our reading of a scheduler, by way of the file it would write."""
  values = dict(scheduler.config) | {'_class_name': type(scheduler).__name__}
  return read_scheduler(values, 'scheduler_config.json')


def grid_of(found, steps=STEPS):
  with jax.enable_x64(True):
    return tuple(
      map(np.asarray, sampling_grid(Schedule(found.schedule), steps, found.spacing, **found.grid))
    )


def trajectory(found):
  draw = sampler(found.sampler, **found.options)
  grid = tuple(np.asarray(part, np.float32) for part in grid_of(found))
  run = lambda x: draw(exact_mixture.denoise, x, grid, lambda i, x: x, trajectory=True).states
  return np.asarray(jax.jit(run)(X))


def eps(scheduler, x, t):
  alpha_bar = scheduler.alphas_cumprod[int(t)]
  a, s = alpha_bar**0.5, (1 - alpha_bar) ** 0.5
  return ((x - a * denoise(x.double(), a.double(), s.double())) / s).float()


@pytest.mark.parametrize('kind', ['DDIMScheduler', 'PNDMScheduler'])
@pytest.mark.parametrize('changes', [{}, {'set_alpha_to_one': True}, {'steps_offset': 0}])
def test_ten_steps_with_the_config_of_stable_diffusion_1(kind, changes):
  scheduler = getattr(diffusers, kind).from_config(SD1 | changes)
  scheduler.set_timesteps(STEPS)
  x, states = torch.tensor(X), []
  for t in scheduler.timesteps:
    x = scheduler.step(eps(scheduler, x, t), t, x).prev_sample
    states.append(x.numpy())
  states = states[1:] if kind == 'PNDMScheduler' else states  # Its first step has two calls.
  found = ours_of(scheduler)
  assert found.sampler == {'DDIMScheduler': 'ddim', 'PNDMScheduler': 'plms'}[kind]
  assert np.abs(trajectory(found) - np.stack(states)).max() < 1e-5


def test_ten_euler_steps_with_the_config_of_xl():
  scheduler = diffusers.EulerDiscreteScheduler.from_config(SDXL)
  scheduler.set_timesteps(STEPS)
  alphas, _ = grid_of(ours_of(scheduler))
  # Its states are those of variance-exploding noise.
  x, states = torch.tensor(X / alphas[0].astype(np.float32)), []
  for i, t in enumerate(scheduler.timesteps):
    level = scheduler.sigmas[i]
    eps = ((x - denoise(x.double(), 1.0, level.double())) / level).float()
    x = scheduler.step(eps, t, x).prev_sample
    states.append(x.numpy() * alphas[i + 1])
  assert np.abs(trajectory(ours_of(scheduler)) - np.stack(states)).max() < 1e-5


WITHOUT_TORCHSDE = [name for name in CLASSES if name != 'DPMSolverSDEScheduler']
CHANGES = [
  {'timestep_spacing': 'leading', 'steps_offset': 1}, {'timestep_spacing': 'trailing'},
  {'timestep_spacing': 'linspace'}, {'use_karras_sigmas': True}, {'use_exponential_sigmas': True},
  {'timestep_spacing': 'trailing', 'final_sigmas_type': 'sigma_min'},
]
LEVELS = [
  (kind, changes) for kind in WITHOUT_TORCHSDE for changes in CHANGES
  if CLASSES[kind].family in ('sigma', 'solver')
  and changes.keys() <= inspect.signature(getattr(diffusers, kind)).parameters.keys()
]


@pytest.mark.parametrize(('kind', 'changes'), LEVELS)
def test_noise_levels(kind, changes):
  cls = getattr(diffusers, kind)
  scheduler = cls.from_config(SHORT | changes)
  scheduler.set_timesteps(STEPS)
  wanted = scheduler.sigmas.double().numpy()
  if scheduler.order == 2:  # These hold most levels twice.
    wanted = np.concatenate([wanted[:1], wanted[1::2], wanted[-1:] * 0])[: STEPS + 1]
  alphas, sigmas = grid_of(ours_of(scheduler))
  np.testing.assert_allclose(sigmas / alphas, wanted, rtol=2e-4, atol=1e-7)


@pytest.mark.parametrize('kind', ['FlowMatchEulerDiscreteScheduler',
                                  'FlowMatchHeunDiscreteScheduler'])
def test_noise_levels_of_flows(kind):
  scheduler = getattr(diffusers, kind)()
  scheduler.set_timesteps(STEPS)
  wanted = scheduler.sigmas.numpy()
  wanted = wanted if len(wanted) == STEPS + 1 else np.append(wanted[0], wanted[1::2])
  alphas, sigmas = grid_of(ours_of(scheduler))
  np.testing.assert_allclose(sigmas, wanted, atol=1e-6)
  np.testing.assert_allclose(alphas, 1 - wanted, atol=1e-6)


@pytest.mark.parametrize('kind', WITHOUT_TORCHSDE)
def test_what_we_write_is_read_alike_by_both(kind):
  cls = getattr(diffusers, kind)
  first = ours_of(cls.from_config(SDXL | SHORT | {'clip_sample': kind.startswith('DD')}))
  values = write_scheduler(first)
  assert values['_class_name'] == kind
  assert ours_of(cls.from_config(values)) == first
