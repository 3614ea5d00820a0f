"""PatchGAN discriminator (Isola et al. 2017, sec. 3.2.2 and appendix 6.1.2), for the autoencoder.

Each output judges one patch of the image (70x70 pixels with three layers). GroupNorm stands where
the paper has BatchNorm: parameters are then the only state, and a step on many devices is the same
computation as on one. Numbering follows the usual PyTorch `main.N`, activations included.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from diffusion_jax.models.attention import Nothing
from diffusion_jax.models.checks import MOST_LEVELS, positive, require
from diffusion_jax.models.layers import Conv
from diffusion_jax.models.norms import GroupNorm
from diffusion_jax.types import Images


@dataclasses.dataclass(frozen=True)
class DiscriminatorConfig:
  """`n_layers` convolutions of stride 2; channels double from `base_channels`, at most to 8x."""

  in_channels: int = 3
  base_channels: int = 64
  n_layers: int = 3
  norm_num_groups: int = 32

  def __post_init__(self):
    positive(self, 'in_channels', 'base_channels', 'norm_num_groups')
    positive(self, 'n_layers', most=MOST_LEVELS)
    require(
      2 * self.base_channels % self.norm_num_groups == 0,
      f'DiscriminatorConfig.norm_num_groups={self.norm_num_groups} must divide twice base_channels'
      f'={self.base_channels}.',
    )

  @property
  def smallest(self) -> int:
    """The least height and width of an image that leaves one output."""
    return 3 * 2**self.n_layers

  @property
  def widths(self) -> tuple[int, ...]:
    """Channels after each convolution but the last."""
    return tuple(self.base_channels * min(2**n, 8) for n in range(self.n_layers + 1))


class LeakyReLU(Nothing):
  """max(x, 0.2 x)."""

  def __call__(self, x: jax.Array) -> jax.Array:
    return jax.nn.leaky_relu(x, 0.2)


class Discriminator(nnx.Module):
  """Images [b h w 3] in [-1, 1] -> logits [b h' w' 1], positive for real patches."""

  def __init__(
    self, config: DiscriminatorConfig, *, dtype=jnp.float32, param_dtype=jnp.float32,
    rngs: nnx.Rngs,
  ):
    kw = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
    init = nnx.initializers.normal(0.02)  # As in the paper, appendix 6.2.
    widths = config.widths
    conv = lambda i, o, **more: Conv(i, o, 4, init=init, **more, **kw)
    layers = [conv(config.in_channels, widths[0], stride=2), LeakyReLU()]
    for n in range(1, len(widths)):
      stride = 2 if n < config.n_layers else 1
      layers += [
        conv(widths[n - 1], widths[n], stride=stride, use_bias=False),
        GroupNorm(config.norm_num_groups, widths[n], 1e-5, **kw),
        LeakyReLU(),
      ]
    self.main = nnx.List([*layers, conv(widths[-1], 1)])
    self.config = config

  def __call__(self, images: Images) -> jax.Array:
    smallest = self.config.smallest
    require(
      images.ndim == 4 and min(images.shape[1:3]) >= smallest,
      f'The discriminator with {self.config.n_layers} layers needs images of at least '
      f'{smallest}x{smallest}, not {list(images.shape)}; use fewer layers or larger images.',
    )
    x = images
    for layer in self.main:
      x = layer(x)
    return x
