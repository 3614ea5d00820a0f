"""Dequantisation: a density over continuous x bounds the probability of quantised data.

For q(u | x) over the bin [0, 1)^d of x, P(x) >= exp E_q[log p(x + u) - log q(u | x)], bins having
width w: -log P(x) <= E_q[-log p(x + w (u - 1/2)) + log q(u | x)] - d log w (Theis et al. 2016,
section 3.1; Ho et al. 2019, Flow++, section 3.1).
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from diffusion_jax.diffusion.likelihood import unit_noise
from diffusion_jax.diffusion.losses import total
from diffusion_jax.diffusion.variational import bits_per_dim, gaussian_log_density
from diffusion_jax.types import Images, PerExample

Dequantizer = Callable[[Images, jax.Array], tuple[jax.Array, PerExample]]
"""(x [b ...], keys [b]) -> (u [b ...] in [0, 1), log q(u | x) [b])."""


def uniform(x: Images, keys: jax.Array) -> tuple[jax.Array, PerExample]:
  """The dequantizer with log q = 0."""
  return unit_noise(keys, 0, x, jax.random.uniform), jnp.zeros(len(x), x.dtype)


def logit_normal(parameters: Callable[[Images], tuple[jax.Array, jax.Array]]) -> Dequantizer:
  """Variational: u = sigmoid(mean + std eps), with (mean, log std) [b ...] given x, as learned.

  log q(u | x) = log N(eps; 0, 1) - log std - log u - log(1 - u).
  """
  def dequantizer(x, keys):
    mean, log_std = parameters(x)
    eps = unit_noise(keys, 0, x)
    logit = mean + jnp.exp(log_std) * eps
    slope = jax.nn.log_sigmoid(logit) + jax.nn.log_sigmoid(-logit)
    log_q = gaussian_log_density(eps, 0.0, 0.0) - log_std - slope
    return jax.nn.sigmoid(logit), total(log_q)

  return dequantizer


def dequantize(
  x: Images, keys: jax.Array, *, levels: int = 256, dequantizer: Dequantizer = uniform
) -> tuple[Images, PerExample]:
  """(continuous x [b ...], bits [b] to add to its bits per dimension) for images in [-1, 1].

  Args:
    x: [b ...] with values 2 k / (levels - 1) - 1, k = 0 .. levels - 1; bins have width
      2 / (levels - 1) around them.

  With the uniform dequantizer the bits are log2(127.5) = 6.994 for 256 levels.
  """
  width = 2 / (levels - 1)
  u, log_q = dequantizer(x, keys)
  extra = bits_per_dim(log_q - x[0].size * math.log(width), x)
  return x + width * (u - 0.5), extra
