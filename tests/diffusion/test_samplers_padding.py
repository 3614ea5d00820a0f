"""A grid padded with its last pair gives what the grid itself gives, at no call more."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.diffusion.samplers import SAMPLERS, initial_noise, padded, part_way, sampler
from tests.diffusion.exact_mixture import denoise, of_levels

QUICK = {'annealed_langevin': {'steps': 2}, 'restart': {'steps': 2, 'repeats': 1}}
# Samplers that look at the number of steps, at the grid's end or at whole stretches of it only with
# these options.
OTHERS = {
  'heun_churn': {'s_tmin': 0.0}, 'euler': {'s_churn': 1.5}, 'dpm2': {'s_churn': 1.5},
  'probability_flow': {'rtol': 1e-7, 'atol': 1e-7}, 'sa_solver': {'low': 0.0, 'high': np.inf},
}
CLEAN = of_levels([np.inf, 6.0, 2.0, 0.7, 0.2, 0.0], 'flow')
CLEAN = (CLEAN[0].at[0].set(0.0), CLEAN[1].at[0].set(1.0))
NOISY = of_levels([8.0, 2.0, 0.8, 0.3, 0.1], 'vp')
STEPS = 5


@pytest.mark.parametrize('name', SAMPLERS)
def test_padding_changes_nothing(name):
  """On a grid from pure noise to clean, on one that ends at some noise, and on a part."""
  noise, keys = initial_noise(3, 0, 2, (2, 2, 2))
  draw = sampler(name, **{**QUICK.get(name, {}), **OTHERS.get(name, {})})
  calls = []

  def counted(x, alpha, sigma):
    jax.debug.callback(lambda: calls.append(1))
    return denoise(x, alpha, sigma).astype(x.dtype)

  @jax.jit
  def run(grid, noise):
    return draw(counted, noise, grid, keys)

  def counting(grid):
    calls.clear()
    out = np.asarray(run(grid, noise))
    jax.effects_barrier()
    return out, len(calls)

  for grid in (CLEAN, NOISY, part_way(CLEAN, 0.6)):
    grid = tuple(part.astype(jnp.float32) for part in grid)
    plain, more = counting(grid), counting(padded(grid, STEPS + 3))
    np.testing.assert_allclose(more[0], plain[0], rtol=1e-5, atol=1e-5)
    assert more[1] == plain[1]
  assert run._cache_size() == 4
