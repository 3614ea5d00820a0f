"""Distillation on Gaussian data, of which the teacher, its paths and the students are known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.diffusion.distillation import (
  Draws,
  consistency,
  derivative,
  mean_flow,
  progressive,
)
from diffusion_jax.diffusion.noise import NoiseConfig, NoiseSchedule
from diffusion_jax.diffusion.samplers.common import move

STD = 0.6
COUNT = 512
TABLE = NoiseSchedule.of(NoiseConfig(rescale_betas_zero_snr=True))
FLOW = NoiseSchedule.of(NoiseConfig(process='flow'))


def _spread(alpha, sigma):
  return jnp.sqrt((alpha * STD) ** 2 + sigma**2)


def _wide(value):
  return jnp.asarray(value)[:, None]


def teacher(x, alpha, sigma):
  """The exact denoiser of N(0, STD^2)."""
  return _wide(alpha * STD**2 / _spread(alpha, sigma) ** 2) * x


def end(x, alpha, sigma):
  """Where the probability flow ends: x shrinks as the deviation does."""
  return _wide(STD / _spread(alpha, sigma)) * x


def _draws(seed=0):
  keys = jax.random.split(jax.random.key(seed), 3)
  x0 = STD * jax.random.normal(keys[0], (COUNT, 3))
  return Draws(x0, jax.random.normal(keys[1], x0.shape), keys[2])


def _error(method, student, *args, **more):
  return float(jnp.mean(method(student, teacher, _draws(), *args, **more).error))


def test_the_end_of_the_path_is_consistent_in_the_limit():
  """The exact function disagrees with itself only by the error of a DDIM step, which is of second
  order; the denoiser, which is no such function, disagrees for good."""
  grids = [TABLE.grid(steps) for steps in (10, 40, 160)]
  errors = [_error(consistency, end, TABLE, grid, 1e-3) for grid in grids]
  assert errors[0] > 12 * errors[1] > 144 * errors[2]
  other = lambda x, alpha, sigma: 0.5 * end(x, alpha, sigma)
  assert _error(consistency, other, TABLE, grids[1], 1e-3) > 30 * errors[1]


def test_at_the_last_step_the_target_is_the_teachers_end():
  """With one step there is no other; a student equal to the teacher has no error, nor gradient."""
  grid = TABLE.grid(1)
  assert _error(consistency, teacher, TABLE, grid, 1e-3) == pytest.approx(0, abs=1e-12)
  scaled = lambda scale: lambda x, alpha, sigma: scale * teacher(x, alpha, sigma) + scale - 1
  loss = lambda scale: consistency(scaled(scale), teacher, _draws(), TABLE, grid, 1e-3).loss.mean()
  assert jax.grad(loss)(1.0) == pytest.approx(0, abs=1e-6)
  assert jax.grad(loss)(1.1) > 0.5  # Nearly that of |d|, whatever delta is.


def test_the_target_of_a_consistency_is_constant():
  """A gradient through both sides would make f = 0 the best."""
  scaled = lambda scale: lambda x, alpha, sigma: scale * end(x, alpha, sigma)
  grid = TABLE.grid(40)
  loss = lambda scale: consistency(scaled(scale), teacher, _draws(), TABLE, grid, 1e-3).loss.mean()
  both = (loss(1.0 + 1e-3) - loss(1.0 - 1e-3)) / 2e-3
  assert abs(float(jax.grad(loss)(1.0)) - float(both)) > 0.05


@pytest.mark.parametrize('steps', [1, 2, 8])
def test_one_step_of_the_student_is_two_of_the_teacher(steps):
  """By the linear factor of two steps of DDIM, worked out in NumPy."""
  grid = TABLE.grid(2 * steps)
  alphas, sigmas = (np.asarray(part, np.float64) for part in grid[:2])
  shrink = lambda i: alphas[i] * STD**2 / ((alphas[i] * STD) ** 2 + sigmas[i] ** 2)
  factor = lambda i: sigmas[i + 1] / sigmas[i] + (
    alphas[i + 1] - sigmas[i + 1] / sigmas[i] * alphas[i]
  ) * shrink(i)
  first = np.arange(0, 2 * steps, 2)
  both = factor(first) * factor(first + 1)
  keep = sigmas[first + 2] / sigmas[first]
  wanted = (both - keep) / (alphas[first + 2] - keep * alphas[first])

  def student(x, alpha, sigma):
    index = jnp.argmin(jnp.abs(_wide(sigma) - sigmas[first].astype(np.float32)), axis=1)
    return _wide(jnp.asarray(wanted, jnp.float32)[index]) * x

  found = progressive(student, teacher, _draws(), TABLE, grid)
  np.testing.assert_allclose(found.error, 0, atol=1e-9)
  assert _error(progressive, teacher, TABLE, grid) > 1e-6
  # And such a student ends where the teacher does.
  x = jnp.ones((1, 3))
  for i in range(steps):
    here, there = ((alphas[j], sigmas[j]) for j in (2 * i, 2 * i + 2))
    x = move(x, wanted[i] * x, here, there)
  np.testing.assert_allclose(x, np.prod(both), rtol=1e-5)


def test_progressive_weighs_by_the_truncated_signal_to_noise():
  found = progressive(teacher, teacher, _draws(), TABLE, TABLE.grid(16))
  ratio = (found.level.alpha / found.level.sigma) ** 2
  np.testing.assert_allclose(found.loss, np.maximum(ratio, 1) * found.error, rtol=1e-5)
  assert (np.asarray(ratio) < 1).any() and (np.asarray(ratio) > 1).any()


def mean_velocity(x, t, interval):
  """(x_t - x_r) / (t - r) on the flow's paths; the velocity itself where r = t."""
  r = t - interval
  velocity = (t - (1 - t) * STD**2) / _spread(1 - t, t) ** 2
  mean = (1 - _spread(1 - r, r) / _spread(1 - t, t)) / jnp.where(interval > 0, interval, 1)
  return _wide(jnp.where(interval > 0, mean, velocity)) * x


