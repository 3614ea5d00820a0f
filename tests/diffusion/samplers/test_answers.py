"""Single samplers against closed forms, and against each other where theory says they are equal."""

import types
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.diffusion.samplers import (
  infos,
  initial_noise,
  part_way,
  sampler,
  sampling_grid,
)
from tests.diffusion.exact_mixture import VARIANCE, denoise, gaussian, geometric, of_levels

SAMPLERS = infos()

ALPHA_BAR = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
LINEAR = types.SimpleNamespace(alphas=np.sqrt(ALPHA_BAR), sigmas=np.sqrt(1 - ALPHA_BAR))
unit = lambda x, a, s: a * x / (a**2 + s**2)  # Exact for data N(0, 1).


@pytest.fixture(autouse=True)
def in_float64():
  with jax.enable_x64(True):
    yield


def affine(function, grid, draws, denoiser=gaussian):
  """(a, b [draws]) of the sample a x_T + sum_k b_k z_k, from one run of a batch."""
  probe = jnp.eye(draws + 1)[:, :, None, None, None]
  run = lambda probe, grid: function(
    denoiser, probe[:, 0], grid, lambda index, like: probe[:, index + 1]
  )
  out = jax.jit(run)(probe, grid).reshape(-1)
  return float(out[0]), np.asarray(out[1:])


@pytest.mark.parametrize('steps,wanted', [(10, 0.831696), (50, 0.964079), (1000, 0.998124)])
def test_ddim_amplification(steps, wanted):
  grid = sampling_grid(LINEAR, steps, 'leading')
  scale, _ = affine(sampler('ddim'), grid, 0, unit)
  assert abs(scale - wanted) < 1e-6


@pytest.mark.parametrize('name,wanted', [('ddpm', 0.991067), ('ddpm_large', 0.9999)])
def test_ddpm_output_variance(name, wanted):
  scale, noise = affine(sampler(name), sampling_grid(LINEAR, 1000), 1000, unit)
  assert abs(scale**2 + (noise**2).sum() - wanted) < 1e-6


@pytest.mark.parametrize('fraction,name', [(0.0, 'ddpm'), (1.0, 'ddpm_large')])
def test_learned_variance_runs_from_the_small_to_the_large(fraction, name):
  grid = sampling_grid(LINEAR, 5)
  with_fraction = lambda x, a, s: (unit(x, a, s), jnp.full_like(x, fraction))
  learned = affine(sampler('ddpm', variance='learned'), grid, 5, with_fraction)
  for found, wanted in zip(learned, affine(sampler(name), grid, 5, unit), strict=True):
    np.testing.assert_allclose(found, wanted, rtol=1e-12)


def test_equal_samplers_are_equal():
  """What the docstrings say is the same, is: for any denoiser, hence for its affine map."""
  grid = of_levels([5.0, 2.0, 0.7, 0.1, 0.0], 'flow')
  for one, other in (
    (sampler('ddpm'), sampler('euler_ancestral')),
    (sampler('euler'), sampler('ddim')),
    (sampler('tcd', gamma=0.0), sampler('ddim')),
    (sampler('tcd', gamma=1.0), sampler('lcm')),
    (sampler('dpm2_ancestral', eta=0.0), sampler('dpm2')),
    (sampler('dpmpp_2m_sde', eta=0.0), sampler('dpmpp_2m')),
  ):
    for found, wanted in zip(affine(one, grid, 8), affine(other, grid, 8), strict=True):
      np.testing.assert_allclose(found, wanted, rtol=1e-12, atol=1e-14)


STOCHASTIC = [
  name for name, info in SAMPLERS.items()
  if info.stochastic and info.order and name != 'predictor_corrector'
]


