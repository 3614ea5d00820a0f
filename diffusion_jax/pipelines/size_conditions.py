"""Sizes in pixels that Stable Diffusion XL, its refiner and PixArt-alpha are conditioned on."""

import dataclasses
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np

from diffusion_jax.errors import UserError, require
from diffusion_jax.pipelines.conditioners import Conditioner
from diffusion_jax.pipelines.options import AESTHETIC, SIZING

XL = ('original_size', 'crop', 'target_size')
REFINER = ('original_size', 'crop', 'aesthetic_score', 'negative_aesthetic_score')
PIXART = ('target_size',)
COUNTS = {6: XL, 5: REFINER}
"""How many numbers a U-Net is given -> what they are."""


@dataclasses.dataclass(frozen=True)
class Sizes(Conditioner):
  """Sizes [b 6]: original height and width, top and left of the crop, target height and width
  (Podell et al. 2023, sec. 2.2), or, of the refiner, [b 5] with an aesthetic score for the target.

  reads: those of the options of sampling that have an effect. Where nothing is said, images are
  whole, and the score is AESTHETIC.
  """

  reads: tuple[str, ...] = XL
  fields: ClassVar = ('sizes',)
  usual: ClassVar = True

  @classmethod
  def build(cls, options, context):
    require(not options, 'settings.conditioners.sizes takes no options; leave it empty.')
    return cls(), {}

  @classmethod
  def of(cls, denoiser: Any, pooled: int) -> 'Sizes':
    """Return the sizes of a denoiser with this config, beside pooled texts of this width.

    Raises:
      UserError: the widths leave neither five numbers nor six.
    """
    each = getattr(denoiser, 'addition_time_embed_dim', None)
    if each is None:
      return cls(PIXART)
    total = denoiser.projection_class_embeddings_input_dim
    count, rest = divmod(total - pooled, each)
    require(
      not pooled or (count in COUNTS and not rest),
      f'denoiser.projection_class_embeddings_input_dim is {total}; it must be the width of the '
      f'pooled text, {pooled}, and six times addition_time_embed_dim {each}, or five times that of '
      'a refiner.',
    )
    return cls(COUNTS.get(count, XL))

  @property
  def aesthetic(self) -> bool:
    """Whether there is a score in place of the target's size."""
    return self.reads == REFINER

  @property
  def strength(self) -> float | None:
    """That of a refiner, which has learned the last steps alone."""
    return 0.3 if self.aesthetic else None

  def rows(self, request):
    told, count = request.sizing, len(request.prompts)
    drawn = request.height, request.width
    original = told.original or drawn
    spread = lambda *numbers: np.tile(np.asarray(numbers, np.float32), (count, 1))
    if not self.aesthetic:
      return {'sizes': spread(*original, *told.crop, *(told.target or drawn))}
    return {
      'sizes': spread(*original, *told.crop, told.aesthetic),
      # As in diffusers, the crop is of the prompt alone.
      'negative_sizes': spread(*original, 0, 0, told.negative_aesthetic),
    }

  def encode(self, weights, rows):
    return {'sizes': rows['sizes']}

  def pair(self, weights, rows, clip_skip=0):
    return tuple({'sizes': rows.get(name, rows['sizes'])} for name in ('sizes', 'negative_sizes'))

  def same(self, rows):
    return not self.aesthetic or bool((rows['sizes'] == rows['negative_sizes']).all())

  def of_batch(self, weights, batch, key=None):
    """'sizes' [b 6] of what images were cut from; all have the usual score."""
    sizes = batch['sizes']
    if not self.aesthetic:
      return {'sizes': sizes}
    score = jnp.full((len(sizes), 1), AESTHETIC, sizes.dtype)
    return {'sizes': jnp.concatenate([sizes[:, :4], score], axis=1)}

  def of_size(self, count, height, width):
    whole = jnp.tile(jnp.asarray([height, width, 0, 0, height, width], jnp.float32), (count, 1))
    return self.of_batch({}, {'sizes': whole})


def check_sizing(options: Any, sizes: Sizes | None) -> None:
  """Raise UserError for options of sampling that a model without those sizes does not read."""
  reads = () if sizes is None else sizes.reads
  for name, usual in SIZING.items():
    value = getattr(options, name)
    if value != usual and name not in reads:
      raise UserError(
        f'{name} is {value}, but the model is not conditioned on it; leave it at {usual!r}.'
      )
