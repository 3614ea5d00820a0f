"""SDEs against their papers, Fokker-Planck on mixtures, and variances carried exactly."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.diffusion import processes
from diffusion_jax.diffusion.mixture import GaussianMixture

PROCESSES = {
  'vp': processes.linear(),
  'sub_vp': processes.sub_vp(processes.linear()),
  've': processes.exponential(0.01, 50.0),
  'flow': processes.flow(2.0),
  'cosine': processes.cosine(),
  'zero_terminal': processes.zero_terminal(processes.scaled_linear()),
}
TIMES = (0.05, 0.4, 0.9)


@pytest.fixture(autouse=True)
def float64():
  with jax.enable_x64(True):
    yield


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


def beta(t):
  return 0.1 + t * 19.9


def remaining(t):
  """exp(-int beta)."""
  return np.exp(-(0.1 * t + 19.9 * t**2 / 2))


@pytest.mark.parametrize('name,drift,squared', [
  ('vp', lambda t: -beta(t) / 2, lambda t: beta(t)),
  ('sub_vp', lambda t: -beta(t) / 2, lambda t: beta(t) * (1 - remaining(t) ** 2)),
  ('ve', lambda t: 0 * t, lambda t: (0.01 * 5000**t) ** 2 * 2 * np.log(5000)),
  ('flow', lambda t: -2 / ((1 - t) * (1 + t)), lambda t: 8 * t / ((1 + t) ** 2 * (1 - t))),
])
def test_drift_and_diffusion_are_the_published_ones(name, drift, squared):
  """Song et al. 2021, eq. 25, 27 and 30; and a flow by hand, sigma = 2 t / (1 + t)."""
  sde, t = processes.forward(PROCESSES[name]), np.linspace(0.02, 0.98, 13)
  x = jnp.linspace(-2, 3, 13)[:, None]
  np.testing.assert_allclose(
    sde.drift(x, jnp.asarray(t)), drift(t)[:, None] * x, rtol=1e-9, atol=1e-12
  )
  np.testing.assert_allclose(sde.diffusion(jnp.asarray(t)) ** 2, squared(t), rtol=1e-9)


def test_diffusion_at_the_clean_end_is_the_rate():
  """sigma starts like sqrt(t), with an infinite slope; g^2 = beta does not notice."""
  for dtype in (jnp.float32, jnp.float64):
    g = processes.forward(PROCESSES['vp']).diffusion(jnp.zeros((), dtype))
    np.testing.assert_allclose(g**2, 0.1, rtol=1e-5)


@pytest.mark.parametrize('dims', [1, 2])
@pytest.mark.parametrize('name', PROCESSES)
def test_the_forward_sde_satisfies_fokker_planck(name, dims):
  """d ln p / dt = -div f - f . s + g^2 / 2 (div s + |s|^2), s = grad ln p, at every point."""
  process, sde = PROCESSES[name], processes.forward(PROCESSES[name])
  log_p = log_density(mixture(dims), process)

  @jax.jit
  def residual(x, t):
    score = lambda x: jax.grad(log_p)(x, t)
    drift = lambda x: sde.drift(x[None], t)[0]
    divergence = lambda f: jnp.trace(jax.jacfwd(f)(x))
    flux = -divergence(drift) - drift(x) @ score(x)
    spread = sde.diffusion(t) ** 2 / 2 * (divergence(score) + score(x) @ score(x))
    rate = jax.grad(log_p, argnums=1)(x, t)
    return rate - flux - spread, jnp.abs(rate) + jnp.abs(flux) + jnp.abs(spread)

  for t in TIMES:
    found, size = jax.vmap(residual, (0, None))(points(dims), t)
    assert np.abs(found / size).max() < 1e-9
    assert np.abs(size).max() > 1e-2


@pytest.mark.parametrize('dims', [1, 2])
@pytest.mark.parametrize('name', PROCESSES)
def test_velocities_satisfy_the_continuity_equation(name, dims):
  """d ln p / dt + div v + v . grad ln p = 0 for both forms of the probability-flow ODE."""
  process, data = PROCESSES[name], mixture(dims)
  log_p = log_density(data, process)
  denoise = lambda x, alpha, sigma: data.denoise(x, alpha, sigma)
  score = processes.score_function(process, denoise)
  flow = processes.probability_flow(processes.forward(process), score)

  @jax.jit
  def residual(x, t):
    out = []
    for velocity in (flow, processes.velocity(process, denoise)):
      one = lambda x, velocity=velocity: velocity(x[None], t)[0]
      terms = (
        jax.grad(log_p, argnums=1)(x, t), jnp.trace(jax.jacfwd(one)(x)),
        one(x) @ jax.grad(log_p)(x, t),
      )
      out.append(sum(terms) / sum(map(jnp.abs, terms)))
    return jnp.stack(out)

  for t in TIMES:
    assert np.abs(jax.vmap(residual, (0, None))(points(dims), t)).max() < 1e-9


@pytest.mark.parametrize('name', PROCESSES)
def test_score_is_the_gradient_of_the_log_density(name):
  process, data = PROCESSES[name], mixture(2)
  log_p = log_density(data, process)
  score = processes.score_function(process, data.denoise)
  for t in TIMES:
    wanted = jax.vmap(jax.grad(log_p), (0, None))(points(2), t)
    np.testing.assert_allclose(score(points(2), t), wanted, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize('noise', [0.0, 0.5, 1.0])
@pytest.mark.parametrize('name', ['vp', 'sub_vp', 've', 'cosine'])
def test_the_reverse_sde_has_the_forward_marginals(name, noise):
  """For N(m, s^2) data the drift is affine: mean and variance are carried back in time exactly.

  dm/dt = drift(m), dv/dt = 2 (d drift / dx) v - (noise g)^2, by Runge-Kutta from 0.95 to 0.05.
  """
  process, mean, variance = PROCESSES[name], 0.7, 0.36
  exact = lambda t: (process(t)[0] * mean, process(t)[0] ** 2 * variance + process(t)[1] ** 2)

  def score(x, t):
    m, v = exact(t)
    return (m - x) / v

  sde = processes.reverse(processes.forward(process), score, noise)

  def rate(moments, t):
    m, v = moments
    drift = lambda m: sde.drift(m[None], t)[0]
    return jnp.stack([drift(m), 2 * jax.grad(drift)(m) * v - sde.diffusion(t) ** 2])

  count, span = 600, -0.9
  h = span / count

  def step(moments, t):
    k1 = rate(moments, t)
    k2 = rate(moments + h / 2 * k1, t + h / 2)
    k3 = rate(moments + h / 2 * k2, t + h / 2)
    k4 = rate(moments + h * k3, t + h)
    return moments + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4), None

  times = 0.95 + h * jnp.arange(count)
  found = jax.lax.scan(step, jnp.stack(exact(0.95)), times)[0]
  np.testing.assert_allclose(found, jnp.stack(exact(0.05)), rtol=1e-5)


def test_the_marginal_and_the_prior():
  x0 = jnp.arange(6.0).reshape(2, 3)
  mean, std = processes.marginal(PROCESSES['vp'], x0, jnp.array([0.2, 0.5]))
  np.testing.assert_allclose(mean[1], np.sqrt(remaining(0.5)) * x0[1], rtol=1e-12)
  np.testing.assert_allclose(std, np.sqrt(1 - remaining(np.array([0.2, 0.5]))), rtol=1e-12)
  for name, scale in (('ve', np.hypot(1, 50)), ('flow', 1.0), ('vp', 1.0)):
    found = processes.prior_log_density(PROCESSES[name], x0)
    squares = np.array([0 + 1 + 4, 9 + 16 + 25])
    wanted = -squares / scale**2 / 2 - 3 * np.log(scale * np.sqrt(2 * np.pi))
    np.testing.assert_allclose(found, wanted, rtol=1e-12)


@pytest.mark.parametrize('name', ['flow', 'cosine', 'zero_terminal'])
def test_no_signal_at_all_gives_a_finite_velocity(name):
  """At alpha = 0: alpha' E[x_0] + sigma' x / sigma, in float32 and with finite gradients."""
  process, data = PROCESSES[name], mixture(2)
  x = jnp.ones((3, 2), jnp.float32)
  velocity = processes.velocity(process, data.denoise)
  (_, sigma), rates = processes.time_derivative(process, jnp.float32(1))
  wanted = rates[0] * data.mean() + rates[1] * x / sigma
  np.testing.assert_allclose(velocity(x, jnp.float32(1)), wanted, rtol=1e-3, atol=1e-4)
  for end in (0.0, 1.0):
    slope = jax.grad(lambda x, end=end: velocity(x, jnp.float32(end)).sum())(x)
    assert np.isfinite(slope).all()
    score = processes.score_function(process, data.denoise)
    reverse = processes.reverse(processes.forward(process), score)
    assert np.isfinite(reverse.drift(x, jnp.float32(end))).all()
    assert np.isfinite(reverse.diffusion(jnp.float32(end)))
