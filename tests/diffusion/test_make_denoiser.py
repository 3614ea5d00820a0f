"""What a network is handed, and what a denoiser makes of its output."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.diffusion.denoiser import make_denoiser
from diffusion_jax.diffusion.noise import NoiseSchedule, ScheduleConfig
from diffusion_jax.diffusion.parameterization import Parameterization, noise_label


def test_a_network_sees_scaled_inputs_and_its_label():
  seen = []

  def network(x, label):
    seen.append((x, label))
    return jnp.zeros_like(x)

  x = jnp.full((2, 3), 4.0)
  alpha, sigma = jnp.ones(()), jnp.asarray(2.0)
  scaled = make_denoiser(network, Parameterization('edm', 0.5), noise_label)(x, alpha, sigma)
  plain = make_denoiser(network, Parameterization(), lambda a, s: 7 * s)(x, alpha, sigma)
  np.testing.assert_allclose(seen[0][0], 4 / np.sqrt(4.25))
  np.testing.assert_allclose(seen[0][1], [np.log(2) / 4] * 2)
  np.testing.assert_allclose(scaled, 0.25 / 4.25 * x)
  np.testing.assert_allclose(seen[1][0], x)
  np.testing.assert_allclose(seen[1][1], [14, 14])
  np.testing.assert_allclose(plain, x)
  assert np.isfinite(noise_label(jnp.zeros(()), jnp.ones(())))


def test_one_level_per_example():
  """alpha and sigma [b] mean the same as b calls."""
  network = lambda x, label: x * label[:, None] + 1
  denoise = make_denoiser(network, Parameterization('edm'), noise_label)
  x, alpha, sigma = jnp.ones((3, 2)), jnp.array([0.9, 0.6, 0.1]), jnp.array([0.4, 0.8, 0.99])
  together = denoise(x, alpha, sigma)
  alone = jnp.concatenate([denoise(x[i : i + 1], alpha[i], sigma[i]) for i in range(3)])
  np.testing.assert_allclose(together, alone, rtol=1e-12)


def test_the_network_is_handed_the_timestep_of_a_table():
  noise = NoiseSchedule.of(ScheduleConfig())
  seen = []

  def network(x, t):
    seen.append(t)
    return jnp.zeros_like(x, jnp.bfloat16)

  alpha, sigma = noise.table(jnp.array(321))
  x = jnp.ones((2, 1, 1, 1))
  x0 = make_denoiser(network, Parameterization(), noise.label)(x, alpha, sigma)
  np.testing.assert_allclose(seen[0], [321, 321], atol=0.02)
  assert x0.dtype == x.dtype
  np.testing.assert_allclose(x0, x / alpha, rtol=1e-6)
