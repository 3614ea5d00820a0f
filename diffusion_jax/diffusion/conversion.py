"""A network of one prediction and one process, as a model of another.

What a network says of x is a denoiser, D(x, alpha, sigma) -> (x_0, eps), and depends on x, up to
its scale, and on the ratio sigma / alpha alone. So whatever a model is to predict, and on whatever
process, the network answers: it sees x at the scale of its own process and is told its own time of
the same ratio, and the pair (x_0, eps) of its answer makes the new prediction (Karras et al. 2022,
section 2 and table 1, for networks of VP, VE and iDDPM; Salimans & Ho 2022, appendix D, for v).
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from diffusion_jax.diffusion.noise import NoiseConfig, NoiseSchedule
from diffusion_jax.diffusion.parameterization import Parameterization, divide, expand


def matched(
  noise: NoiseSchedule, alpha: jax.Array, sigma: jax.Array
) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
  """The pair of a schedule with the ratio sigma / alpha, or its nearest, and where that is.

  Args:
    noise: a schedule whose ends are the first and last level of training.
    alpha: [b] or [].
    sigma: of alpha's shape.

  Returns:
    ((alpha, sigma), end): end is -1 where the schedule begins with more noise than was asked for,
    1 where it ends with less, 0 where it has the very ratio.
  """
  alphas, sigmas = noise.levels(2)
  first, last = ((alphas[i].astype(alpha.dtype), sigmas[i].astype(alpha.dtype)) for i in (0, -1))
  cleaner, noisier = sigma * first[0] < alpha * first[1], sigma * last[0] > alpha * last[1]
  a, s = (
    jnp.where(cleaner, first[i], jnp.where(noisier, last[i], part))
    for i, part in enumerate((alpha, sigma))
  )
  scale = jnp.hypot(*noise.smooth_process(noise.time_of(a, s))) / jnp.hypot(a, s)
  return (scale * a, scale * s), noisier.astype(int) - cleaner.astype(int)


@dataclasses.dataclass(frozen=True)
class Converted(Parameterization):
  """A prediction that is made of a network's own; otherwise as any of that name.

  own: what the network itself predicts. levels: the noise levels that it was trained at, None for
  those of the model. Where the model's levels lie beyond these, the network is asked at its
  nearest: with more noise, down to no signal at all (zero terminal SNR), its estimate of x_0
  counts, as x says next to nothing of that, and eps is what x leaves; with less noise its eps
  counts, and x_0 is what x leaves.
  """

  own: Parameterization = Parameterization()
  levels: NoiseConfig | None = None

  @functools.cached_property
  def _noise(self) -> NoiseSchedule:
    return NoiseSchedule.of(self.levels)

  def predict(self, network, x, alpha, sigma, label):
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    alpha, sigma = jnp.asarray(alpha, x.dtype), jnp.asarray(sigma, x.dtype)
    (a, s), end, seen = (alpha, sigma), jnp.zeros(alpha.shape, int), x
    if self.levels is not None:
      (a, s), end = matched(self._noise, alpha, sigma)
      seen = expand(jnp.hypot(a, s) / jnp.hypot(alpha, sigma), x) * x
      label = jnp.broadcast_to(self._noise.label(a, s), x.shape[:1])
    output = self.own.predict(network, seen, a, s, label).astype(x.dtype)
    output, more = output[..., : x.shape[-1]], output[..., x.shape[-1] :]
    x0, eps = self.own.to_pair(output, seen, a, s)
    if self.levels is not None:
      wide = expand(alpha, x), expand(sigma, x)
      end = expand(end, x)
      x0, eps = (
        jnp.where(end < 0, divide(x - wide[1] * eps, wide[0]), x0),
        jnp.where(end > 0, divide(x - wide[0] * x0, wide[1]), eps),
      )
    return jnp.concatenate([self.target(x0, eps, alpha, sigma), more], axis=-1)


def converted(
  parameterization: Parameterization, noise: NoiseConfig, prediction: str, wanted: NoiseConfig
) -> Parameterization:
  """Return what makes `prediction`, on the process `wanted`, of a network trained on `noise`.

  Conversions do not add up: one that is converted already is converted anew, and one whose own
  terms are wanted is again as it was.
  """
  own = parameterization.own if isinstance(parameterization, Converted) else parameterization
  levels = own_terms(parameterization, noise)[1]
  if (prediction, wanted) == (own.name, levels):
    return own
  return Converted(
    prediction, parameterization.data_std, own, None if levels == wanted else levels
  )


def own_terms(parameterization: Parameterization, noise: NoiseConfig) -> tuple[str, NoiseConfig]:
  """The prediction and the noise of the network of a model on this noise."""
  if isinstance(parameterization, Converted):
    return parameterization.own.name, parameterization.levels or noise
  return parameterization.name, noise
