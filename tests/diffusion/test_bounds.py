"""Variational bounds on data for which the optimal network, and so the best bound, is known."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.diffusion import bounds
from diffusion_jax.diffusion.bounds import (
  continuous_bound,
  discrete_bound,
)
from diffusion_jax.diffusion.mixture import GaussianMixture

LN2 = math.log(2)
BETAS = np.linspace(1e-4, 0.02, 1000)
ALPHAS = np.sqrt(np.cumprod(1 - BETAS))
SIGMAS = np.sqrt(1 - ALPHAS**2)
SNR = (ALPHAS / SIGMAS) ** 2


def log_linear(t):
  """VDM's fixed schedule: -log SNR from -13.3 to 5."""
  log_snr = 13.3 - 18.3 * t
  return jnp.sqrt(jax.nn.sigmoid(log_snr)), jnp.sqrt(jax.nn.sigmoid(-log_snr))


def normal(variance):
  return GaussianMixture(np.ones(1), np.zeros((1, 1)), np.array([variance]))


def quadrature(monkeypatch, x0, weights, nodes):
  """Makes the noise a rule of `nodes` points: (x0 [n 1], expectation of values [n])."""
  eps, eps_weights = np.polynomial.hermite_e.hermegauss(nodes)
  eps_weights = eps_weights / eps_weights.sum()
  noise = jnp.asarray(np.tile(eps, len(x0))[:, None])
  monkeypatch.setattr(bounds, 'unit_noise', lambda keys, index, like: noise)
  joint = np.repeat(weights, nodes) * np.tile(eps_weights, len(x0))
  return np.repeat(x0, nodes)[:, None], lambda values: float(np.dot(joint, values))


def gaussian_rule(monkeypatch, variance):
  """Exact for squared errors of linear denoisers: two points each for x_0 and eps."""
  spread = variance**0.5
  return quadrature(monkeypatch, np.array([-spread, spread]), np.array([0.5, 0.5]), 2)


@pytest.mark.parametrize('variance', [1.0, 0.25])
def test_the_continuous_bound_of_a_gaussian(variance, monkeypatch):
  """Diffusion is [ln(1 + s^2 e^13.3) - ln(1 + s^2 e^-5)] / 2 nats; the total 2.047097 at s = 1."""
  x0, mean = gaussian_rule(monkeypatch, variance)
  run = partial(continuous_bound, normal(variance).denoise, process=log_linear, t_min=0.0)
  bound = jax.jit(lambda x0: run(x0, keys=None, draws=1 if variance == 1 else 4000))(x0)
  diffusion = (math.log1p(variance * math.exp(13.3)) - math.log1p(variance * math.exp(-5))) / 2
  np.testing.assert_allclose(mean(bound.diffusion), diffusion / LN2, atol=2e-6)
  last = 1 / (1 + math.exp(5))  # alpha^2
  prior = (last * variance - last - math.log1p(-last)) / 2
  np.testing.assert_allclose(mean(bound.prior), prior / LN2, rtol=1e-9)
  decoder = (math.log(2 * math.pi) - 13.3 + 1) / 2
  np.testing.assert_allclose(mean(bound.decoder), decoder / LN2, rtol=1e-9)
  if variance == 1:
    assert abs(mean(bound.total) - 2.047097) < 1e-6


@pytest.mark.parametrize('process', [lambda t: (1 - t, 0.2 + 0.8 * t), log_linear])
def test_the_continuous_bound_of_a_mixture_is_its_entropy(process, monkeypatch):
  """The ideal denoiser leaves H(x_0 + sigma / alpha eps) at t = 0, and KL(x_1 || prior)."""
  data = GaussianMixture(np.array([0.3, 0.7]), np.array([[-1.0], [0.8]]), np.array([0.04, 0.1]))
  line = np.linspace(-6, 6, 6001)[:, None]
  mass = lambda mixture: np.exp(np.asarray(mixture.log_density(line))) * 0.002
  entropy = lambda mixture: -float(mass(mixture) @ np.asarray(mixture.log_density(line)))

  x0 = np.linspace(-2.5, 2.5, 101)
  weights = np.exp(np.asarray(data.log_density(x0[:, None])))
  x0, mean = quadrature(monkeypatch, x0, weights / weights.sum(), 12)
  run = partial(continuous_bound, data.denoise, process=process, t_min=0.0, draws=300)
  total = mean(jax.jit(lambda x0: run(x0, keys=None))(x0).total)

  first, last = (tuple(map(float, process(t))) for t in (0.0, 1.0))
  end, prior = data.diffused(*last), normal(last[0] ** 2 + last[1] ** 2)
  cross = -float(mass(end) @ np.asarray(prior.log_density(line)))
  wanted = entropy(data.diffused(1.0, first[1] / first[0])) + cross - entropy(end)
  np.testing.assert_allclose(total, wanted / LN2, atol=2e-4)
  assert total > entropy(data) / LN2


