"""The moving average against its closed form."""

import jax.numpy as jnp
import numpy as np

from diffusion_jax.train import ema


def test_average_is_the_closed_form():
  """ema_n = sum_k (1 - d_k) prod_{i > k} d_i p_k, with the ramp (1 + i) / (10 + i) early on."""
  values = np.random.default_rng(0).normal(size=(60, 5))
  decay = 0.5 ** (8 / 20)
  average = {'w': jnp.asarray(values[0], jnp.float32)}
  for step, value in enumerate(values[1:]):
    factor = ema.decay_per_step(20, 8, jnp.asarray(step))
    average = ema.update(average, {'w': jnp.asarray(value, jnp.float32)}, factor)
  decays = [min(decay, (1 + i) / (10 + i)) for i in range(59)]
  assert decays[0] == 0.1 and decays[-1] == decay
  wanted = np.prod(decays) * values[0]
  for k in range(59):
    wanted += (1 - decays[k]) * np.prod(decays[k + 1 :]) * values[k + 1]
  np.testing.assert_allclose(average['w'], wanted, rtol=1e-5)


def test_the_halflife_halves():
  """After the ramp an old weight's share is 1/2 after ema_halflife_images images."""
  average = {'w': jnp.ones(1)}
  for _ in range(1000 // 8):
    average = ema.update(average, {'w': jnp.zeros(1)}, ema.decay_per_step(1000, 8, 10**6))
  np.testing.assert_allclose(average['w'], 0.5, rtol=1e-4)


def test_the_average_is_kept_in_float32():
  average = ema.update({'w': jnp.ones(1)}, {'w': jnp.zeros(1, jnp.bfloat16)}, jnp.float32(0.999))
  assert average['w'].dtype == jnp.float32
  np.testing.assert_allclose(average['w'], 0.999, rtol=1e-6)
