"""Gaussian mixtures, with closed forms under diffusion: density, score, denoiser, posterior.

A diffused mixture is a mixture, so all that a network has to learn is known exactly. Computations
run in x's dtype.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class GaussianMixture(NamedTuple):
  """sum_k weights_k N(means_k, diag(variances_k)) over arrays of any shape.

  weights: [k], positive, of sum 1. means: [k ...]. variances: [k] for round components, or [k ...];
  0 makes a component a point, which has a density only when diffused.
  """

  weights: jax.Array
  means: jax.Array
  variances: jax.Array

  def astype(self, dtype) -> 'GaussianMixture':
    """The mixture in one dtype, variances [k ...] like the means."""
    weights, means, variances = (jnp.asarray(part, dtype) for part in self)
    if variances.ndim == 1:
      variances = variances.reshape(-1, *(1,) * (means.ndim - 1))
    return GaussianMixture(weights, means, jnp.broadcast_to(variances, means.shape))

  def diffused(self, alpha, sigma) -> 'GaussianMixture':
    """Marginal of x_t = alpha x_0 + sigma eps, alpha and sigma []."""
    return GaussianMixture(self.weights, alpha * self.means, alpha**2 * self.variances + sigma**2)

  def mean(self) -> jax.Array:
    return jnp.tensordot(self.weights, self.means, axes=1)

  def variance(self) -> jax.Array:
    """[...], of each entry: within components and between them."""
    _, means, variances = self.astype(self.means.dtype)
    return jnp.tensordot(self.weights, variances + (means - self.mean()) ** 2, axes=1)

  def component_log_densities(self, x: jax.Array) -> jax.Array:
    """x [b ...] -> log weights_k + log N(x; means_k, variances_k), [b k]."""
    weights, means, variances = self.astype(x.dtype)
    terms = (x[:, None] - means) ** 2 / variances + jnp.log(2 * jnp.pi * variances)
    return jnp.log(weights) - terms.sum(axis=tuple(range(2, terms.ndim))) / 2

  def log_density(self, x: jax.Array) -> jax.Array:
    """x [b ...] -> [b], in nats."""
    return jax.nn.logsumexp(self.component_log_densities(x), axis=1)

  def log_class_probabilities(self, x: jax.Array) -> jax.Array:
    """x [b ...] -> log p(k | x), [b k]: the ideal classifier of noised data."""
    return jax.nn.log_softmax(self.component_log_densities(x), axis=1)

  def score(self, x: jax.Array) -> jax.Array:
    """Gradient of the log-density at x [b ...]: sum_k p(k | x) (means_k - x) / variances_k."""
    _, means, variances = self.astype(x.dtype)
    fractions = jnp.exp(self.log_class_probabilities(x))
    return jnp.einsum('bk,bk...->b...', fractions, (means - x[:, None]) / variances)

  def posterior(self, x: jax.Array, alpha, sigma) -> 'GaussianMixture':
    """The mixture p(x_0 | x_t = x) for each of x [b ...]: weights [b k], the rest [b k ...].

    Component k has variance v s^2 / (a^2 v + s^2), mean m + a v (x - a m) / (a^2 v + s^2).
    `jax.vmap` turns a method of one mixture into that of b.
    """
    alpha, sigma = jnp.asarray(alpha, x.dtype), jnp.asarray(sigma, x.dtype)
    mixture = self.astype(x.dtype)
    _, means, variances = mixture
    noised = mixture.diffused(alpha, sigma)
    gain = alpha * variances / noised.variances
    return GaussianMixture(
      jnp.exp(noised.log_class_probabilities(x)),
      means + gain * (x[:, None] - noised.means),
      jnp.broadcast_to(variances * sigma**2 / noised.variances, (len(x), *means.shape)),
    )

  def denoise(self, x: jax.Array, alpha, sigma) -> jax.Array:
    """The exact denoiser E[x_0 | x_t = x], x [b ...], alpha and sigma []; finite at alpha = 0."""
    return jax.vmap(GaussianMixture.mean)(self.posterior(x, alpha, sigma))

  def sample(self, key: jax.Array, count: int) -> jax.Array:
    """[count ...] samples, in the dtype of the means."""
    weights, means, variances = self.astype(jnp.asarray(self.means).dtype)
    key_class, key_noise = jax.random.split(key)
    which = jax.random.choice(key_class, len(weights), (count,), p=weights)
    noise = jax.random.normal(key_noise, (count, *means.shape[1:]), means.dtype)
    return means[which] + jnp.sqrt(variances[which]) * noise
