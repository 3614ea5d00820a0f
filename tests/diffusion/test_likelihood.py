"""Probability-flow likelihood and velocity on data of known density."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.diffusion import processes
from diffusion_jax.diffusion.denoiser import make_denoiser
from diffusion_jax.diffusion.likelihood import (
  exact_divergence,
  flow_likelihood,
  hutchinson_divergence,
  stratified_times,
  velocity,
)
from diffusion_jax.diffusion.mixture import GaussianMixture
from diffusion_jax.diffusion.noise import Schedule, ScheduleConfig
from diffusion_jax.diffusion.parameterization import Parameterization
from diffusion_jax.errors import UserError

MIXTURE = GaussianMixture(
  np.array([0.4, 0.6]), np.array([[-1.0, 0.5], [1.0, 0.0]]), np.array([[0.2, 0.05], [0.1, 0.3]])
)
flow = lambda t: (1 - t, t)


def vp(t):
  """beta from 0.1 to 20."""
  integral = 0.1 * t + 19.9 / 2 * t**2
  return jnp.exp(-integral / 2), jnp.sqrt(-jnp.expm1(-integral))


def ve(t):
  return jnp.ones_like(t), 0.01 * 5000.0**t


@pytest.fixture(autouse=True)
def float64():
  with jax.enable_x64(True):
    yield


@pytest.fixture
def keys():
  return jax.random.split(jax.random.key(3), 3)


X = np.array([[-0.9, 0.4], [0.3, 0.1], [1.2, -0.6]])


def normal(variance, size=1):
  return GaussianMixture(np.ones(1), np.zeros((1, size)), np.array([variance]))


def run(denoise, x, process, keys, **options):
  function = partial(flow_likelihood, denoise, process=process, **options)
  return jax.jit(lambda x, keys: function(x, keys=keys))(x, keys)


def bits(mixture, x):
  """-log2 of the density per dimension."""
  return -np.asarray(mixture.log_density(jnp.asarray(x))) / math.log(2) / x[0].size


def blurred(mixture, process, t_min=1e-5):
  alpha, sigma = process(t_min)
  return mixture.diffused(1.0, sigma / alpha)


def test_the_known_figures_of_a_unit_gaussian():
  x, keys = np.array([[0.0], [0.7]]), jax.random.split(jax.random.key(0), 2)
  for solver, dtype, tolerance in (('adaptive', np.float32, 2e-5), ('heun', np.float64, 1e-6)):
    found = run(normal(1.0).denoise, x.astype(dtype), vp, keys, solver=solver, steps=8)
    np.testing.assert_allclose(found.bits, [1.325748, 1.679208], atol=tolerance)
    assert found.bits.dtype == found.latents.dtype == dtype


@pytest.mark.parametrize('process,solver', [(flow, 'adaptive'), (vp, 'adaptive'), (ve, 'rk4')])
def test_the_density_of_a_mixture(process, solver, keys):
  """Exact but for the prior: flow ends in a unit Gaussian, the others in nearly a Gaussian."""
  options = {'trace': 'exact', 'rtol': 1e-7, 'atol': 1e-7, 'steps': 300}
  found = run(MIXTURE.denoise, X, process, keys, solver=solver, **options)
  alpha, sigma = process(jnp.ones(()))
  last, prior = MIXTURE.diffused(alpha, sigma), normal(alpha**2 + sigma**2, 2)
  mismatch = bits(prior, found.latents) - bits(last, found.latents)
  assert (mismatch == 0).all() if process is flow else (np.abs(mismatch) > 1e-5).all()
  np.testing.assert_allclose(found.bits - mismatch, bits(blurred(MIXTURE, process), X), atol=2e-6)
  np.testing.assert_allclose(found.bits, bits(MIXTURE, X), atol=5e-3)
  assert 10 < found.steps < 400


def test_the_prior_may_be_given(keys):
  """Gaussian data stays Gaussian: with its own variance as the prior's, the answer is exact."""
  data, process = normal(0.25, 2), ve
  alpha, sigma = process(jnp.ones(()))
  found = run(
    data.denoise, X, process, keys, solver='rk4', steps=200,
    prior_std=jnp.sqrt(0.25 * alpha**2 + sigma**2),
  )
  np.testing.assert_allclose(found.bits, bits(blurred(data, process), X), atol=1e-6)
  # The flow of a Gaussian only scales.
  spread = lambda t: np.sqrt(0.25 * process(t)[0] ** 2 + process(t)[1] ** 2)
  start = process(1e-5)[0] * X
  np.testing.assert_allclose(found.latents, start * spread(1.0) / spread(1e-5), rtol=1e-5)


