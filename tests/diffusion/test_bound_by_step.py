"""The bound's three terms, step by step, by hand on data for which the denoiser is known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import norm

from diffusion_jax.diffusion import bound_by_step as module
from diffusion_jax.diffusion import bounds, processes
from diffusion_jax.diffusion.bound_by_step import bound_by_step
from diffusion_jax.diffusion.bounds import discrete_bound
from diffusion_jax.diffusion.likelihood import flow_likelihood
from diffusion_jax.diffusion.noise import NoiseConfig, NoiseSchedule, Schedule, ScheduleConfig

TABLE = Schedule(ScheduleConfig('linear', 1e-4, 0.02, num_train_timesteps=1000))
X0 = jnp.array([[0.6], [-0.9], [1.0]])


def exact(x, alpha, sigma):
  """Of N(0, 1)."""
  return alpha * x / (alpha**2 + sigma**2)


@pytest.fixture
def signs(monkeypatch):
  """Noise of +1 and -1 in turn, whose mean is exact for what is quadratic in it."""
  noise = lambda keys, index, like, *_: jnp.array([1.0, -1.0] * 3).reshape(6, 1).astype(like.dtype)
  for one in (module, bounds):
    monkeypatch.setattr(one, 'unit_noise', noise)


def test_each_term_is_its_formula(signs):
  """L_T, every L_{t-1} and L_0, of pixels x_0 under the best model of N(0, 1)."""
  with jax.enable_x64(True):
    x0 = jnp.repeat(X0, 2, axis=0).astype(jnp.float64)
    found = jax.jit(lambda x0: bound_by_step(exact, x0, TABLE.alphas, TABLE.sigmas, None))(x0)
  mean = lambda value: np.asarray(value).reshape(*value.shape[:-1], 3, 2).mean(-1)
  x, (a, s) = np.asarray(X0)[:, 0], (TABLE.alphas[:, None], TABLE.sigmas[:, None])
  bits = lambda nats: nats / np.log(2)
  prior = ((a[-1] * x) ** 2 + s[-1] ** 2 - 1 - np.log(s[-1] ** 2)) / 2
  np.testing.assert_allclose(mean(found.prior), bits(prior), rtol=1e-9)
  # |x_0 - a (a x_0 + s e)|^2, mean over e, times half the SNR that the step gains.
  error = (x * s**2) ** 2 + (a * s) ** 2
  gain = (a[:-1] / s[:-1]) ** 2 - (a[1:] / s[1:]) ** 2
  np.testing.assert_allclose(mean(found.steps), bits(gain * error[1:] / 2), rtol=1e-6)
  assert found.timesteps.tolist() == list(range(1, 1000)) and (found.weights == 1).all()
  # The variance of x_0 given x_1 is that of x_1 given x_2 and x_0; its mean is D(x_1).
  deviation = np.sqrt((1 - (a[1] / a[0]) ** 2) * s[0] ** 2 / s[1] ** 2)
  at = a[0] * (a[0] * x[:, None] + s[0] * np.array([1, -1]))
  upper = np.where(x[:, None] > 0.999, 1, norm.cdf((x[:, None] + 1 / 255 - at) / deviation))
  mass = upper - norm.cdf((x[:, None] - 1 / 255 - at) / deviation)
  np.testing.assert_allclose(mean(found.decoder), bits(-np.log(mass).mean(-1)), rtol=1e-6)
  np.testing.assert_allclose(found.total, found.prior + found.decoder + found.steps.sum(0))


@pytest.mark.parametrize('draws', [None, 7])
def test_steps_and_prior_are_those_of_the_other_bound(draws):
  """For any denoiser, noise and number of draws; f chooses between the two fixed variances."""
  x0, keys = jax.random.normal(jax.random.key(0), (2, 3, 4)), jax.random.split(jax.random.key(1))
  levels = Schedule(ScheduleConfig('linear', 1e-3, 0.2, num_train_timesteps=20)).levels()
  denoise = lambda x, alpha, sigma: jnp.tanh(x) + sigma
  run = lambda denoise, variance='fixed_small': bound_by_step(
    denoise, x0, *levels, keys, draws=draws, offset=0.3, variance=variance
  )
  found, other = run(denoise), discrete_bound(denoise, x0, *levels, keys, draws=draws, offset=0.3)
  np.testing.assert_allclose(found.diffusion, other.diffusion, rtol=1e-4)
  np.testing.assert_allclose(found.prior, other.prior, rtol=1e-5)
  assert found.steps.shape == (draws or 19, 2)
  for fraction, same in ((0.0, 'fixed_small'), (1.0, 'fixed_large')):
    both = lambda x, *at, fraction=fraction: (denoise(x, *at), jnp.full_like(x, fraction))
    pairs = zip(run(both, 'learned'), run(denoise, same), strict=True)
    assert all(np.allclose(a, b, rtol=1e-5) for a, b in pairs)
  assert not np.allclose(run(denoise, 'fixed_large').diffusion, found.diffusion, rtol=0.1)


def test_sub_vp_has_less_noise_and_its_likelihood_is_the_closed_form():
  """Of N(0, s^2): sigma = 1 - alpha^2, and the density of x_t / alpha_t at the first time."""
  options = dict(process='linear', process_options={'start': 0.1, 'end': 20.0})
  vp, sub = (NoiseSchedule.of(NoiseConfig(**options, sub_vp=on)) for on in (False, True))
  t, s = np.linspace(0.01, 1, 20), 0.5
  with jax.enable_x64(True):
    (a, sigma), (same, less) = vp.process(t), sub.process(t)
    np.testing.assert_allclose(a, np.exp(-(0.1 * t + 19.9 * t**2 / 2) / 2), rtol=1e-9)
    np.testing.assert_allclose(same, a, rtol=1e-12)
    np.testing.assert_allclose(less, 1 - np.asarray(a) ** 2, rtol=1e-9)
    assert (less < sigma).all()
    denoise = lambda x, a, sd: a * s**2 * x / (a**2 * s**2 + sd**2)
    x = jnp.array([[0.0], [0.7]])
    found = flow_likelihood(
      denoise, x, sub.smooth_process, jax.random.split(jax.random.key(0)), trace='exact',
      solver='rk4', steps=400, t_min=0.0, prior_std=float(np.hypot(same[-1] * s, less[-1])),
    ).bits
    first = processes.tabulate(sub.smooth_process, np.zeros(1))
  blurred = np.hypot(s, first[1][0] / first[0][0])
  np.testing.assert_allclose(found, -norm.logpdf(np.array([0.0, 0.7]), 0, blurred) / np.log(2),
                             atol=1e-4)
