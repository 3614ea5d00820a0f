"""Conditions that the denoiser knows nothing of: gradients of a score lead samples to them.

A guide is a conditioner whose name is an option of sampling, its scale, beside NAME_every. It gives
a score, whose gradient changes the denoiser's estimates (`diffusion.denoiser.gradient_guidance`).
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

import jax
import jax.numpy as jnp

from diffusion_jax.diffusion.denoiser import Score
from diffusion_jax.errors import UserError
from diffusion_jax.formats.clip import HALF
from diffusion_jax.models.network import Network
from diffusion_jax.models.text.clip import unit
from diffusion_jax.pipelines.conditioners import Conditioner
from diffusion_jax.types import Images, Weights

if TYPE_CHECKING:
  from diffusion_jax.models.text.tokenizer import Tokenize
  from diffusion_jax.pipelines.spaces import Space

CLIP_GUIDANCE = 'clip_guidance'
"""The name of the guide by CLIP, and of its option."""
GUIDING_CLIP = 'guiding_clip'
"""The role of its weights."""
SMALLEST = 0.5
"""The least edge of a cut-out, as a fraction of the image's."""


class Guide(Conditioner):
  """A condition by the gradient of a score, [b], of the noised z or of its estimate."""

  of: ClassVar[str] = 'noised'
  """One of `diffusion.denoiser.GUIDED_BY`."""

  def encode(self, weights, rows):
    return {}

  @abc.abstractmethod
  def score(
    self, weights: Weights, rows: Mapping[str, jax.Array], space: Space
  ) -> Score:
    """Return (z, alpha, sigma) -> log-probability of what each of the rows asks for; pure."""


def check_guides(conditioners: Mapping[str, Conditioner], names: Sequence[str]) -> None:
  """Raise UserError where a model lacks one of the guides whose scales are not 0."""
  for name in names:
    if name not in conditioners:
      raise UserError(
        f'{name} is given, but the model has no such guide; add one (`pipelines.adapters`), as the '
        'command sample does, or set it to 0.'
      )


def scores_of(
  conditioners: Mapping[str, Conditioner], names: Sequence[str], weights: Weights,
  rows: Mapping[str, jax.Array], space: Space,
) -> dict[str, tuple[Score, str]]:
  """Return (the score, what it is of) of each guide of these names."""
  guides = {name: conditioners[name] for name in names}
  return {name: (guide.score(weights, rows, space), guide.of) for name, guide in guides.items()}


@dataclasses.dataclass(frozen=True)
class CLIPGuide(Guide):
  """CLIP's similarity of the decoded estimate to the prompt, divided by CLIP's temperature.

  A scale of 1 so takes exp(logit_scale cos) for p(prompt | image). cutouts: random squares, of half
  the image's edges or more, over which it is averaged, the same for all images and others at each
  noise level; 0 for the whole image alone. mean, std: of the pixels in [0, 1] that CLIP sees.
  """

  networks: Mapping[str, Network] = dataclasses.field()
  tokenize: Tokenize
  mean: tuple[float, ...] = HALF
  std: tuple[float, ...] = HALF
  cutouts: int = 0
  of: ClassVar = 'estimate'

  def rows(self, request):
    return {f'{CLIP_GUIDANCE}_tokens': self.tokenize.batch(request.prompts)}

  def score(self, weights, rows, space):
    params, network = weights[GUIDING_CLIP], self.networks[GUIDING_CLIP]
    clip, size = network.bind(params), network.config.vision_config.image_size
    texts = unit(clip.encode_text(rows[f'{CLIP_GUIDANCE}_tokens'])[1].astype(jnp.float32))
    scale = jnp.exp(params['logit_scale'].astype(jnp.float32))

    def score(z, alpha, sigma):
      pixels = (space.decode(weights, z) + 1) / 2
      views = views_of(pixels, size, self.cutouts, alpha, sigma)
      views = (views - jnp.asarray(self.mean)) / jnp.asarray(self.std)
      found = clip.encode_image(views.reshape(-1, *views.shape[2:])).astype(jnp.float32)
      cosines = (unit(found).reshape(len(views), *texts.shape) * texts).sum(axis=-1)
      return scale * cosines.mean(axis=0)

    return score


def views_of(
  images: Images, size: int, cutouts: int, alpha: jax.Array, sigma: jax.Array
) -> jax.Array:
  """Return images [b h w c] as a network of that size sees them: whole, or cut out [n b s s c]."""
  b, h, w, c = images.shape
  whole = (b, size, size, c)
  if not cutouts:
    return jax.image.resize(images, whole, 'cubic', antialias=True)[None]

  def cut(key: jax.Array) -> jax.Array:
    side, top, left = jax.random.uniform(key, (3,))
    side = SMALLEST + (1 - SMALLEST) * side
    scale = size / (side * jnp.asarray([h, w], jnp.float32))
    start = jnp.stack([top, left]) * (1 - side) * jnp.asarray([h, w], jnp.float32)
    return jax.image.scale_and_translate(images, whole, (1, 2), scale, -start * scale, 'linear')

  level = (1e6 * jnp.arctan2(jnp.asarray(sigma), jnp.asarray(alpha))).astype(jnp.int32)
  keys = jax.random.split(jax.random.fold_in(jax.random.key(0), level), cutouts)
  return jax.vmap(cut)(keys)