@pytest.mark.parametrize('solver,order', [('heun', 2), ('rk4', 4)])
def test_fixed_steps_converge_at_their_order(solver, order, keys):
  exact = bits(blurred(MIXTURE, flow), X)

  def error(steps):
    found = run(MIXTURE.denoise, X, flow, keys, trace='exact', solver=solver, steps=steps)
    assert found.steps == steps
    return np.abs(found.bits - exact).max()

  coarse, fine = error(128), error(256)
  assert abs(math.log2(coarse / fine) - order) < 0.35
  assert fine < {'heun': 2e-3, 'rk4': 1e-6}[solver]


def test_hutchinson_is_the_trace_on_average():
  field = jax.jit(lambda x: MIXTURE.denoise(x, 0.7, 0.7))
  value, trace = jax.jit(partial(exact_divergence, field))(X)
  np.testing.assert_allclose(value, field(X))
  one = np.asarray(jax.jit(jax.vmap(jax.jacfwd(lambda x: field(x[None])[0])))(X))
  np.testing.assert_allclose(trace, np.trace(one, axis1=1, axis2=2), rtol=1e-10)
  # Over all signs the off-diagonal entries cancel exactly; in one pattern of signs they do not.
  estimate = jax.jit(jax.vmap(partial(hutchinson_divergence, field), (None, 0)))
  signs = np.array([[1.0, 1.0], [1.0, -1.0]])[:, None, None] * np.ones((2, 1, 3, 2))
  value, traces = estimate(X, signs)
  np.testing.assert_allclose(value[0], field(X))
  np.testing.assert_allclose(traces.mean(axis=0), trace, rtol=1e-10)
  np.testing.assert_allclose(traces[0], one.sum(axis=(1, 2)), rtol=1e-10)


def test_gaussian_probes_scale_the_volume_and_rademacher_probes_do_not():
  """Where the Jacobian is c(t) I, e^T J e = c |e|^2: bits are affine in |e|^2 / d."""
  data, size, count = normal(0.25, 8), 8, 500
  keys = jax.random.split(jax.random.key(5), count)
  zeros = np.zeros((count, size))
  options = {'solver': 'rk4', 'steps': 24}
  rademacher = run(data.denoise, zeros, flow, keys, **options).bits
  exact, prior = bits(blurred(data, flow), zeros[:1])[0], math.log2(2 * math.pi) / 2
  np.testing.assert_allclose(rademacher, np.full(count, exact), atol=1e-4)
  for probes in (1, 4):
    found = run(data.denoise, zeros, flow, keys, trace='gaussian', probes=probes, **options).bits
    length = (np.asarray(found) - prior) / (exact - prior)  # mean of |e|^2 / 8, chi-square
    np.testing.assert_allclose(length.mean(), 1, atol=0.07)
    np.testing.assert_allclose(length.var(), 2 / size / probes, rtol=0.25)


def test_starting_from_noise_bounds_the_density(keys):
  """The mean over eps of -log p(alpha x + sigma eps) - log alpha, by quadrature."""
  process = lambda t: (jnp.cos(jnp.pi / 2 * t), jnp.sin(jnp.pi / 2 * t))
  data, t_min, count = normal(0.25), 0.2, 4000
  alpha, sigma = process(t_min)
  found = run(
    data.denoise, np.full((count, 1), 0.3), process, jax.random.split(jax.random.key(0), count),
    solver='rk4', steps=16, t_min=t_min, start_noise=True,
  ).bits
  total = 0.25 * alpha**2 + sigma**2
  nats = (math.log(2 * math.pi * total) + (0.09 * alpha**2 + sigma**2) / total) / 2
  wanted = (nats - math.log(alpha)) / math.log(2)
  np.testing.assert_allclose(found.mean(), wanted, atol=5 * found.std() / count**0.5)
  assert found.std() > 0.1 and wanted > bits(data, np.array([[0.3]]))


def test_an_example_keeps_its_value_in_any_batch(keys):
  options = {'solver': 'heun', 'steps': 8, 'trace': 'gaussian'}
  run = jax.jit(lambda x, keys: flow_likelihood(MIXTURE.denoise, x, flow, keys, **options).bits)
  rows = np.array([2, 2, 0])
  np.testing.assert_allclose(run(X[rows], keys[rows]), run(X, keys)[rows], rtol=1e-12)


