"""Variational bounds on data for which the best one is known."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from diffusion_jax.diffusion import bounds, noise, processes
from diffusion_jax.diffusion.bounds import (
  bits_per_dim,
  bound_term,
  continuous_bound,
  discrete_bound,
  discretized_gaussian,
  gaussian_kl,
  gaussian_log_density,
  learned_log_variance,
  log_variances,
  posterior,
  prior_term,
  transition,
  vdm_loss,
)
from diffusion_jax.diffusion.losses import weighting
from diffusion_jax.diffusion.mixture import GaussianMixture
from diffusion_jax.diffusion.noise import Schedule, ScheduleConfig
from diffusion_jax.diffusion.parameterization import expand
from diffusion_jax.diffusion.samplers import sampling_grid
from tests.diffusion.quadrature import normal_nodes
from tests.diffusion.tables import sampled

STD = 0.6
ENTROPY = np.log(2 * np.pi * np.e * STD**2) / 2
LEVELS = np.linspace(-1, 1, 256)


@pytest.fixture(autouse=True)
def float64():
  with jax.enable_x64(True):
    yield


PROCESSES = {
  'vp': processes.linear(), 've': processes.exponential(0.1, 20.0), 'flow': processes.flow(),
  'cosine': processes.cosine(), 'sub_vp': processes.sub_vp(processes.linear()),
}


def levels(name, t, s):
  return PROCESSES[name](jnp.asarray(t)), PROCESSES[name](jnp.asarray(s))


@pytest.mark.parametrize('t,s', [(0.6, 0.5), (0.9, 0.1), (0.31, 0.3)])
@pytest.mark.parametrize('name', PROCESSES)
def test_the_posterior_is_the_conditioned_joint(name, t, s):
  """(x_s, x_t) given x_0 has covariance [[ss, c], [c, tt]], c = alpha_{t|s} ss: condition x_s."""
  here, there = levels(name, t, s)
  (alpha_t, sigma_t), (alpha_s, sigma_s) = map(np.asarray, here), map(np.asarray, there)
  shared = alpha_t / alpha_s * sigma_s**2
  covariance = np.array([[sigma_s**2, shared], [shared, sigma_t**2]])
  x0, x = np.array([[0.3, -1.0]]), np.array([[1.4, 0.2]])
  mean = alpha_s * x0 + shared / sigma_t**2 * (x - alpha_t * x0)
  variance = 1 / np.linalg.inv(covariance)[0, 0]
  found = posterior(jnp.asarray(x), jnp.asarray(x0), here, there)
  np.testing.assert_allclose(found[0], mean, rtol=1e-9)
  np.testing.assert_allclose(found[1], variance, rtol=1e-8)


def test_ddpm_eq_6_and_7():
  betas = noise.BETAS['linear'](1000, 1e-4, 0.02)
  alpha_bar = np.cumprod(1 - betas)
  t = np.array([1, 17, 500, 999])
  here, there = ((np.sqrt(alpha_bar[i]), np.sqrt(1 - alpha_bar[i])) for i in (t, t - 1))
  ratio, added = transition(*((map(jnp.asarray, level)) for level in (here, there)))
  np.testing.assert_allclose(ratio, np.sqrt(1 - betas[t]), rtol=1e-12)
  np.testing.assert_allclose(added, betas[t], rtol=1e-10)
  x, x0 = np.full((4, 1), 0.7), np.full((4, 1), -0.4)
  of_x0 = np.sqrt(alpha_bar[t - 1]) * betas[t] / (1 - alpha_bar[t])
  of_x = np.sqrt(1 - betas[t]) * (1 - alpha_bar[t - 1]) / (1 - alpha_bar[t])
  mean, variance = posterior(jnp.asarray(x), jnp.asarray(x0), here, there)
  np.testing.assert_allclose(mean[:, 0], of_x0 * -0.4 + of_x * 0.7, rtol=1e-9)
  tilde = (1 - alpha_bar[t - 1]) / (1 - alpha_bar[t]) * betas[t]
  np.testing.assert_allclose(variance, tilde, rtol=1e-9)


def test_two_steps_back_are_one():
  """q(x_r | x_t, x_0) is q(x_s | x_t, x_0) followed by q(x_r | x_s, x_0): means and variances."""
  process = PROCESSES['cosine']
  t, s, r = (process(jnp.asarray(v)) for v in (0.8, 0.5, 0.2))
  x, x0 = jnp.array([[1.3]]), jnp.array([[-0.2]])
  mean_s, variance_s = posterior(x, x0, t, s)
  mean_r, variance_r = posterior(mean_s, x0, s, r)
  slope = posterior(mean_s + 1, x0, s, r)[0] - mean_r
  wanted_mean, wanted_variance = posterior(x, x0, t, r)
  np.testing.assert_allclose(mean_r, wanted_mean, rtol=1e-12)
  found = variance_r + slope**2 * variance_s
  np.testing.assert_allclose(found, wanted_variance[None, None], rtol=1e-12)


def test_no_signal_and_no_noise():
  pair = lambda *values: tuple(jnp.float32(v) for v in values)
  x, x0 = jnp.full((1, 2), 1.5, jnp.float32), jnp.full((1, 2), 0.4, jnp.float32)
  from_nothing = posterior(x, x0, pair(0.0, 1.0), pair(0.6, 0.8))
  np.testing.assert_allclose(from_nothing[0], 0.6 * x0, rtol=1e-6)
  np.testing.assert_allclose(from_nothing[1], 0.64, rtol=1e-6)
  to_data = posterior(x, x0, pair(0.6, 0.8), pair(1.0, 0.0))
  np.testing.assert_allclose(to_data[0], x0, rtol=1e-6)
  assert to_data[1] == 0
  for here, there in (((0.0, 1.0), (0.6, 0.8)), ((0.6, 0.8), (1.0, 0.0)), ((0.0, 1.0), (1.0, 0.0))):
    both = lambda x, x0, h=here, t=there: posterior(x, x0, pair(*h), pair(*t))
    total = lambda x, x0, both=both: sum(part.sum() for part in both(x, x0))
    assert all(np.isfinite(g).all() for g in jax.grad(total, (0, 1))(x, x0))


@pytest.mark.parametrize('zero_snr', [False, True])
def test_the_bounds_of_the_log_variance(zero_snr):
  """Between them lies the best variance for data N(0, s^2), s <= 1, with equality at both ends."""
  schedule = Schedule(ScheduleConfig('linear', 1e-4, 0.02, 100, zero_snr))
  grid = sampling_grid(schedule, 100)
  lower, upper = log_variances(grid)
  assert (lower <= upper).all() and np.isfinite(lower).all() and lower[-1] == lower[-2]
  betas = 1 - schedule.alpha_bar / np.append(1, schedule.alpha_bar[:-1])
  np.testing.assert_allclose(np.exp(upper), betas[::-1], rtol=1e-9)
  alphas, sigmas = grid
  here, there = (alphas[:-2], sigmas[:-2]), (alphas[1:-1], sigmas[1:-1])
  of_x0 = posterior(jnp.zeros((99, 1)), jnp.ones((99, 1)), here, there)[0][:, 0]
  for s, bound in ((0.0, lower), (0.5, None), (1.0, upper)):
    uncertainty = s**2 * sigmas[:-2] ** 2 / (alphas[:-2] ** 2 * s**2 + sigmas[:-2] ** 2)
    best = jnp.log(jnp.exp(lower[:-1]) + of_x0**2 * uncertainty)
    if bound is None:
      assert (best > lower[:-1]).all() and (best < upper[:-1]).all()
    else:
      np.testing.assert_allclose(best, bound[:-1], rtol=1e-9, atol=1e-14)


def test_a_learned_variance_interpolates_in_log_space():
  lower, upper = jnp.array([-9.0, -5.0]), jnp.array([-8.0, -4.5])
  output = jnp.array([[-1.0, 0.0, 1.0], [-1.0, 0.5, 1.0]])
  wanted = [[-9, -8.5, -8], [-5, -4.625, -4.5]]
  np.testing.assert_allclose(learned_log_variance(output, lower, upper), wanted, rtol=1e-12)


def exact(std):
  """E[x_0 | x] of N(0, std^2) data."""
  def denoise(x, alpha, sigma):
    return expand(alpha * std**2 / (alpha**2 * std**2 + sigma**2), x) * x

  return denoise


def uncertainty(alpha, sigma, std=STD):
  """E |x_0 - E[x_0 | x]|^2."""
  return std**2 * sigma**2 / (alpha**2 * std**2 + sigma**2)


def test_gaussian_kl():
  mean, log_variance, mean_2, log_variance_2 = 0.3, np.log(0.5), -0.4, np.log(1.7)
  wanted = (0.5 + 0.7**2) / 1.7 / 2 - 0.5 + np.log(1.7 / 0.5) / 2
  found = gaussian_kl(mean, log_variance, mean_2, log_variance_2)
  np.testing.assert_allclose(found, wanted, rtol=1e-12)
  assert gaussian_kl(mean, log_variance, mean, log_variance) == 0


def test_the_decoder_has_the_mass_of_its_bins():
  for mean, std in ((0.1, 0.05), (-0.99, 0.002), (0.5, 3.0)):
    found = discretized_gaussian(jnp.asarray(LEVELS), mean, 2 * jnp.log(std))
    edges = np.concatenate([[-np.inf], (LEVELS[1:] + LEVELS[:-1]) / 2, [np.inf]])
    wanted = np.diff(stats.norm.cdf(edges, mean, std))
    np.testing.assert_allclose(np.exp(found), wanted, rtol=1e-9, atol=1e-15)
    np.testing.assert_allclose(np.exp(found).sum(), 1, rtol=1e-12)
  few = discretized_gaussian(jnp.array([-1.0, 0.0, 1.0]), 0.0, jnp.log(0.25), 3)
  np.testing.assert_allclose(np.exp(few), [0.158655254, 0.682689492, 0.158655254], rtol=1e-8)


@pytest.mark.parametrize('log_variance', [-20.0, -5.0, 5.0])
def test_the_decoder_is_finite_far_from_its_mean(log_variance):
  """Float32, means up to 2 away at a standard deviation of 5e-5: the tail keeps its logarithm."""
  x0 = jnp.asarray(LEVELS, jnp.float32)
  total = lambda mean, log_variance: discretized_gaussian(x0, mean, log_variance).sum()
  for mean in (-1.0, 0.0033, 1.0):
    args = jnp.full(256, mean, jnp.float32), jnp.float32(log_variance)
    value, slopes = jax.value_and_grad(total, (0, 1))(*args)
    assert np.isfinite(value) and all(np.isfinite(slope).all() for slope in slopes)
  far = discretized_gaussian(jnp.float32(0.0039216), jnp.float32(1.0), jnp.float32(-20.0))
  near = (1 - 0.0039216 - 1 / 255) / np.exp(-10)
  np.testing.assert_allclose(far, -(near**2) / 2, rtol=1e-3)


def test_prior_term():
  x0 = jnp.array([[0.5, -1.0]])
  alpha, sigma = jnp.array([0.3]), jnp.array([0.9])
  closed = lambda std: sum(
    np.log(std / 0.9) + (0.81 + (0.3 * x) ** 2) / (2 * std**2) - 0.5 for x in (0.5, -1.0)
  )
  np.testing.assert_allclose(prior_term(x0, alpha, sigma), [closed(1.0)], rtol=1e-12)
  np.testing.assert_allclose(prior_term(x0, alpha, sigma, 2.0), [closed(2.0)], rtol=1e-12)
  np.testing.assert_allclose(prior_term(x0, jnp.zeros(()), jnp.ones(())), [0], atol=1e-15)


def expected_terms(grid, log_variance, std=STD):
  """E of each of the n terms over data and noise, exactly: the terms are quadratic."""
  x0, eps, weights = normal_nodes(std, 1.0, count=3)

  def term(here, there, log_variance):
    x = here[0] * x0 + here[1] * eps
    estimate = exact(std)(x, *here)
    return weights @ bound_term(
      x0, x, estimate, here, there, log_variance, decoder=gaussian_log_density
    )

  alphas, sigmas = grid
  return jax.vmap(term)((alphas[:-1], sigmas[:-1]), (alphas[1:], sigmas[1:]), log_variance)


@pytest.mark.parametrize('zero_snr', [False, True])
def test_the_bound_has_its_closed_form_term_by_term(zero_snr):
  schedule = Schedule(ScheduleConfig('linear', 1e-3, 0.2, 60, zero_snr))
  grid = sampling_grid(schedule, 60)
  small, large = log_variances(grid)
  alphas, sigmas = map(np.asarray, grid)
  error = uncertainty(alphas[:-1], sigmas[:-1])
  snr = np.append((alphas[:-1] / sigmas[:-1]) ** 2, np.inf)
  halved = (snr[1:-1] - snr[:-2]) / 2 * error[:-1]  # Kingma et al. 2021, eq. 13.
  decoder = lambda value: (np.log(2 * np.pi) + value + error[-1] / np.exp(value)) / 2
  found = expected_terms(grid, small)
  np.testing.assert_allclose(found[:-1], halved, rtol=1e-8)
  np.testing.assert_allclose(found[-1], decoder(small[-1]), rtol=1e-9)
  ratio = np.exp(small - large)[:-1]
  found = expected_terms(grid, large)
  np.testing.assert_allclose(
    found[:-1], ratio * halved + (ratio - 1 - np.log(ratio)) / 2, rtol=1e-8
  )
  np.testing.assert_allclose(found[-1], decoder(large[-1]), rtol=1e-9)


def test_the_bound_tightens_with_more_steps_and_stays_above_the_entropy():
  """On equal steps of log-SNR the gap to the entropy of the data falls as 1 / T."""
  def gap(steps):
    grid = sampling_grid(sampled(processes.log_linear(-9.0, 9.0), steps), steps)
    log_variance = log_variances(grid)[0]
    # The best decoder variance: the uncertainty of x_0 at the least noise.
    log_variance = log_variance.at[-1].set(jnp.log(uncertainty(grid[0][-2], grid[1][-2])))
    x0, weights = normal_nodes(STD)
    prior = weights @ prior_term(x0, grid[0][0], grid[1][0])
    return float(prior + expected_terms(grid, log_variance).sum()) - ENTROPY

  coarse, fine = gap(50), gap(200)
  assert fine > 0 and coarse / fine == pytest.approx(4, rel=0.1)


def test_the_terms_are_divergences_and_a_decoder():
  grid = sampling_grid(sampled(processes.linear(), 8), 8)
  (alphas, sigmas), log_variance = grid, log_variances(grid)[1]
  x0, eps = jnp.full((8, 2), 0.3), jnp.full((8, 2), -0.5)
  here, there = (alphas[:-1], sigmas[:-1]), (alphas[1:], sigmas[1:])
  x = here[0][:, None] * x0 + here[1][:, None] * eps
  estimate = exact(STD)(x, *here)
  terms = bound_term(x0, x, estimate, here, there, log_variance)
  true_mean, variance = posterior(x, x0, here, there)
  mean, _ = posterior(x, estimate, here, there)
  kl = gaussian_kl(true_mean[0], jnp.log(variance[0]), mean[0], log_variance[0]).sum()
  np.testing.assert_allclose(terms[0], kl, rtol=1e-9)
  decoder = discretized_gaussian(x0[-1], mean[-1], log_variance[-1]).sum()
  np.testing.assert_allclose(terms[-1], -decoder, rtol=1e-12)


def test_the_best_learned_variance_is_the_closed_one():
  """The gradient of the expected term in the network's output vanishes at the optimal variance."""
  alphas, sigmas = grid = sampling_grid(sampled(processes.linear(), 20), 20)
  lower, upper = (bound[9] for bound in log_variances(grid))
  here, there = (alphas[9], sigmas[9]), (alphas[10], sigmas[10])
  of_x0 = posterior(jnp.zeros((1, 1)), jnp.ones((1, 1)), here, there)[0][0, 0]
  best = jnp.log(jnp.exp(lower) + of_x0**2 * uncertainty(*here))
  output = 2 * (best - lower) / (upper - lower) - 1
  assert -1 < output < 1
  x0, eps, weights = normal_nodes(STD, 1.0)
  x = here[0] * x0 + here[1] * eps

  def expected(output):
    log_variance = learned_log_variance(jnp.full_like(x, output), lower, upper)
    return weights @ bound_term(x0, x, exact(STD)(x, *here), here, there, log_variance)

  np.testing.assert_allclose(jax.grad(expected)(output), 0, atol=1e-10)
  assert expected(output) < min(expected(-1.0), expected(1.0))


