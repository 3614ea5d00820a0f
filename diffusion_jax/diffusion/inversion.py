"""DDIM run backwards, from data to the noise that gives it, and great circles between noises.

With u = x / |(alpha, sigma)| and the angle phi = atan2(sigma, alpha) a step of DDIM is a rotation,
u' = cos(d) u - sin(d) v(u), d = phi - phi', of the v prediction v = cos(phi) eps - sin(phi) x_0
(Song, Meng & Ermon 2021, eq. 12; Salimans & Ho 2022, appendix D). Undone it is implicit,
u = (u' + sin(d) v(u)) / cos(d), and finite from sigma = 0 and to alpha = 0.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.diffusion.denoiser import Denoiser
from diffusion_jax.diffusion.samplers.common import Steps, epsilon, scanned, step_count
from diffusion_jax.diffusion.samplers.grid import Grid
from diffusion_jax.errors import UserError
from diffusion_jax.types import Latents, PerExample


def invert(denoise: Denoiser, x: Latents, grid: Grid, iterations: int = 2) -> Latents:
  """Return the x [b ...] of a grid's first pair from which `ddim` comes to that of its last.

  Each step is solved by fixed points, from the v of the step before, `iterations` network calls
  each. The error of the way there and back falls with the power iterations + 1 of the step, until
  rounding: one call is the inversion that is usual (Song, Meng & Ermon 2021, section 4.3).
  """
  if iterations < 1:
    raise UserError(f'{iterations} iterations undo no step; choose at least 1.')
  backwards = tuple(jnp.flip(jnp.asarray(part)) for part in grid[:2])
  return _undone(denoise, x, backwards, None, iterations=iterations)


@scanned
def _undone(denoise, grid, noise, *, iterations):
  del grid, noise

  def step(x, v, here, there, index):
    del index
    angles = [jnp.arctan2(sigma, alpha) for alpha, sigma in (here, there)]
    turn, (c, d) = angles[1] - angles[0], (jnp.cos(angles[1]), jnp.sin(angles[1]))
    u, norm = x / jnp.hypot(*here), jnp.hypot(*there)
    before = lambda v: (u + jnp.sin(turn) * v) / jnp.cos(turn)

    def improved(carry, _):
      v, _ = carry
      at = before(v)
      x0 = denoise(norm * at, *there).astype(x.dtype)
      return (c * epsilon(norm * at, x0, there) - d * x0, x0), None

    (v, x0), _ = jax.lax.scan(improved, (v, jnp.zeros_like(x)), None, iterations)
    return norm * before(v), v, x0

  return Steps(step, carry=jnp.zeros_like)


def check_steps(grid: Grid) -> None:
  """Raise UserError for a grid of one step, which leaves nothing of the noise."""
  if step_count(tuple(map(jnp.asarray, grid[:2]))) < 2:
    raise UserError('one step cannot be undone, as it leaves nothing of the noise; take 2 or more.')


def slerp(start: Latents, end: Latents, fraction: PerExample) -> Latents:
  """Return x [b ...] at fractions [b] of the great circles from start to end, [b ...] each.

  Norms go evenly from the one to the other, so that of unit noise stays that of unit noise
  (Shoemake 1985; Song, Meng & Ermon 2021, appendix D.5). Parallel ones are mixed on a line.
  """
  axes = tuple(range(1, start.ndim))
  wide = lambda value: value.reshape(-1, *(1,) * len(axes))
  norm = lambda x: jnp.sqrt((x**2).sum(axis=axes, keepdims=True))
  long, longer, w = norm(start), norm(end), wide(jnp.asarray(fraction, start.dtype))
  a, b = start / jnp.where(long > 0, long, 1), end / jnp.where(longer > 0, longer, 1)
  angle = jnp.arccos(jnp.clip((a * b).sum(axis=axes, keepdims=True), -1, 1))
  sine = jnp.sin(angle)
  flat = sine < 1e-3
  part = lambda w: jnp.where(flat, w, jnp.sin(w * angle) / jnp.where(flat, 1, sine))
  return (long + w * (longer - long)) * (part(1 - w) * a + part(w) * b)


def arc(ends: Sequence[Latents], count: int) -> Latents:
  """Return x [count ...] evenly from the first of two ends [...] to the other, as by `slerp`."""
  ends = (jnp.repeat(jnp.asarray(end, jnp.float32)[None], count, axis=0) for end in ends)
  return slerp(*ends, np.linspace(0, 1, count, dtype=np.float32))
