"""What is held while sampling, for every sampler, and RePaint against a Gaussian's conditional."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.diffusion.projection import known_averages, known_places, projected
from diffusion_jax.diffusion.samplers import infos, initial_noise, sampler
from diffusion_jax.diffusion.samplers.resampling import resampled, stacked, stretches
from diffusion_jax.errors import UserError
from tests.diffusion.exact_mixture import of_levels

COVARIANCE = np.array([[1.0, 0.8], [0.8, 1.0]])
KNOWN = 1.5
FREE = np.array([True, False])
"""Of two entries, whose prior is N(0, COVARIANCE), the second is known."""
SLOW = {'annealed_langevin': {'steps': 3}}


@pytest.fixture(autouse=True)
def in_float64():
  with jax.enable_x64(True):
    yield


def denoise(x, alpha, sigma):
  """E[x_0 | x] for x [b 2]."""
  noised = alpha**2 * COVARIANCE + sigma**2 * np.eye(2)
  return alpha * x @ jnp.linalg.solve(noised, COVARIANCE)


def clean(levels):
  """A grid of the variance-preserving process that ends clean."""
  return tuple(
    np.append(part, last) for part, last in zip(of_levels(levels), (1, 0), strict=True)
  )


def start(grid, count):
  x, keys = initial_noise(0, 0, count, (2,))
  return grid[0][0] * KNOWN * ~FREE + grid[1][0] * x, keys


@pytest.mark.parametrize('name', infos())
def test_every_sampler_holds_what_is_known(name):
  """With all free it is the sampler itself; what is known is the picture at the end."""
  grid = clean(np.geomspace(20, 0.05, 6))
  x, keys = start(grid, 4)
  run = sampler(name, **SLOW.get(name, {}))

  @jax.jit
  def sample(free):
    return run(projected(denoise, known_places(KNOWN * jnp.ones(2), free)), x, grid, keys)

  held = sample(FREE)
  np.testing.assert_allclose(held[:, 1], KNOWN, rtol=1e-6)
  plain = jax.jit(lambda: run(denoise, x, grid, keys))()
  np.testing.assert_allclose(sample(FREE | True), plain, rtol=1e-12)
  assert np.ptp(held[:, 0]) > 0


@pytest.mark.parametrize('name', ['ddim', 'dpmpp_2m', 'unipc', 'heun', 'flow_heun', 'lms'])
def test_the_known_part_is_the_picture_at_each_level(name):
  """alpha x_0 + sigma eps, with the noise it began with."""
  grid = clean(np.geomspace(20, 0.05, 6))
  x, _ = start(grid, 3)
  held = projected(denoise, known_places(KNOWN * jnp.ones(2), FREE))
  found = sampler(name)(held, x, grid, None, trajectory=True)
  eps = (x[:, 1] - grid[0][0] * KNOWN) / grid[1][0]
  wanted = found.alphas[:, None] * KNOWN + found.sigmas[:, None] * eps
  np.testing.assert_allclose(found.states[..., 1], wanted, atol=1e-9)


def test_a_learned_variance_stays_and_both_estimates_are_held():
  hold = known_averages(jnp.ones((1, 2, 2, 1)), 2)
  both = lambda x, alpha, sigma: (x, 2 * x)
  x = jnp.arange(4.0).reshape(1, 2, 2, 1)
  (first, second), (other, fraction) = (
    projected(both, hold, variance=variance)(x, 1, 1) for variance in (False, True)
  )
  assert (first.mean(), second.mean(), other.mean()) == (1, 1, 1)
  np.testing.assert_array_equal(first - x, jnp.full_like(x, 1 - x.mean()))
  np.testing.assert_array_equal(fraction, 2 * x)


@pytest.mark.parametrize(('name', 'plain'), [('euler_ancestral', 0.49), ('dpmpp_2m', 0.67)])
def test_resampling_approaches_the_conditional_and_one_pass_does_not(name, plain):
  """Errors of the mean .8 KNOWN and the variance .36 as passes grow, all by one program."""
  grid, count = clean(np.geomspace(50, 0.02, 40)), 4000
  x, keys = start(grid, count)
  held = projected(denoise, known_places(KNOWN * jnp.ones(2), FREE))
  run = jax.jit(lambda grids: resampled(sampler(name), held, x, grids, keys)[:, 0])
  free = [run(stacked(stretches(grid, 5, passes), 192, 8)) for passes in (1, 4, 24)]
  assert run._cache_size() == 1
  means = [0.8 * KNOWN - float(one.mean()) for one in free]
  assert abs(means[0] - plain) < 0.05 and means[1] < 0.6 * means[0] and abs(means[2]) < 0.1
  variances = [abs(float(one.var()) - 0.36) for one in free]
  assert variances[2] < 0.07 < variances[0]


def test_stretches_once_are_the_sampler_itself():
  """Of one call a step, and no memory of earlier ones."""
  grid = clean(np.geomspace(20, 0.05, 7))
  x, keys = start(grid, 3)
  once = resampled(sampler('ddim'), denoise, x, stacked(stretches(grid, 3, 1), 5, 4), keys)
  np.testing.assert_allclose(once, sampler('ddim')(denoise, x, grid, None), rtol=1e-12)


@pytest.mark.parametrize(('jump', 'repeats', 'said'), [
  (6, 2, 'choose a resample_jump below them'), (1, 100_000, 'choose fewer repeats'),
])
def test_what_repeats_nothing_or_too_much_is_refused(jump, repeats, said):
  with pytest.raises(UserError, match=said):
    stretches(clean(np.geomspace(20, 0.05, 6)), jump, repeats)