def test_terms_are_finite_at_both_ends_in_float32():
  """From alpha = 0 and to sigma = 0, values and gradients, whatever the estimate."""
  x0, x = jnp.full((2, 3), 0.2, jnp.float32), jnp.full((2, 3), -0.7, jnp.float32)
  here = jnp.array([0.0, 1.0], jnp.float32), jnp.array([1.0, 1e-3], jnp.float32)
  there = jnp.array([0.1, 1.0], jnp.float32), jnp.array([0.99, 0.0], jnp.float32)

  def loss(estimate, log_variance):
    prior = prior_term(x0, jnp.float32(0), jnp.float32(1))
    return prior + 10 * bound_term(x0, x, estimate, here, there, log_variance)

  args = jnp.full((2, 3), 0.9, jnp.float32), jnp.array([-0.5, -13.0], jnp.float32)
  assert loss(*args).dtype == jnp.float32
  slopes = jax.grad(lambda *args: loss(*args).sum(), (0, 1))(*args)
  assert np.isfinite(loss(*args)).all() and all(np.isfinite(slope).all() for slope in slopes)


def diffusion_term(made, std, nodes=200):
  """Mean over t and E over data and noise of the continuous loss."""
  t, weight = np.polynomial.legendre.leggauss(nodes)
  x0, eps, weights = normal_nodes(std, 1.0, count=3)
  at = lambda t: weights @ vdm_loss(exact(std), made, x0, eps, jnp.full(len(x0), t))
  return float(jnp.asarray(weight / 2) @ jax.vmap(at)(jnp.asarray((t + 1) / 2)))


