"""Denoisers D(x, alpha, sigma) -> x_0: a network's, and their change by guidance.

Guidance maps a denoiser to a denoiser, so samplers and likelihoods know nothing of it. It acts on
estimates of x_0: epsilon, v and the score are affine in x_0 at a given x, and the weights of an
extrapolation sum to 1, so extrapolating any of them is the same.

A scale is a Python number, or an array [] or [b], possibly traced: other values need no new
compilation.
"""

import math
import numbers
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from diffusion_jax import registry
from diffusion_jax.diffusion.parameterization import RESCALE_SPACES, Parameterization, expand
from diffusion_jax.types import Latents, PerExample, Text

Denoiser = Callable[[Latents, jax.Array, jax.Array], Latents]
"""D(x [b h w c], alpha [], sigma []) -> estimate of x_0 [b h w c]."""

TextDenoiser = Callable[[Latents, jax.Array, jax.Array, Text], Latents]
"""The same, under a condition: text [b l d], or any tree of arrays [b ...]."""

Label = Callable[[jax.Array, jax.Array], jax.Array]
"""(alpha, sigma), [] or [b] -> the label of the noise that a network sees, of their shape."""

Scale = float | jax.Array

Interval = tuple[Scale, Scale]
"""(low, high): noise levels sigma / alpha that are guided, low < sigma / alpha <= high."""

Others = Sequence[tuple[Denoiser, Scale]]

Score = Callable[[Latents, jax.Array, jax.Array], PerExample]
"""(x [b ...], alpha [], sigma []) -> [b], for each a log-probability up to a constant."""

When = Callable[[jax.Array, jax.Array], jax.Array]
"""(alpha [], sigma []) -> bool []."""


def make_denoiser(
  network: Callable[[Latents, jax.Array], jax.Array], parameterization: Parameterization,
  label: Label, *, variance: bool = False,
) -> Denoiser:
  """`network(x, label [b])` as a denoiser; computes in x's dtype outside the network.

  An output of twice x's channels holds a learned variance, dropped unless `variance`, which gives
  (x_0, fraction [b ...] in [0, 1] of the larger variance) as for `ddpm` (Nichol & Dhariwal 2021,
  eq. 15).
  """

  def denoise(x, alpha, sigma):
    labels = jnp.broadcast_to(label(alpha, sigma), x.shape[:1])
    output = parameterization.predict(network, x, alpha, sigma, labels).astype(x.dtype)
    output, more = output[..., : x.shape[-1]], output[..., x.shape[-1] :]
    x0 = parameterization.to_x0(output, x, alpha, sigma)
    return (x0, jnp.clip((more + 1) / 2, 0, 1)) if variance else x0

  return denoise


