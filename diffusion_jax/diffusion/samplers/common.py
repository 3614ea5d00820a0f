"""Parts of all samplers: noise, trajectories, and moves between pairs (alpha, sigma).

A pair has the noise level r = sigma / alpha; y = x / alpha obeys dy = eps dr on the
probability-flow ODE (Song et al. 2021, eq. 13; Karras et al. 2022, eq. 1). In pairs the formulas
hold for any process, those of first order also from alpha = 0 and to sigma = 0.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from diffusion_jax.diffusion.denoiser import Denoiser
from diffusion_jax.diffusion.samplers.grid import Grid
from diffusion_jax.errors import UserError
from diffusion_jax.types import Latents

Pair = tuple[jax.Array, jax.Array]
"""(alpha [], sigma [])."""

Noise = Callable[[jax.Array, Latents], Latents]
"""(number of the noise, an array of its shape and dtype) -> unit Gaussian noise."""

Keys = jax.Array | Noise | None
"""One random key per image [b], or the noise itself; None for a sampler without noise."""

Sampler = Callable
"""sampler(denoise, x, grid, keys, *, trajectory=False, **options) -> x, or a `Trajectory`."""


@dataclasses.dataclass(frozen=True)
class SamplerInfo:
  """A row of `registry.SAMPLERS`; documentation is made from it.

  order: the power of the step by which the error falls on a smooth grid: of the sample, or, of
  stochastic samplers, of the variance of Gaussian data; None if it does not fall to 0. Steps
  counted by an option (restart) must grow alike. calls: of the network in each step; None where the
  sampler chooses its steps. more_calls: extra ones in the first steps.
  """

  function: Sampler
  order: int | None
  calls: int | None
  description: str
  citation: str
  stochastic: bool = False
  more_calls: int = 0


class Trajectory(NamedTuple):
  """The result with trajectory=True: sample [b ...], states [n b ...] after every step.

  x0 [n b ...]: the estimate each step began with. alphas, sigmas [n]: the pairs of the states.
  """

  sample: Latents
  states: jax.Array
  x0: jax.Array
  alphas: jax.Array
  sigmas: jax.Array


def unit_noise(keys: jax.Array, index, like: jax.Array, distribution=jax.random.normal):
  """The index-th noise [b ...] of each key of keys [b]."""
  one = lambda key: distribution(jax.random.fold_in(key, index), like.shape[1:], like.dtype)
  return jax.vmap(one)(keys)


def noise_source(keys: Keys) -> Noise:
  """Noise number i of an image depends on its key and on i alone, not on the batch it is in."""
  if callable(keys):
    return keys

  def noise(index, like):
    if keys is None:
      raise UserError('This sampler adds noise; give it one random key per image.')
    return unit_noise(keys, index, like)

  return noise


def as_arrays(x: Latents, grid: Grid) -> tuple[Latents, Grid]:
  """x and the grid as arrays of the wider dtype of both."""
  x, grid = jax.tree.map(jnp.asarray, (x, tuple(grid)))
  dtype = jnp.result_type(x, *grid[:2])
  return jax.tree.map(lambda part: part.astype(dtype), (x, grid))


def intervals(grid: Grid) -> tuple[Pair, Pair]:
  """The grid's steps: (alpha [n], sigma [n]) where each starts and where it ends."""
  alphas, sigmas, *_ = grid
  return (alphas[:-1], sigmas[:-1]), (alphas[1:], sigmas[1:])


def is_padding(pair: Pair) -> jax.Array:
  """True for (0, 0), neither data nor noise, with which `grid.padded` fills a grid up."""
  return (pair[0] == 0) & (pair[1] == 0)


def real_steps(here: Pair, there: Pair) -> jax.Array:
  """True for steps of the grid itself: not of its padding, nor after it is clean."""
  return (here[1] > 0) & ~is_padding(there)


def step_count(grid: Grid) -> jax.Array:
  """The number of steps of a grid, without its padding; one from a pair to itself counts."""
  return real_steps(*intervals(grid)).sum()


def moves(here: Pair, there: Pair) -> jax.Array:
  """True where a step leads anywhere; others are skipped."""
  apart = (here[0] != there[0]) | (here[1] != there[1])
  return apart & ~is_padding(here) & ~is_padding(there)


class Steps(NamedTuple):
  """The steps of a sampler on one grid.

  step: (x, carry, here, there, index, *extra) -> (x, carry, x_0). extra: trees of arrays [n ...]; a
  step gets its row. carry: x -> the first step's carry. taken: [n], the steps not skipped, unless
  those that move. ends: the pairs (alpha [n], sigma [n]) of start and end, unless the grid's.
  """

  step: Callable
  extra: tuple = ()
  carry: Callable[[Latents], Any] = lambda x: ()
  taken: jax.Array | None = None
  ends: tuple[Pair, Pair] | None = None


