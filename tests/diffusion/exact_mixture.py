"""Mixtures of two Gaussians, each entry of x by itself, for which samplers have exact answers."""

import jax
import jax.numpy as jnp
import numpy as np
from scipy.optimize import brentq
from scipy.stats import norm

# By mode and channel: channel 0 is N(0, 0.25), channel 1 has two modes.
WEIGHTS = np.array([[0.5, 0.3], [0.5, 0.7]])
MEANS = np.array([[0.0, -1.0], [0.0, 0.8]])
VARIANCES = np.array([[0.25, 0.04], [0.25, 0.09]])
VARIANCE = 0.25

GRIDS = ('ve', 'vp', 'flow')


def denoise(x, alpha, sigma):
  """E[x_0 | x] for x [... 2], exact at alpha = 0 too."""
  x = x[..., None, :]
  weights, means, variances = (jnp.asarray(part, x.dtype) for part in (WEIGHTS, MEANS, VARIANCES))
  spread = alpha**2 * variances + sigma**2
  logits = jnp.log(weights) - (x - alpha * means) ** 2 / (2 * spread) - jnp.log(spread) / 2
  means = means + alpha * variances / spread * (x - alpha * means)
  return (jax.nn.softmax(logits, axis=-2) * means).sum(axis=-2)


def gaussian(x, alpha, sigma):
  """E[x_0 | x] for data N(0, VARIANCE)."""
  return alpha * VARIANCE / (alpha**2 * VARIANCE + sigma**2) * x


def quantile_map(x, start, end):
  """Where the probability-flow ODE takes x [... 2]: in one dimension it keeps quantiles."""
  def cdf(x, pair, c):
    spread = np.sqrt(pair[0] ** 2 * VARIANCES[:, c] + pair[1] ** 2)
    return WEIGHTS[:, c] @ norm.cdf((x - pair[0] * MEANS[:, c]) / spread)

  out = np.empty_like(np.asarray(x, np.float64))
  for place, value in np.ndenumerate(np.asarray(x)):
    level = cdf(value, start, place[-1])
    reach = 9 * np.hypot(*end)
    out[place] = brentq(
      lambda y, level=level, c=place[-1]: cdf(y, end, c) - level, -reach, reach, xtol=1e-15
    )
  return out


def of_levels(levels, kind='vp'):
  """The grid of the given sigma / alpha on a process of one kind, float64."""
  levels = np.asarray(levels, np.float64)
  scale = {'ve': 1.0, 'vp': np.sqrt(1 + levels**2), 'flow': 1 + levels}[kind]
  return jnp.asarray(1 / scale * np.ones_like(levels)), jnp.asarray(levels / scale)


def geometric(high, low, steps, kind='vp'):
  """A grid smooth in log-SNR, without clean end."""
  return of_levels(np.geomspace(high, low, steps + 1), kind)


def component(mixture, index):
  """One component of a `GaussianMixture` alone: the data given its class."""
  return mixture._replace(
    weights=jnp.ones(1), means=mixture.means[index][None], variances=mixture.variances[index][None]
  )
