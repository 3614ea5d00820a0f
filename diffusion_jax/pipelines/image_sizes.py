"""Which heights and widths of images a model of a space and a denoiser draws."""

import math
from typing import Any

from diffusion_jax.errors import UserError
from diffusion_jax.limits import EdgeRule
from diffusion_jax.models.network import Network
from diffusion_jax.pipelines.bins import nearest_bin
from diffusion_jax.pipelines.rules import edge_rule
from diffusion_jax.pipelines.spaces import Space
from diffusion_jax.pixels import size_like


class ImageSizes:
  """The sizes of a `pipelines.model.Diffusion`, in pixels, of its fields of these names."""

  space: Space
  denoiser: Network
  worse: Network | None
  size: tuple[int, int] | None

  @property
  def trained_size(self) -> tuple[int, int]:
    """(height, width) in pixels of the images of its training, the least where none is known."""
    if self.size is not None:
      return self.size
    size = getattr(self.denoiser.config, 'sample_size', None) or 1
    height, width = size if isinstance(size, (tuple, list)) else (size, size)
    return height * self.space.factor, width * self.space.factor

  @property
  def written_config(self) -> Any:
    """The denoiser's config with the size of the training images, where it can say that."""
    config = self.denoiser.config
    if self.size is None or not hasattr(config, 'trained_at'):
      return config
    return config.trained_at(*self.space.shape(*self.size)[:2])

  @property
  def edges(self) -> EdgeRule:
    """What heights and widths of images, in pixels, every network can take."""
    networks = (self.denoiser, self.worse) if self.worse else (self.denoiser,)
    return edge_rule(self.space.factor, *(network.config for network in networks))

  @property
  def multiple(self) -> int:
    """Pixels that height and width of images are multiples of."""
    return self.edges.multiple

  def size_of(self, height: int | None, width: int | None) -> tuple[int, int]:
    """Return (height, width), those that are not given as in training.

    Raises:
      UserError: one that the model cannot take, with the nearest that it can.
    """
    size, rule = (height or self.trained_size[0], width or self.trained_size[1]), self.edges
    if (height or width) and not rule.fits(*size):
      near = 'x'.join(map(str, rule.near(*size)))
      raise UserError(
        f'the size {size[0]}x{size[1]} cannot be halved as the model does: height and width must '
        f'be {rule}; the nearest such size is {near}.'
      )
    return size

  def drawn_size(
    self, height: int | None, width: int | None, binning: str = 'none'
  ) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return (the size to draw at, the size to cut out of that), as `binning` says.

    Raises:
      UserError: see `size_of`; with bins any size can be cut out.
    """
    size = height or self.trained_size[0], width or self.trained_size[1]
    if binning == 'none' or self.space.name != 'latents':
      return (self.size_of(height, width),) * 2
    drawn = nearest_bin(*size, getattr(self.denoiser.config, 'sample_size', None))
    return self.size_of(*drawn), size

  def size_like(self, height: int, width: int) -> tuple[int, int]:
    """Return the (height, width) that the model draws for a picture of that size: of its aspect,
    and about the area of the training images."""
    rule = self.edges
    return size_like(height, width, math.prod(self.trained_size), rule.multiple, rule.most)

  def tokens(self, height: int, width: int) -> int:
    """Return how many patches the denoiser reads of an image of height x width pixels."""
    patch = getattr(self.denoiser.config, 'patch_size', 1)
    return math.prod(self.space.shape(height, width)[:-1]) // patch**2
