"""One key, one use: losses, samplers and likelihoods draw nothing twice."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.diffusion import processes
from diffusion_jax.diffusion.bounds import continuous_bound, discrete_bound
from diffusion_jax.diffusion.likelihood import flow_likelihood
from diffusion_jax.diffusion.noise import NoiseSchedule, ScheduleConfig
from diffusion_jax.diffusion.objective import LOSSES, TIMES, Objective, ObjectiveConfig
from diffusion_jax.diffusion.samplers import infos, initial_noise, sampler
from tests.diffusion.exact_mixture import denoise, geometric
from tests.diffusion.samplers.test_samplers import QUICK

SAMPLERS = infos()

TABLE = NoiseSchedule.of(ScheduleConfig(num_train_timesteps=20))
KARRAS = NoiseSchedule(processes.karras())
NOISY = {'offset_noise': 0.1, 'input_perturbation': 0.1}


@pytest.fixture(autouse=True)
def keys_are_watched():
  with jax.debug_key_reuse(True):
    yield


def test_a_second_use_of_a_key_is_seen():
  """What the other tests rely on."""
  twice = lambda key: jax.random.normal(key) + jax.random.uniform(key)
  with pytest.raises(jax.errors.KeyReuseError):
    jax.jit(twice)(jax.random.key(0))


def _losses(levels, **values):
  objective = Objective(ObjectiveConfig(**NOISY, **values), levels)
  channels = 2 if values.get('learned_variance') else 1
  network = lambda x, label: jnp.concatenate([0.3 * x] * channels, axis=-1)
  run = lambda key: objective.losses(network, jnp.ones((4, 2, 2, 1)), key, objective.history())
  return jax.jit(run)(jax.random.key(1)).loss


@pytest.mark.parametrize('stratified', [False, True])
@pytest.mark.parametrize('loss', LOSSES)
def test_losses_use_each_key_once(loss, stratified):
  more = {'learned_variance': True} if loss == 'hybrid' else {}
  assert np.isfinite(_losses(TABLE, loss=loss, stratified=stratified, **more)).all()


@pytest.mark.parametrize('times', TIMES)
def test_distributions_of_times_use_each_key_once(times):
  assert np.isfinite(_losses(TABLE if times == 'importance' else KARRAS, times=times)).all()


@pytest.mark.parametrize('name', SAMPLERS)
def test_samplers_use_each_key_once_and_no_number_of_it_twice(name):
  """Every draw of an image is its key folded with a number, which no check of jax's counts."""
  noise, keys = initial_noise(3, 0, 2, (2, 2, 2))
  draw, drawn = sampler(name, **QUICK.get(name, {})), collections.Counter()
  grid = tuple(part.astype(jnp.float32) for part in geometric(8.0, 0.05, 5))

  def counted(index, like):
    jax.debug.callback(lambda i: drawn.update([int(i)]), index)
    return jnp.sin(7.0 * index + jnp.arange(like.size)).reshape(like.shape).astype(like.dtype)

  run = jax.jit(lambda x, keys: draw(denoise, x, grid, keys).astype(x.dtype))
  assert np.isfinite(run(noise, keys)).all()
  jax.block_until_ready(jax.jit(lambda x: draw(denoise, x, grid, counted))(noise))
  jax.effects_barrier()
  assert bool(drawn) >= SAMPLERS[name].stochastic
  assert not [index for index, count in drawn.items() if count > 1]


@pytest.mark.parametrize('trace', ['rademacher', 'gaussian'])
def test_likelihoods_use_each_key_once(trace):
  schedule = TABLE.table
  x = jnp.ones((2, 2, 2, 1))
  keys = [jax.random.split(jax.random.key(seed), 2) for seed in range(3)]
  shrink = lambda x, alpha, sigma: alpha * x / (alpha**2 + sigma**2)

  def run(x, first, second, third):
    return (
      discrete_bound(shrink, x, schedule.alphas, schedule.sigmas, first, draws=4).total,
      continuous_bound(shrink, x, KARRAS.process, second, draws=4, t_min=0.01).total,
      flow_likelihood(
        shrink, x, KARRAS.process, third, trace=trace, probes=2, solver='heun', steps=2,
        t_min=0.01, start_noise=True,
      ).bits,
    )

  assert all(np.isfinite(part).all() for part in jax.jit(run)(x, *keys))