def classifier_free(
  denoise: TextDenoiser, text: Text, negative: Text, scale: Scale, *, image: Text | None = None,
  image_scale: Scale = 1.0, others: Others = (), rescale: Scale = 0.0, rescale_in: str = 'sample',
  interval: Interval | None = None,
) -> Denoiser:
  """Classifier-free guidance (Ho & Salimans 2022, eq. 6): negative + scale (text - negative).

  A scale that is the number 1 is the conditional model and costs one network call a step; any
  other costs one call on a batch twice as large, within the interval if there is one. With an
  image, that is edited: negative + image_scale (image - negative) + scale (text - image), in one
  call on a batch three times as large (Brooks et al. 2023, eq. 3).

  Args:
    text: [b l d], or any tree of arrays [b ...] that the denoiser takes.
    negative: like text: the null caption or a negative prompt.
    image: like text: the condition with the image that `text` edits, alone.
    others: pairs (worse, s), each of which adds s (conditional - worse) at the cost of a call. For
      a worse version of the model that is autoguidance with the scale 1 + s (Karras et al. 2024,
      section 4); for the same network whose self-attention maps are in part the identity it is
      perturbed-attention guidance (Ahn et al. 2024).
    rescale: phi in [0, 1] of Lin et al. 2024, section 3.4: how far the deviation over each image,
      of the quantity `rescale_in`, goes back to what it was without guidance; they use 0.7.
    interval: noise levels that are guided (Kynkaanniemi et al. 2024, section 3); at all others
      only the conditional model is called, on the batch as it is.
  """
  registry.check(RESCALE_SPACES, rescale_in, 'rescale_in')
  plain = image is None and _is_number(scale, 1)
  conditional = lambda x, alpha, sigma: denoise(x, alpha, sigma, text)
  if plain and not others:
    return conditional
  conditions = (negative, text) if image is None else (text, image, negative)
  every = jax.tree.map(lambda *parts: jnp.concatenate(parts), *conditions)

  def predictions(x, alpha, sigma):
    """Two estimates, from the second of which to the first is guided, and what comes with them."""
    if plain:
      x0, more = _parts(conditional(x, alpha, sigma))
      return x0, x0, more
    x0, more = _parts(denoise(jnp.concatenate([x] * len(conditions)), alpha, sigma, every))
    if image is None:
      return x0[len(x) :], x0[: len(x)], [part[len(x) :] for part in more]
    edited, shown, free = jnp.split(x0, 3)
    # The same shift of both leaves their difference, which the text's scale multiplies.
    shift = (_like(image_scale, x) - 1) * (shown - free)
    return edited + shift, shown + shift, [part[: len(x)] for part in more]

  def guided(x, alpha, sigma):
    better, worse, more = predictions(x, alpha, sigma)
    x0 = worse + _like(scale, x) * (better - worse)
    for other, strength in others:
      x0 = x0 + _like(strength, x) * (better - other(x, alpha, sigma))
    if not _is_number(rescale, 0):
      x0 = _rescaled(x, x0, better, alpha, sigma, _like(rescale, x), rescale_in)
    return (x0, *more) if more else x0

  return guided if interval is None else _either(within(interval), guided, conditional)


GUIDED_BY = ('noised', 'estimate')
"""What a score is a function of: x, or the denoiser's estimate of x_0."""


def gradient_guidance(
  denoise: Denoiser, score: Score, scale: Scale, *, of: str = 'noised', when: When | None = None
) -> Denoiser:
  """Guidance by the gradient of a score, such as a classifier's: x_0 + scale sigma^2 / alpha grad.

  By Bayes' rule the score of p(x) p(y | x)^scale (Dhariwal & Nichol 2021, section 4.1), where
  `score` is log p(y | x). The gradient is by x, also of a score of the estimate, through the
  denoiser (Chung et al. 2023, eq. 8). At alpha = 0 there is nothing to score, and nothing changes.

  Args:
    of: 'noised': score(x, alpha, sigma); 'estimate': score(x_0, alpha, sigma), for networks that
      know no noise.
    when: noise levels that are guided, see `within` and `every_kth`; others cost nothing more.
  """
  registry.check(GUIDED_BY, of, 'of')

  def total(x, alpha, sigma):
    return score(x, alpha, sigma).sum()

  def guided(x, alpha, sigma):
    if of == 'estimate':
      x0, pull_back, more = jax.vjp(lambda x: _parts(denoise(x, alpha, sigma)), x, has_aux=True)
      (gradient,) = pull_back(jax.grad(total)(x0, alpha, sigma))
    else:
      x0, more = _parts(denoise(x, alpha, sigma))
      gradient = jax.grad(total)(x, alpha, sigma)
    some = jnp.asarray(alpha) > 0
    factor = jnp.where(some, sigma**2 / jnp.where(some, alpha, 1), 0).astype(x.dtype)
    x0 = x0 + _like(scale, x) * factor * gradient
    return (x0, *more) if more else x0

  return guided if when is None else _either(when, guided, denoise)


def within(interval: Interval) -> When:
  """Return whether a noise level lies in an interval."""
  def inside(alpha, sigma):
    # sigma / alpha without dividing, as alpha may be 0.
    low, high = map(jnp.asarray, interval)
    return (sigma > low * alpha) & (jnp.isinf(high) | (sigma <= high * alpha))

  return inside