def test_the_mean_velocity_solves_its_equation():
  """Where r < t the velocity alone does not; where r = t both do."""
  exact = mean_flow(mean_velocity, mean_velocity, teacher, _draws(), FLOW, jumps=1.0)
  np.testing.assert_allclose(exact.error, 0, atol=1e-6)
  velocity = lambda x, t, interval: mean_velocity(x, t, jnp.zeros_like(t))
  alone = mean_flow(velocity, velocity, teacher, _draws(), FLOW, jumps=1.0)
  assert float(alone.error.mean()) > 1e-2
  still = mean_flow(velocity, velocity, teacher, _draws(), FLOW, jumps=0.0)
  np.testing.assert_allclose(still.error, 0, atol=1e-6)
  some = mean_flow(velocity, velocity, teacher, _draws(), FLOW, jumps=0.25).error
  assert 0.1 < float((some > 1e-6).mean()) < 0.4


def test_the_weight_of_a_mean_flow_is_by_its_error():
  wrong = lambda x, t, interval: mean_velocity(x, t, interval) + 0.3
  found = mean_flow(wrong, wrong, teacher, _draws(), FLOW, jumps=0.0, floor=0.01)
  np.testing.assert_allclose(found.error, 0.09, rtol=1e-3)
  np.testing.assert_allclose(found.loss, 0.09 / 0.1, rtol=1e-3)


def test_the_derivative_is_that_of_forward_mode():
  """Also through a layer that has derivatives of its own, which forward mode refuses."""
  @jax.custom_vjp
  def own(x):
    return jnp.sin(x)

  own.defvjp(lambda x: (jnp.sin(x), x), lambda x, g: (g * jnp.cos(x),))
  made = lambda sine: lambda x, t: jnp.exp(x) * sine(t * x)
  at, along = (jnp.arange(3.0), jnp.full(3, 0.5)), (jnp.ones(3), jnp.full(3, 2.0))
  wanted = jax.jvp(made(jnp.sin), at, along)[1]
  np.testing.assert_allclose(derivative(made(own), at, along), wanted, rtol=1e-5)