def scanned(make: Callable[..., Steps]) -> Sampler:
  """Make a sampler of make(denoise, grid, noise, *, **options) -> Steps, scanned along the grid.

  Steps from a pair to itself, and a grid's padding (`grid.padded`), are skipped: no network call, x
  and carry unchanged, x as x_0 in a `Trajectory`.
  """

  @functools.wraps(make)
  def sampler(
    denoise: Denoiser, x: Latents, grid: Grid, keys: Keys, *, trajectory: bool = False, **options
  ) -> Latents | Trajectory:
    x, grid = as_arrays(x, grid)
    steps = make(denoise, grid, noise_source(keys), **options)
    here, there = steps.ends or intervals(grid)

    def body(state, row):
      inputs, wanted = row

      def take():
        x, carry, x0 = steps.step(*state, *inputs)
        return (x, carry), (x, x0.astype(x.dtype)) if trajectory else ()

      def skip():
        return state, (state[0], state[0]) if trajectory else ()

      return jax.lax.cond(wanted, take, skip)

    inputs = (here, there, jnp.arange(len(here[0])), *steps.extra)
    wanted = moves(here, there) if steps.taken is None else steps.taken
    (x, _), rows = jax.lax.scan(body, (x, steps.carry(x)), (inputs, wanted))
    return Trajectory(x, *rows, *there) if trajectory else x

  return sampler


def divide(p, q) -> jax.Array:
  """p / q, and p where q = 0: for formulas that do not apply there, without NaN in gradients."""
  return p / jnp.where(q == 0, 1, q)


def combine(correction: jax.Array, values: tuple[Latents, ...]) -> Latents:
  """sum_j correction_j values_j, elementwise: a matrix product would round on accelerators."""
  return sum(c * value for c, value in zip(correction, values, strict=True))


def epsilon(x: Latents, x0: Latents, pair: Pair) -> Latents:
  """The noise in x = alpha x_0 + sigma eps, given the estimate of x_0; needs sigma > 0."""
  return divide(x - pair[0] * x0, pair[1])


def move(x: Latents, x0: Latents, here: Pair, there: Pair) -> Latents:
  """From pair to pair with x_0 and eps held (Song et al. 2021, eq. 12): alpha' x_0 + sigma' eps.

  DPM-Solver++(1), exact where the denoiser is constant; from alpha = 0 and to sigma = 0, too.
  """
  keep = there[1] / here[1]
  return keep * x + (there[0] - keep * here[0]) * x0


def straight(x: Latents, eps: Latents, here: Pair, there: Pair) -> Latents:
  """From pair to pair along dy = eps dr; needs alpha > 0."""
  scale = divide(there[0], here[0])
  return scale * x + (there[1] - scale * here[1]) * eps


def is_inner(here: Pair, there: Pair) -> jax.Array:
  """True where both ends have a finite, positive noise level, as higher orders need."""
  return (here[0] > 0) & (there[1] > 0)


def contraction(here: Pair, there: Pair) -> jax.Array:
  """r' / r in [0, 1): 0 from alpha = 0 and to sigma = 0."""
  return divide(here[0] * there[1], here[1] * there[0])


def ancestral(here: Pair, there: Pair, eta: float) -> tuple[jax.Array, jax.Array]:
  """(down, up): sigma to move to without noise, and the noise to add, down^2 + up^2 = sigma'^2.

  up = eta sigma' sqrt(1 - (r' / r)^2), at most sigma' (eta = 1: Song et al. 2021, eq. 16).
  """
  if not eta:
    return there[1], jnp.zeros_like(there[1])
  fraction = jnp.clip(eta**2 * (1 - contraction(here, there) ** 2), 0, 1)
  return there[1] * jnp.sqrt(1 - fraction), there[1] * jnp.sqrt(fraction)


def added_deviation(wanted: jax.Array, kept: jax.Array) -> jax.Array:
  """Deviation of noise that lifts `kept` to `wanted`: sqrt(wanted^2 - kept^2); 0 if tiny."""
  added = (wanted - kept) * (wanted + kept)
  some = added > 16 * jnp.finfo(added.dtype).eps * wanted**2
  return jnp.where(some, jnp.sqrt(jnp.where(some, added, 1)), 0)


def pair_between(here: Pair, there: Pair, direction: Pair) -> Pair:
  """The pair with direction's noise level on the process of `here` and `there`.

  Pairs between a grid's must lie on the process a network was trained on: the chord for VE (alpha =
  1) and flow (alpha + sigma = 1), the arc for VP (both of norm 1), continued beyond them.
  """
  (a, s), (a_next, s_next), (c, d) = here, there, direction
  along = divide(d * a - c * s, c * (s_next - s) - d * (a_next - a))
  on_chord = a + along * (a_next - a), s + along * (s_next - s)
  is_vp = (jnp.abs(a**2 + s**2 - 1) < 1e-6) & (jnp.abs(a_next**2 + s_next**2 - 1) < 1e-6)
  norm = jnp.where(is_vp, jnp.hypot(*on_chord), 1)
  return on_chord[0] / norm, on_chord[1] / norm


def pairs_at(grid: Grid, direction: Pair) -> Pair:
  """Pairs (alpha [...], sigma [...]) of direction's noise levels on the process of a grid."""
  alphas, sigmas, *_ = grid
  angles = -jnp.arctan2(sigmas, alphas)
  i = jnp.searchsorted(angles, -jnp.arctan2(direction[1], direction[0]), side='right') - 1
  i = jnp.clip(i, 0, step_count(grid) - 1)
  return pair_between((alphas[i], sigmas[i]), (alphas[i + 1], sigmas[i + 1]), direction)


def log_midpoint(here: Pair, there: Pair, target: Pair | None = None) -> Pair:
  """The pair halfway in log r from `here` to `target` (`there`); alpha > 0, target sigma > 0."""
  target = there if target is None else target
  level = jnp.sqrt(divide(here[1], here[0]) * divide(target[1], target[0]))
  return pair_between(here, there, (jnp.ones_like(level), level))
