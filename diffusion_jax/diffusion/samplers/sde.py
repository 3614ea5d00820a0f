"""The reverse SDE step by step, and Langevin dynamics at fixed noise levels.

The score is (alpha x_0 - x) / sigma^2 (Efron 2011). A step to sigma = 0 returns alpha' x_0, and
one from alpha = 0 takes the posterior.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from diffusion_jax.diffusion.denoiser import Denoiser
from diffusion_jax.diffusion.samplers.grids import Grid
from diffusion_jax.diffusion.samplers.steps import (
  Keys,
  Pair,
  Trajectory,
  contraction,
  divide,
  is_inner,
  noise_source,
  walk,
)
from diffusion_jax.types import Latents


def score(x: Latents, x0: Latents, pair: Pair) -> Latents:
  """Gradient of the log-density at x [b ...], given the estimate of x_0."""
  return divide(pair[0] * x0 - x, pair[1] ** 2)


def reverse_step(
  x: Latents, x0: Latents, here: Pair, there: Pair, z: Latents, rates: Pair | None = None
) -> Latents:
  """One step of `euler_maruyama`."""
  q = contraction(here, there)
  if rates is None:
    drift = 1 - divide(here[0], there[0])
    added = here[1] ** 2 * (1 - q) * (1 + q)
  else:
    drift, added = rates
  stepped = x + drift * x + added * score(x, x0, here) + jnp.sqrt(added) * z
  return jnp.where(is_inner(here, there), stepped, there[0] * x0 + there[1] * z)


def euler_maruyama(
  denoise: Denoiser, x: Latents, grid: Grid, keys: Keys, *,
  process: Callable | None = None, times: jax.Array | None = None, trajectory: bool = False,
) -> Latents | Trajectory:
  """Euler-Maruyama on dx = (f x - g^2 score) dt + g dw, run backwards (Song et al. 2021, eq. 6).

  By default drift and noise of a step are those of the forward chain between its two pairs, -f dt =
  1 - alpha / alpha' and g^2 dt = sigma^2 - (alpha / alpha')^2 sigma'^2: the reverse diffusion
  sampler (eq. 46), x' = (2 - sqrt(1 - beta)) x + beta score + sqrt(beta) z for VP.

  Args:
    process: t -> (alpha, sigma); with it f = (ln alpha)' and g^2 = (sigma^2)' - 2 f sigma^2 are
      taken where a step starts.
    times: [n + 1], the times of the grid's pairs on that process, falling.
  """
  noise = noise_source(keys)
  rates = () if process is None else (_rates(process, jnp.asarray(times)),)

  def step(x, memory, here, there, index, *rates):
    x0 = denoise(x, *here)
    return reverse_step(x, x0, here, there, noise(index, x), *rates), memory, x0

  return walk(step, x, grid, rates, trajectory=trajectory)


def _rates(process: Callable, times: jax.Array) -> tuple[jax.Array, jax.Array]:
  """-f dt and g^2 dt [n] at the starts of the steps between times [n + 1]."""
  t, dt = times[:-1], times[:-1] - times[1:]
  (a, s), (a_rate, s_rate) = jax.jvp(process, (t,), (jnp.ones_like(t),))
  drift = divide(a_rate, a)
  return -drift * dt, 2 * s * (s_rate - drift * s) * dt


def langevin_step(x: Latents, gradient: Latents, size, z: Latents) -> Latents:
  """x + size gradient + sqrt(2 size) z; size [] or [b 1 ...]."""
  return x + size * gradient + jnp.sqrt(2 * size) * z


def _norms(values: Latents) -> jax.Array:
  """Norm of each example, [b 1 ...]."""
  return jnp.sqrt((values**2).sum(axis=tuple(range(1, values.ndim)), keepdims=True))


def predictor_corrector(
  denoise: Denoiser, x: Latents, grid: Grid, keys: Keys, *,
  snr: float = 0.16, corrections: int = 1, trajectory: bool = False,
) -> Latents | Trajectory:
  """Langevin steps at each noise level, then a step of `euler_maruyama` (Song et al. 2021, alg. 1).

  A Langevin step has the size 2 (snr |z| / |score|)^2 of algorithm 4, with norms of each image by
  itself rather than their mean over the batch, and without algorithm 5's factor 1 - beta for VP. In
  a few dimensions, as of points in the plane, one image's norms vary too much for that.
  Draws (corrections + 1) i and on belong to step i.

  Args:
    snr: signal-to-noise ratio of a Langevin step.
    corrections: Langevin steps before each step, one network call each.
  """
  noise = noise_source(keys)

  def step(x, memory, here, there, index):
    draw = lambda k: noise((corrections + 1) * index + k, x)

    def correct(x, k):
      gradient, z = score(x, denoise(x, *here), here), draw(k)
      size = 2 * (snr * _norms(z) / _norms(gradient)) ** 2
      return langevin_step(x, gradient, size, z).astype(x.dtype), None

    x, _ = jax.lax.scan(correct, x, jnp.arange(corrections))
    x0 = denoise(x, *here)
    return reverse_step(x, x0, here, there, draw(corrections)), memory, x0

  return walk(step, x, grid, trajectory=trajectory)


def annealed_langevin(
  denoise: Denoiser, x: Latents, grid: Grid, keys: Keys, *,
  step_size: float = 0.2, steps: int = 100, trajectory: bool = False,
) -> Latents | Trajectory:
  """Langevin dynamics at each noise level in turn (Song & Ermon 2019, algorithm 1).

  x goes on to the next level with x / alpha as it is; to sigma = 0 by a denoising step (Jolicoeur-
  Martineau et al. 2021), and from alpha = 0 as alpha' x_0 + sigma' z. Draws (steps + 1) i and on
  belong to level i.

  Args:
    step_size: alpha_i / sigma_i^2 of the paper, 2 of `langevin_step`'s sizes: its epsilon 2e-5 over
      its last variance 0.01^2.
    steps: at each level, one network call each.
  """
  noise = noise_source(keys)

  def step(x, memory, here, there, index):
    draw = lambda k: noise((steps + 1) * index + k, x)

    def settle(carry, k):
      x, _ = carry
      x0 = denoise(x, *here)
      size = step_size / 2 * here[1] ** 2
      new = langevin_step(x, score(x, x0, here), size, draw(k))
      return (new.astype(x.dtype), x0.astype(x.dtype)), None

    (x, x0), _ = jax.lax.scan(settle, (x, x), jnp.arange(steps))

    def leave():
      return there[0] * denoise(x, *here).astype(x.dtype) + there[1] * draw(steps)

    stay = lambda: divide(there[0], here[0]) * x
    return jax.lax.cond(is_inner(here, there), stay, leave), memory, x0

  return walk(step, x, grid, trajectory=trajectory)
