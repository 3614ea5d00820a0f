"""Every sampler on Gaussian data: on all processes, from pure noise and from part way."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.diffusion.samplers import infos, initial_noise, sampler
from tests.diffusion.exact_mixture import denoise, gaussian, of_levels, quantile_map

SAMPLERS = infos()

ADAPTIVE = ('dpm_adaptive', 'probability_flow')
LINEAR = [name for name in SAMPLERS if name not in (*ADAPTIVE, 'predictor_corrector', 'lcm', 'tcd')]
# The same in y = x / alpha on every process; the others discretise another time or scale.
IN_LEVELS = [
  name for name in LINEAR
  if name not in ('flow_heun', 'euler_maruyama', 'ddpm_large', 'annealed_langevin')
]
# Relative error allowed in the standard deviation after STEPS steps, where not 0.1.
COARSE = dict.fromkeys(('ddpm', 'ddpm_large', 'euler_ancestral', 'annealed_langevin'), 0.2)
COARSE['euler_maruyama'] = 0.25
STEPS, LANGEVIN = 24, 20


def affine(name, grid):
  """[n 1 + m]: after each step x = a x_T + sum_k b_k z_k for Gaussian data; a, then the b.

  One run of a batch whose first image is x_T = 1 without noise, the others 0 with one draw of 1.
  """
  options = {'steps': LANGEVIN} if name == 'annealed_langevin' else {}
  draws = (LANGEVIN + 1) * STEPS if options else 2 * STEPS
  probe = jnp.eye(draws + 1)[:, :, None, None, None]
  noise = lambda index, like: probe[:, index + 1]
  out = sampler(name, **options)(gaussian, probe[:, 0], grid, noise, trajectory=True)
  return out.states.squeeze(), out.sample.squeeze(), out


@pytest.mark.parametrize('name', LINEAR)
def test_variance_on_every_process_part_way_and_from_pure_noise(name):
  """The exact output variance, from the affine map itself; data are N(0, 0.25)."""
  levels = np.append(np.geomspace(80, 0.02, STEPS), 0.0)
  tolerance = COARSE.get(name, 0.1)
  with jax.enable_x64(True):
    run = jax.jit(partial(affine, name))
    grids = {kind: of_levels(levels, kind) for kind in ('ve', 'vp', 'flow')}
    grids['part'] = of_levels(np.append(np.geomspace(3, 0.02, STEPS), 0.0))
    grids['zero'] = tuple(  # From pure noise, alpha = 0.
      part.at[0].set(first) for part, first in zip(grids['vp'], (0.0, 1.0), strict=True)
    )
    maps = {}
    for kind, grid in grids.items():
      rows, sample, out = run(grid)
      np.testing.assert_array_equal(rows[-1], sample)
      assert rows.dtype == out.x0.dtype == jnp.float64 and out.x0.shape == out.states.shape
      assert np.isfinite(rows).all() and np.isfinite(out.x0).all()
      assert out.alphas[-1] == 1 and out.sigmas[-1] == 0
      start = grid[0][0] ** 2 * 0.25 + grid[1][0] ** 2
      variance = sample[0] ** 2 * start + (sample[1:] ** 2).sum()
      np.testing.assert_allclose(np.sqrt(variance), 0.5, rtol=tolerance, err_msg=kind)
      maps[kind] = sample.at[0].multiply(grid[0][0])
    if name in IN_LEVELS:  # One map in y = x / alpha.
      for kind in ('vp', 'flow'):
        np.testing.assert_allclose(maps[kind], maps['ve'], rtol=1e-9, atol=1e-12)



@pytest.mark.parametrize('name', ['ddim', 'heun', 'lms', 'unipc', 'euler_maruyama', 'dpmpp_sde'])
def test_gradients_are_finite_from_pure_noise_to_clean(name):
  """Through steps from alpha = 0 and to sigma = 0, too."""
  levels = np.array([9.0, 2.0, 0.5, 0.1, 0.0])
  alphas, sigmas = of_levels(levels)
  grid = jnp.asarray(alphas).at[0].set(0), jnp.asarray(sigmas).at[0].set(1)
  noise, keys = initial_noise(0, 0, 2, (2, 2, 2))
  loss = lambda x: (sampler(name)(denoise, x, grid, keys) ** 2).sum()
  gradient = jax.jit(jax.grad(loss))(noise)
  assert np.isfinite(gradient).all()
  # What is left of the first noise: nothing where a step from alpha = 0 draws all of it afresh.
  assert (np.abs(gradient).max() > 1e-3) != SAMPLERS[name].stochastic


@pytest.mark.parametrize('name', ADAPTIVE)
@pytest.mark.parametrize('zero,clean', [(False, False), (True, True)])
def test_adaptive_solvers_end_where_the_exact_flow_does(name, zero, clean):
  """From a noise level to another; from pure noise to clean data."""
  with jax.enable_x64(True):
    levels = np.append(np.geomspace(300 if zero else 30, 0.01, 4), [0.0] * clean)
    grid = of_levels(levels)
    if zero:
      grid = tuple(jnp.append(first, part) for part, first in zip(grid, (0.0, 1.0), strict=True))
    options = {'rtol': 1e-6, 'atol': 1e-8} if name == 'dpm_adaptive' else {}
    function = partial(sampler(name, **options), denoise, keys=None, trajectory=True)
    x = jnp.array([-1.3, -0.9, 0.4, 0.2, 1.1, 1.7]).reshape(3, 1, 1, 2)
    out = jax.tree.map(np.asarray, jax.jit(function)(x=x, grid=grid))
    x, pairs = np.asarray(x), [(float(a), float(s)) for a, s in zip(*grid, strict=True)]
  wanted = quantile_map(x, pairs[0], pairs[-1])
  np.testing.assert_allclose(out.sample, wanted, atol=4e-4 if clean else 5e-5)
  np.testing.assert_array_equal(out.states[-1], out.sample)
  assert (out.alphas[-1], out.sigmas[-1]) == pairs[-1]
  for state, alpha, sigma in zip(out.states, out.alphas, out.sigmas, strict=True):
    at_pair = quantile_map(x, pairs[0], (float(alpha), float(sigma)))
    np.testing.assert_allclose(state, at_pair, atol=2e-3)


def test_one_step_from_pure_noise_to_clean_is_the_mean_of_the_data():
  grid = jnp.array([0.0, 1.0]), jnp.array([1.0, 0.0])
  noise, keys = initial_noise(0, 0, 2, (1, 1, 2))
  mean = [0.0, 0.3 * -1.0 + 0.7 * 0.8]
  for name in ('ddim', 'unipc', 'lms', *ADAPTIVE):
    out = jax.jit(partial(sampler(name), denoise))(noise, grid, keys)
    np.testing.assert_allclose(out, np.broadcast_to(mean, out.shape), atol=1e-6, err_msg=name)
