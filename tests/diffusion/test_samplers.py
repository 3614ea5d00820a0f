"""Samplers on Gaussian data, where the exact denoiser and the exact output are known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.diffusion.guidance import classifier_free
from diffusion_jax.diffusion.samplers import SAMPLERS, _noise, ddpm, initial_noise, sampler
from diffusion_jax.diffusion.schedules import Schedule, ScheduleConfig, sampling_grid
from diffusion_jax.errors import UserError

LINEAR = Schedule(ScheduleConfig('linear', 1e-4, 0.02))


def gaussian(variance):
  """Exact E[x_0 | x] for data N(0, variance)."""
  return lambda x, a, s: a * variance * x / (a**2 * variance + s**2)


@pytest.mark.parametrize('steps,wanted', [(10, 0.831696), (50, 0.964079), (1000, 0.998124)])
def test_ddim_amplification(steps, wanted):
  grid = sampling_grid(LINEAR, steps, 'leading')
  out = SAMPLERS['ddim'](gaussian(1.0), jnp.ones((1, 1, 1, 1)), grid, None)
  np.testing.assert_allclose(out.squeeze(), wanted, atol=2e-5)


def test_ddpm_output_variance_is_the_closed_form():
  """Each step is x -> a x + b z; the variance over 1000 steps follows exactly."""
  alphas, sigmas = sampling_grid(LINEAR, 1000)
  keys = jax.random.split(jax.random.key(0), 1)
  z = _noise(keys, jnp.array(0), jnp.ones((1, 1, 1, 1)))

  def one(a, s, a_next, s_next):
    grid = (jnp.stack([a, a_next]), jnp.stack([s, s_next]))
    run = lambda x: ddpm(gaussian(1.0), jnp.full((1, 1, 1, 1), x), grid, keys)
    return (run(1.0) - run(0.0)).squeeze(), (run(0.0) / z).squeeze()

  scale, noise = jax.vmap(one)(alphas[:-1], sigmas[:-1], alphas[1:], sigmas[1:])
  variance = 1.0
  for a, b in zip(np.asarray(scale, np.float64), np.asarray(noise, np.float64), strict=True):
    variance = a * a * variance + b * b
  assert abs(variance - 0.991067) < 2e-5


@pytest.mark.parametrize('name,order', [('ddim', 1), ('heun', 2), ('dpmpp_2m', 2)])
def test_order_of_convergence(name, order):
  """Error against the exact flow x_0 = sd(data) / sd(x_T) * x_T falls as steps^-order.

  The grid is uniform in log sigma/alpha and ends at a small noise, as orders need smooth grids.
  """
  variance = 0.25
  denoise = gaussian(variance)

  def error(steps):
    ratio = jnp.exp(jnp.linspace(jnp.log(20.0), jnp.log(0.05), steps + 1, dtype=jnp.float64))
    alphas = 1 / jnp.sqrt(1 + ratio**2)
    sigmas = ratio * alphas
    spread = jnp.sqrt(alphas**2 * variance + sigmas**2)
    out = SAMPLERS[name](denoise, jnp.ones((1, 1, 1, 1), jnp.float64), (alphas, sigmas), None)
    return abs(float(out[0, 0, 0, 0]) - float(spread[-1] / spread[0]))

  with jax.enable_x64(True):
    coarse, fine = error(200), error(400)
  assert abs(np.log2(coarse / fine) - order) < 0.1


@pytest.mark.parametrize('name', SAMPLERS)
def test_zero_terminal_snr_stays_finite_and_ends_at_the_data(name):
  schedule = Schedule(ScheduleConfig(rescale_betas_zero_snr=True))
  x, keys = initial_noise(0, 0, 4096, (1, 1, 2))
  out = SAMPLERS[name](gaussian(0.25), x, sampling_grid(schedule, 500), keys)
  assert abs(float(out.std()) - 0.5) < 0.02


def test_an_image_does_not_depend_on_its_batch():
  noise, keys = initial_noise(7, 0, 5, (4, 4, 2))
  noise_3, keys_3 = initial_noise(7, 3, 2, (4, 4, 2))
  grid = sampling_grid(LINEAR, 8)
  whole = ddpm(gaussian(0.3), noise, grid, keys)
  np.testing.assert_array_equal(whole[3:], ddpm(gaussian(0.3), noise_3, grid, keys_3))
  assert not np.allclose(whole[0], whole[1])


def test_guidance_extrapolates_and_scale_one_costs_one_call():
  calls = []

  def denoise(x, a, s, text):
    calls.append(x.shape[0])
    return text[:, :1, :1, None] * jnp.ones_like(x)

  text, null = jnp.full((3, 2, 2), 5.0), jnp.full((3, 2, 2), 1.0)
  x = jnp.zeros((3, 1, 1, 1))
  np.testing.assert_allclose(classifier_free(denoise, text, null, 2.5)(x, 1.0, 1.0), 1 + 2.5 * 4)
  np.testing.assert_allclose(classifier_free(denoise, text, null, 1.0)(x, 1.0, 1.0), 5)
  assert calls == [6, 3]


def test_unknown_sampler_is_refused():
  with pytest.raises(UserError, match='ddim'):
    sampler('euler_b')