def every_kth(grid: Sequence[jax.Array], k: int | jax.Array) -> When:
  """Return whether a noise level belongs to the first of each k steps of a sampler's grid.

  Levels between two of the grid belong to the step that passes them.
  """
  angle = lambda alpha, sigma: jnp.arctan2(jnp.asarray(sigma), jnp.asarray(alpha))
  levels = angle(*grid[:2])

  def chosen(alpha, sigma):
    # Below the distance of two levels, above rounding. Padding has the level 0.
    step = (levels >= angle(alpha, sigma) - 1e-6).sum() - 1
    return jnp.maximum(step, 0) % k == 0

  return chosen


def _either(when: When, inside: Denoiser, outside: Denoiser) -> Denoiser:
  def denoise(x, alpha, sigma):
    return jax.lax.cond(when(alpha, sigma), inside, outside, x, alpha, sigma)

  return denoise


def _parts(out) -> tuple[jax.Array, Sequence[jax.Array]]:
  """A denoiser's x_0, and its learned variance if there is one, which is not guided."""
  return (out[0], out[1:]) if isinstance(out, tuple) else (out, ())


def _is_number(scale: Scale, value: float) -> bool:
  """True for that very Python number, known when the program is traced."""
  return isinstance(scale, numbers.Real) and scale == value


def _like(scale: Scale, x: jax.Array) -> jax.Array:
  return expand(jnp.asarray(scale, x.dtype), x)


def _rescaled(x, x0, conditional, alpha, sigma, phi, space: str) -> jax.Array:
  """Guided x_0 with the deviation per image of the conditional one (Lin et al. 2024, 3.4).

  Each space's quantity is p x - q x_0 up to a factor; times k, x_0 becomes k x_0 + (1 - k) (p / q)
  x.
  """
  alpha, sigma = jnp.asarray(alpha, x.dtype), jnp.asarray(sigma, x.dtype)
  p, q = {
    'sample': (0.0, jnp.ones_like(alpha)),
    'epsilon': (1.0, alpha),
    'v_prediction': (alpha, alpha**2 + sigma**2),
  }[space]
  variance = lambda x0: jnp.var(p * x - q * x0, axis=tuple(range(1, x.ndim)), keepdims=True)
  guided = variance(x0)
  some = guided > 0
  # 1 where nothing varies, inside the root: its gradient at 0 would be infinite.
  ratio = jnp.sqrt(jnp.where(some, variance(conditional), 1) / jnp.where(some, guided, 1))
  # At alpha = 0 epsilon is x whatever x_0 is: there is nothing to rescale.
  k = jnp.where(q > 0, phi * ratio + 1 - phi, 1)
  return k * x0 + (1 - k) * (p / jnp.where(q > 0, q, 1)) * x


def static_threshold(
  denoise: Denoiser, limit: float = 1.0, *, keep_estimate: bool = False
) -> Denoiser:
  """Clip the estimate to [-limit, limit], the range of the data (Saharia et al. 2022, 2.3).

  keep_estimate: return (clipped, unclipped), for `ddim` with keep_epsilon.
  """
  return _of_x0(denoise, lambda x0: jnp.clip(x0, -limit, limit), keep_estimate)


def dynamic_threshold(
  denoise: Denoiser, percentile: float = 0.95, limit: float = math.inf, *,
  keep_estimate: bool = False,
) -> Denoiser:
  """Clip each image at its own percentile, scaled to [-1, 1] (Saharia et al. 2022, 2.3).

  clip(x_0, -s, s) / s, s the percentile (fraction in [0, 1]; 1 scales without clipping) of an
  image's absolute values, at least 1 and at most `limit`, even below 1 (sample_max_value of
  diffusers). For pixels in [-1, 1]; latents have no such range.
  """
  def threshold(x0):
    s = jnp.quantile(jnp.abs(x0.reshape(len(x0), -1)), percentile, axis=1)
    s = expand(jnp.minimum(jnp.maximum(s, 1), limit), x0)
    return jnp.clip(x0, -s, s) / s

  return _of_x0(denoise, threshold, keep_estimate)


def _of_x0(denoise: Denoiser, function: Callable, keep_estimate: bool) -> Denoiser:
  def changed(x, alpha, sigma):
    out = denoise(x, alpha, sigma)
    if keep_estimate:
      return function(out), out
    x0, more = _parts(out)
    return (function(x0), *more) if more else function(x0)

  return changed