@pytest.mark.parametrize('std', [0.3, 1.0])
def test_the_continuous_bound_depends_on_the_end_points_alone(std):
  """1/2 [ln(1 + s^2 e^-g0) - ln(1 + s^2 e^-g1)], also for a learned schedule of random shape."""
  closed = (np.log1p(std**2 * np.exp(13.3)) - np.log1p(std**2 * np.exp(-5.0))) / 2
  np.testing.assert_allclose(diffusion_term(processes.log_linear(), std), closed, rtol=1e-9)
  params = {k: 3 * v for k, v in processes.init_monotone(jax.random.key(0), 4).items()}
  learned = processes.learned(params, -13.3, 5.0)
  np.testing.assert_allclose(diffusion_term(learned, std), closed, rtol=1e-7)


def test_the_bound_of_unit_gaussian_data_in_bits():
  """Prior, diffusion and a Gaussian decoder sum to 2.047097 bits, 1e-6 above the entropy."""
  made = processes.log_linear()
  (alpha_0, sigma_0), (alpha_1, sigma_1) = made(jnp.zeros(())), made(jnp.ones(()))
  x0, eps, weights = normal_nodes(1.0, 1.0, count=3)
  x = alpha_0 * x0 + sigma_0 * eps
  decoder = -weights @ gaussian_log_density(x0, x / alpha_0, 2 * jnp.log(sigma_0 / alpha_0))[:, 0]
  prior = weights @ prior_term(x0, alpha_1, sigma_1)
  total = prior + diffusion_term(made, 1.0) + decoder
  np.testing.assert_allclose(bits_per_dim(total, x0), 2.047097, atol=5e-7)


def test_a_weighted_bound():
  """'snr' is the bound itself; another weighting multiplies by its weight over SNR."""
  made, t = processes.log_linear(), jnp.array([0.3, 0.8])
  x0, eps = jnp.ones((2, 2)), jnp.full((2, 2), -0.5)
  plain = vdm_loss(exact(STD), made, x0, eps, t)
  same = vdm_loss(exact(STD), made, x0, eps, t, weighting('snr'))
  np.testing.assert_allclose(same, plain, rtol=1e-12)
  found = vdm_loss(exact(STD), made, x0, eps, t, weighting('sigmoid', bias=1.0))
  log_snr = processes.log_snr(made, t)
  np.testing.assert_allclose(found, plain * jax.nn.sigmoid(1.0 - log_snr), rtol=1e-9)


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


def test_estimates_with_random_noise_agree_with_the_closed_form(monkeypatch):
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