def test_the_discrete_bound_of_a_gaussian(monkeypatch):
  """Gaussian KL divergences, written out from means and variances (Ho et al. 2020, eq. 5-7)."""
  s2 = 0.25
  x0, mean = gaussian_rule(monkeypatch, s2)
  run = partial(discrete_bound, normal(s2).denoise, keys=None)
  bound = jax.jit(lambda x0: run(x0, ALPHAS, SIGMAS))(x0)
  error = s2 * SIGMAS**2 / (ALPHAS**2 * s2 + SIGMAS**2)  # E |x_0 - D|^2
  a_bar, before = ALPHAS[1:] ** 2, ALPHAS[:-1] ** 2
  beta = BETAS[1:]
  tilde = (1 - before) / (1 - a_bar) * beta
  mean_gap = before * (beta / (1 - a_bar)) ** 2 * error[1:]
  kl = mean_gap / tilde / 2
  np.testing.assert_allclose(mean(bound.diffusion), kl.sum() / LN2, rtol=1e-8)
  prior = (ALPHAS[-1] ** 2 * s2 + SIGMAS[-1] ** 2 - 1 - math.log(SIGMAS[-1] ** 2)) / 2
  np.testing.assert_allclose(mean(bound.prior), prior / LN2, rtol=1e-8)
  decoder = (math.log(2 * math.pi / SNR[0]) + 1) / 2
  np.testing.assert_allclose(mean(bound.decoder), decoder / LN2, rtol=1e-8)
  entropy = math.log(2 * math.pi * math.e * s2) / 2 / LN2
  assert entropy < mean(bound.total) < entropy + 1


@pytest.mark.parametrize('variance', [1.0, 0.25])
def test_a_part_of_the_steps_estimates_all(variance, monkeypatch):
  """Exactly for unit data, and on average over offsets for any."""
  x0, mean = gaussian_rule(monkeypatch, variance)

  @jax.jit
  def part(offset):
    options = {'draws': 20, 'offset': offset}
    return discrete_bound(normal(variance).denoise, x0, ALPHAS, SIGMAS, None, **options)

  bound = jax.jit(lambda: discrete_bound(normal(variance).denoise, x0, ALPHAS, SIGMAS, None))()
  every = mean(bound.diffusion)
  parts = [mean(part((i + 0.5) / 50).diffusion) for i in range(50)]
  np.testing.assert_allclose(np.mean(parts), every, rtol=1e-3)
  np.testing.assert_allclose(parts, every, rtol=1e-9 if variance == 1 else 0.05)
  assert variance == 1 or np.ptp(parts) > 1e-4


def test_estimates_with_drawn_noise_agree_with_the_closed_form(monkeypatch):
  data, count = normal(0.25), 4096
  x0 = data.sample(jax.random.key(0), count)
  keys = jax.random.split(jax.random.key(1), count)

  @jax.jit
  def run(x0, keys):
    bound = continuous_bound(data.denoise, x0, log_linear, keys, draws=64, t_min=0.0)
    return bound.total, discrete_bound(data.denoise, x0, ALPHAS, SIGMAS, keys, draws=64).total

  continuous, discrete = run(x0, keys)
  np.testing.assert_allclose(run(x0[::-1], keys[::-1]), [continuous[::-1], discrete[::-1]])
  rule, mean = gaussian_rule(monkeypatch, 0.25)
  exact = mean(jax.jit(lambda: discrete_bound(data.denoise, rule, ALPHAS, SIGMAS, None))().total)
  entropy = math.log(2 * math.pi * math.e * 0.25) / 2 / LN2
  for values, wanted in ((continuous, entropy), (discrete, exact)):
    assert abs(float(values.mean()) - wanted) < 5 * float(values.std()) / count**0.5
    assert 0.1 < float(values.std()) < 3


def test_zero_terminal_snr_is_finite_and_has_no_prior_term():
  data = normal(0.25)
  x0, keys = jnp.array([[0.3], [-1.0]]), jax.random.split(jax.random.key(0), 2)
  process = lambda t: (1 - t, jnp.sqrt(t * (2 - t)))
  alphas = np.append(ALPHAS[::100], 0.0)
  sigmas = np.sqrt(1 - alphas**2)

  @jax.jit
  def run(x0):
    continuous = continuous_bound(data.denoise, x0, process, keys, draws=16)
    discrete = [
      discrete_bound(data.denoise, x0, alphas, sigmas, keys, draws=draws) for draws in (None, 8)
    ]
    return [continuous, *discrete]

  for bound in run(x0):
    assert all(jnp.isfinite(term).all() for term in bound)
    np.testing.assert_allclose(bound.prior, 0, atol=1e-12)
  slopes = jax.jit(jax.grad(lambda x0: sum(bound.total.sum() for bound in run(x0))))(x0)
  assert jnp.isfinite(slopes).all() and (slopes != 0).all()