@pytest.mark.parametrize('name', STOCHASTIC)
def test_variance_converges_with_the_order_of_the_table(name):
  """Of Gaussian data, by propagating the affine map."""
  def error(steps):
    grid = geometric(80.0, 0.05, steps)
    options = {'steps': steps // 5} if name == 'restart' else {}
    scale, noise = affine(sampler(name, **options), grid, 2 * steps)
    start, end = (VARIANCE * grid[0][i] ** 2 + grid[1][i] ** 2 for i in (0, -1))
    return abs(scale**2 * start + (noise**2).sum() - end)

  measured = np.log2(error(60) / error(120))
  assert abs(measured - SAMPLERS[name].order) < 0.25


def test_langevin_dynamics_settle_at_their_closed_form():
  """x' = (1 - d / v) x + sqrt(2 d) z has the stationary variance v / (1 - d / (2 v))."""
  level, steps = 0.8, 60
  function = sampler('annealed_langevin', step_size=0.3, steps=steps)
  scale, noise = affine(function, of_levels([level, level / 2], 've'), steps + 1)
  size, v = 0.15 * level**2, VARIANCE + level**2
  keep = 1 - size / v
  np.testing.assert_allclose(scale, keep**steps, rtol=1e-12)
  wanted = 2 * size * (1 - keep ** (2 * steps)) / (1 - keep**2)
  np.testing.assert_allclose((noise**2).sum(), wanted, rtol=1e-12)
  np.testing.assert_allclose(wanted, v / (1 - size / (2 * v)), rtol=1e-3)


def test_predictor_corrector_has_the_variance_of_the_data():
  noise, keys = initial_noise(0, 0, 1, (64, 64, 2))
  grid = of_levels(np.append(np.geomspace(50, 0.01, 60), 0.0))
  out = jax.jit(sampler('predictor_corrector'), static_argnums=0)(gaussian, noise, grid, keys)
  np.testing.assert_allclose(out.std(), VARIANCE**0.5, rtol=0.06)


def test_euler_maruyama_is_the_chain_of_ddpm():
  """One step by hand for VP with beta = 3 in time."""
  process = lambda t: (jnp.exp(-1.5 * t), jnp.sqrt(1 - jnp.exp(-3 * t)))
  grid = process(jnp.array([0.9, 0.8]))
  a, s, beta = float(grid[0][0]), float(grid[1][0]), 1 - np.exp(-3 * 0.1)
  slope = (a * gaussian(1.0, a, s) - 1) / s**2
  scale, noise = affine(sampler('euler_maruyama'), grid, 1)
  np.testing.assert_allclose(scale, 2 - np.sqrt(1 - beta) + beta * slope, rtol=1e-12)
  np.testing.assert_allclose(noise, [np.sqrt(beta)], rtol=1e-12)


def test_restart_goes_back_up():
  levels = np.array([20.0, 4.0, 1.0, 0.3, 0.12, 0.05, 0.0])
  function = sampler('restart', low=0.1, high=2.0, steps=2, repeats=2)
  out = jax.jit(partial(function, gaussian, trajectory=True, keys=lambda i, like: like * 0 + 0.1))(
    x=jnp.ones((1, 1, 1, 1)), grid=of_levels(levels)
  )
  middle = ((2.0 ** (1 / 7) + 0.12 ** (1 / 7)) / 2) ** 7
  wanted = [4.0, 1.0, 0.3, 0.12, middle, 0.12, middle, 0.12, 0.05, 0.0]
  np.testing.assert_allclose(out.sigmas / out.alphas, wanted, rtol=1e-12)
  np.testing.assert_allclose(out.alphas**2 + out.sigmas**2, 1, rtol=1e-12)


def test_part_way_continues_a_trajectory():
  """Image-to-image: from the state at a pair, the rest of the grid gives the rest of the way."""
  grid = of_levels([9.0, 4.0, 1.5, 0.6, 0.2, 0.0])
  x = jnp.array([-1.1, 0.3]).reshape(1, 1, 1, 2)
  for name in ('ddim', 'heun', 'dpm2', 'flow_heun'):
    run = jax.jit(partial(sampler(name), denoise, keys=None, trajectory=True))
    out = run(x=x, grid=grid)
    rest = run(x=out.states[1], grid=part_way(grid, 0.6)).sample
    np.testing.assert_allclose(rest, out.sample, rtol=1e-12)
    np.testing.assert_allclose(out.x0[0], denoise(x, grid[0][0], grid[1][0]), rtol=1e-12)


def test_other_precision_than_the_grid_is_promoted():
  grid = tuple(part.astype(jnp.float32) for part in of_levels([9.0, 1.0, 0.0]))
  run = lambda dtype: jax.eval_shape(
    lambda x, grid: sampler('dpmpp_2m')(gaussian, x, grid, None), jnp.ones((1, 1, 1, 1), dtype),
    grid,
  )
  assert run(jnp.bfloat16).dtype == jnp.float32
  assert run(jnp.float64).dtype == jnp.float64
