"""Score matching: losses whose minimiser is grad_x ln p(x) of the noised data."""

from collections.abc import Callable

import jax

from diffusion_jax.diffusion.denoiser import expand
from diffusion_jax.diffusion.objectives import add_noise
from diffusion_jax.types import PerExample

NoisedScore = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
"""(x [b ...], alpha [b], sigma [b]) -> [b ...]."""


def total(values: jax.Array) -> PerExample:
  """Sum over all but the first axis."""
  return values.reshape(len(values), -1).sum(1)


def denoising_score_matching(
  score: NoisedScore, x0: jax.Array, eps: jax.Array, alpha: jax.Array, sigma: jax.Array
) -> PerExample:
  """1/2 sigma^2 |score(x) + eps / sigma|^2 [b] (Song & Ermon 2019, eq. 5 and 6; Vincent 2011).

  sigma^2 is NCSN's weight of a noise level, which makes all levels count alike. With alpha = 1 and
  sigma from `processes.exponential` this is NCSN's loss. Finite at sigma = 0 for a finite score.
  """
  x = add_noise(x0, eps, alpha, sigma)
  return total((expand(sigma, x) * score(x, alpha, sigma) + eps) ** 2) / 2


def sliced_score_matching(
  score: Callable[[jax.Array], jax.Array], x: jax.Array, directions: jax.Array,
  reduce_variance: bool = True,
) -> PerExample:
  """v^T (d score / d x) v + 1/2 (v^T score)^2 [b] (Song et al. 2019, eq. 8).

  Needs no noise levels and no score of q(x | x_0): x [b ...] are draws of the distribution whose
  score is wanted. Equals denoising score matching up to a constant in the score.

  Args:
    score: x [b ...] -> [b ...], each example by itself.
    directions: v [b ...] with E[v v^T] = 1, such as standard normals or random signs.
    reduce_variance: uses 1/2 |score|^2, the expectation of the second term over v (eq. 9).
  """
  # v^T J, not J v: networks have layers whose derivatives are written for this direction alone.
  value, pull = jax.vjp(score, x)
  slope, = pull(directions)
  if reduce_variance:
    return total(directions * slope) + total(value**2) / 2
  return total(directions * slope) + total(directions * value) ** 2 / 2
