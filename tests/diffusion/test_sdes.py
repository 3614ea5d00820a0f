"""The velocity of the probability-flow ODE on mixtures: continuity, and its ends."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.diffusion import processes
from diffusion_jax.diffusion.likelihood import velocity
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
