"""Errors and paths of samplers against the exact flow, and orders as slopes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.gallery import mixtures
from benchmarks.gallery.mixtures import (
  FIVE_MODES,
  GAUSSIAN,
  TWO_MODES,
  cumulative,
  errors,
  field,
  going_on,
  paths,
  quantiles,
)
from diffusion_jax.diffusion import processes
from diffusion_jax.diffusion.samplers import infos, process_grid, sampler
from diffusion_jax.errors import UserError

SAMPLERS = infos()


@pytest.mark.parametrize(('name', 'slope', 'calls'), [
  ('ddim', 1, 1), ('heun', 2, 2), ('dpmpp_2m', 2, 1), ('lms', 4, 1), ('ddpm', 1, 1),
  ('dpmpp_2m_sde', 2, 1),
])
def test_errors_fall_with_the_order(name, slope, calls):
  found = errors(name, (128, 256))
  assert [used for used, _ in found] == [128, 256] and SAMPLERS[name].order == slope
  (_, coarse), (_, fine) = found
  assert np.log2(coarse / fine) == pytest.approx(slope, abs=0.3)


def test_the_error_of_one_euler_step_is_the_one_computed_by_hand():
  """x_0 of the start, carried to the last level, against the quantiles of the data there."""
  (alpha, last_alpha), (sigma, last_sigma) = going_on(1, 1)
  shares = (np.arange(mixtures.POINTS) + 0.5) / mixtures.POINTS
  x = quantiles(TWO_MODES, shares, alpha, sigma)
  with jax.enable_x64(True):
    x0 = np.asarray(TWO_MODES.denoise(jnp.asarray(x).reshape(-1, 1, 1, 1), alpha, sigma)).ravel()
  out = last_alpha * x0 + last_sigma * (x - alpha * x0) / sigma
  wanted = np.abs(out - quantiles(TWO_MODES, shares, last_alpha, last_sigma)).mean()
  assert errors('ddim', (1,)) == [(1, pytest.approx(wanted, rel=1e-12))]


def test_the_deviation_of_one_ancestral_step_is_the_one_computed_by_hand():
  """x_s = mean(x, x_0) + noise of the posterior's variance (Ho et al. 2020, eq. 7)."""
  (a, a_next), (s, s_next) = going_on(1, 1)
  variance = float(GAUSSIAN.variances[0])
  x0 = a * variance / (a**2 * variance + s**2)
  added = s**2 - (a / a_next * s_next) ** 2
  gain = (a / a_next * s_next**2 + a_next * added * x0) / s**2
  out = gain**2 * (a**2 * variance + s**2) + added * s_next**2 / s**2
  wanted = abs(np.sqrt(out) - np.sqrt(a_next**2 * variance + s_next**2))
  assert errors('ddpm', (1,)) == [(1, pytest.approx(wanted, rel=1e-9))]


def test_calls_are_those_made_and_steps_beyond_the_last_level_change_nothing():
  made = []

  def counted(x, alpha, sigma):
    jax.debug.callback(lambda: made.append(1))
    return TWO_MODES.denoise(x, alpha, sigma)

  (used, error), _ = errors('plms', (8, 12))
  shares = (np.arange(mixtures.POINTS) + 0.5) / mixtures.POINTS
  alphas, sigmas = going_on(8, 8)
  with jax.enable_x64(True):
    x = jnp.asarray(quantiles(TWO_MODES, shares, alphas[0], sigmas[0])).reshape(-1, 1, 1, 1)
    out = jax.jit(lambda x, grid: sampler('plms')(counted, x, grid, None))(x, (alphas, sigmas))
    jax.effects_barrier()
  wanted = quantiles(TWO_MODES, shares, alphas[-1], sigmas[-1])
  assert used == len(made) == 9
  assert error == pytest.approx(np.abs(np.ravel(out) - wanted).mean(), rel=1e-9)


def test_churn_has_an_error_where_some_levels_get_none():
  """Above noise level 50 nothing is added: a difference that rounds below 0 would be NaN here."""
  (_, error), = errors('heun_churn', (32,))
  assert 0.01 < error < 0.2


def test_quantiles_invert_the_cumulative_distribution():
  shares = np.array([1e-3, 0.2, 0.4, 0.5, 0.999])
  found = quantiles(TWO_MODES, shares, 0.8, 0.1)
  np.testing.assert_allclose(cumulative(TWO_MODES, found, 0.8, 0.1), shares, atol=1e-14)


def test_paths_begin_as_noise_and_end_where_the_flow_does():
  """The flow from a much finer grid and another method."""
  found = paths('heun', steps=200, count=6)
  assert found.states.shape == (201, 6, 2) and found.alphas.shape == found.sigmas.shape == (201,)
  assert found.alphas[0] == pytest.approx(0, abs=1e-9) and found.sigmas[-1] == 0
  with jax.enable_x64(True):
    grid = process_grid(processes.cosine(), 1000)
    start = jnp.asarray(found.states[0]).reshape(6, 1, 1, 2)
    run = jax.jit(lambda x: sampler('dpmpp_2m')(FIVE_MODES.denoise, x, grid, None))
    wanted = np.asarray(run(start)).reshape(6, 2)
  np.testing.assert_allclose(found.states[-1], wanted, atol=0.01)
  assert np.abs(found.states[-1] - found.states[0]).max() > 0.5
  np.testing.assert_array_equal(found.states[0], paths('ddpm', steps=2, count=6).states[0])


def test_the_field_is_the_gradient_of_the_log_density():
  points = np.array([[[0.3, -0.2], [1.5, 1.0]]])
  _, score = field(points, 0.9, 0.4)
  step = 1e-5
  for axis in (0, 1):
    shift = step * np.eye(2)[axis]
    up, down = (np.log(field(points + sign * shift, 0.9, 0.4)[0]) for sign in (1, -1))
    np.testing.assert_allclose(score[..., axis], (up - down) / (2 * step), rtol=1e-6)


@pytest.mark.parametrize('name', ['dpm_adaptive', 'lcm', 'nobody'])
def test_samplers_without_an_order_have_no_errors(name):
  with pytest.raises(UserError, match=name):
    errors(name, (8,))