def test_a_network_on_a_table_of_timesteps_is_scored():
  """For unit Gaussian data the v prediction is 0; x_t / alpha_t has variance 1 / alpha^2."""
  schedule = Schedule(ScheduleConfig())
  denoise = make_denoiser(lambda x, t: 0 * x, Parameterization('v_prediction'), schedule.label)
  x = np.zeros((2, 2, 2, 1), np.float32)
  found = run(
    denoise, x, schedule.process,
    jax.random.split(jax.random.key(0), 2), solver='heun', steps=8, t_min=1 / len(schedule),
  )
  wanted = 1.325748 - math.log2(schedule.alphas[0])
  np.testing.assert_allclose(found.bits, [wanted, wanted], atol=1e-5)


def test_a_solver_that_gives_up_says_so(keys):
  found = run(MIXTURE.denoise, X, flow, keys, max_steps=4, rtol=1e-9, atol=1e-9)
  assert jnp.isnan(found.bits).all()


@pytest.mark.parametrize('options,named', [({'trace': 'hutch'}, 'rademacher'),
                                           ({'solver': 'euler'}, 'rk4')])
def test_unknown_options_are_refused(options, named, keys):
  with pytest.raises(UserError, match=named):
    flow_likelihood(MIXTURE.denoise, X, flow, keys, **options)


@pytest.mark.parametrize('process', [flow, vp, ve])
def test_stratified_times_divide_the_log_snr(process):
  fractions = jnp.linspace(0, 1, 9)
  times = jax.jit(lambda fractions: stratified_times(process, fractions, 1e-5, 0.01))(fractions)
  alpha, sigma = process(times)
  level = jnp.log(0.01 + (alpha / sigma) ** 2)
  np.testing.assert_allclose(level, level[0] + fractions * (level[-1] - level[0]), atol=1e-7)
  np.testing.assert_allclose(times[jnp.array([0, -1])], [1e-5, 1.0], rtol=1e-9)


PROCESSES = {
  'vp': processes.linear(),
  'sub_vp': processes.sub_vp(processes.linear()),
  've': processes.exponential(0.01, 50.0),
  'flow': processes.flow(2.0),
  'cosine': processes.cosine(),
  'zero_terminal': processes.zero_terminal(processes.scaled_linear()),
}
TIMES = (0.05, 0.4, 0.9)


def mixture(dims):
  """Two unequal, overlapping modes in 1-D or 2-D."""
  if dims == 1:
    return GaussianMixture(np.array([0.3, 0.7]), np.array([[-1.2], [0.8]]), np.array([0.1, 0.3]))
  means = np.array([[-1.0, 0.5], [0.7, -0.2]])
  return GaussianMixture(np.array([0.6, 0.4]), means, np.array([[0.2, 0.1], [0.05, 0.4]]))


def log_density(data, process):
  """(x [d], t) -> ln p_t(x)."""
  return lambda x, t: data.diffused(*process(t)).log_density(x[None])[0]


def points(dims):
  line = np.linspace(-2, 2, 7)
  return jnp.asarray(line[:, None] if dims == 1 else np.stack([line, line[::-1] ** 2 - 1], 1))


@pytest.mark.parametrize('dims', [1, 2])
@pytest.mark.parametrize('name', PROCESSES)
def test_velocities_satisfy_the_continuity_equation(name, dims):
  """d ln p / dt + div v + v . grad ln p = 0 for the probability-flow ODE."""
  process, data = PROCESSES[name], mixture(dims)
  log_p = log_density(data, process)
  flow = velocity(process, data.denoise)

  @jax.jit
  def residual(x, t):
    one = lambda x: flow(x[None], t)[0]
    terms = (
      jax.grad(log_p, argnums=1)(x, t), jnp.trace(jax.jacfwd(one)(x)),
      one(x) @ jax.grad(log_p)(x, t),
    )
    return sum(terms) / sum(map(jnp.abs, terms))

  for t in TIMES:
    assert np.abs(jax.vmap(residual, (0, None))(points(dims), t)).max() < 1e-9


@pytest.mark.parametrize('name', ['flow', 'cosine', 'zero_terminal'])
def test_no_signal_at_all_gives_a_finite_velocity(name):
  """At alpha = 0: alpha' E[x_0] + sigma' x / sigma, in float32 and with finite gradients."""
  process, data = PROCESSES[name], mixture(2)
  x = jnp.ones((3, 2), jnp.float32)
  flow = velocity(process, data.denoise)
  (_, sigma), rates = processes.time_derivative(process, jnp.float32(1))
  wanted = rates[0] * data.mean() + rates[1] * x / sigma
  np.testing.assert_allclose(flow(x, jnp.float32(1)), wanted, rtol=1e-3, atol=1e-4)
  for end in (0.0, 1.0):
    slope = jax.grad(lambda x, end=end: flow(x, jnp.float32(end)).sum())(x)
    assert np.isfinite(slope).all()
