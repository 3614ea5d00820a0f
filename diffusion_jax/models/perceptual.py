"""Losses of an autoencoder's images besides those of pixels: a discriminator and LPIPS.

The PatchGAN discriminator (Isola et al. 2017, sec. 3.2.2 and appendix 6.1.2) judges patches, of
70x70 pixels with three layers. GroupNorm replaces BatchNorm: parameters are the only state, and any
number of devices computes the same. Numbering is PyTorch's usual `main.N`, activations included.

LPIPS (Zhang et al. 2018, eq. 1) with VGG16 (Simonyan & Zisserman 2015), with nothing to train, is a
pure function of parameters by the names of the `lpips` package (net.slice1.0, ...).
"""

import dataclasses
import functools
from typing import Annotated

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from diffusion_jax.errors import require
from diffusion_jax.limits import Range
from diffusion_jax.models.config import NetworkConfig, Width
from diffusion_jax.models.layers import Conv, Function, in_turn
from diffusion_jax.models.norms import GroupNorm
from diffusion_jax.types import Images, Params, PerExample


@dataclasses.dataclass(frozen=True)
class DiscriminatorConfig(NetworkConfig):
  """`n_layers` convolutions of stride 2; channels double from `base_channels`, at most to 8x."""

  in_channels: Width = 3
  base_channels: Width = 64
  n_layers: Annotated[int, Range(1, 12)] = 3
  norm_num_groups: Width = 32

  def check(self) -> None:
    self.require(
      2 * self.base_channels % self.norm_num_groups == 0, 'norm_num_groups',
      f'must divide twice base_channels={self.base_channels}',
    )

  @property
  def smallest(self) -> int:
    """The least height and width of an image that leaves one output."""
    return 3 * 2**self.n_layers

  @property
  def widths(self) -> tuple[int, ...]:
    """Channels after each convolution but the last."""
    return tuple(self.base_channels * min(2**n, 8) for n in range(self.n_layers + 1))


LEAKY = functools.partial(jax.nn.leaky_relu, negative_slope=0.2)


class Discriminator(nnx.Module):
  """Images [b h w 3] in [-1, 1] -> logits [b h' w' 1], positive for real patches."""

  def __init__(self, config: DiscriminatorConfig, **kw):
    init = nnx.initializers.normal(0.02)  # As in the paper, appendix 6.2.
    widths = config.widths
    conv = lambda i, o, **more: Conv(i, o, 4, init=init, **more, **kw)
    leaky = lambda: Function(LEAKY)
    layers = [conv(config.in_channels, widths[0], stride=2), leaky()]
    for n in range(1, len(widths)):
      stride = 2 if n < config.n_layers else 1
      layers += [
        conv(widths[n - 1], widths[n], stride=stride, use_bias=False),
        GroupNorm(config.norm_num_groups, widths[n], 1e-5, **kw),
        leaky(),
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
    return in_turn(self.main, images)


# Convolutions by their number in VGG16's feature stack, and channels, per slice. Each slice but the
# first starts with a 2x2 maximum.
SLICES = (
  ((0, 2), 64), ((5, 7), 128), ((10, 12, 14), 256), ((17, 19, 21), 512), ((24, 26, 28), 512),
)
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
"""From [-1, 1] to the channel statistics of ImageNet."""


def lpips_shapes() -> dict[str, jax.ShapeDtypeStruct]:
  """Shape of every parameter by dotted name."""
  shapes, i = {}, 3
  for n, (layers, o) in enumerate(SLICES):
    for layer in layers:
      shapes[f'net.slice{n + 1}.{layer}.kernel'] = (3, 3, i, o)
      shapes[f'net.slice{n + 1}.{layer}.bias'] = (o,)
      i = o
    shapes[f'lin{n}.model.1.kernel'] = (1, 1, o, 1)
  return {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}


def lpips(params: Params, a: Images, b: Images) -> PerExample:
  """Perceptual distance of images a and b [b h w 3] in [-1, 1], at least 16x16 -> [b], >= 0."""
  require(
    a.shape == b.shape and a.ndim == 4 and a.shape[-1] == 3 and min(a.shape[1:3]) >= 16,
    f'LPIPS compares two equal shapes [b h w 3] of at least 16x16, not {a.shape} and {b.shape}.',
  )
  x = (jnp.concatenate([a, b]) - jnp.asarray(SHIFT, a.dtype)) / jnp.asarray(SCALE, a.dtype)
  total = jnp.zeros(a.shape[0], jnp.float32)
  for n, (layers, _) in enumerate(SLICES):
    x = x if n == 0 else _max_pool(x)
    for layer in layers:
      x = jax.nn.relu(_conv(params, f'net.slice{n + 1}.{layer}', x))
    first, second = jnp.split(_unit(x.astype(jnp.float32)), 2)
    weights = params[f'lin{n}.model.1.kernel'].reshape(-1)
    total += (jnp.square(first - second) @ weights).mean((1, 2))
  return total


def _conv(params: Params, name: str, x: jax.Array) -> jax.Array:
  kernel, bias = (params[f'{name}.{leaf}'].astype(x.dtype) for leaf in ('kernel', 'bias'))
  y = lax.conv_general_dilated(
    x, kernel, (1, 1), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC')
  )
  return y + bias


def _max_pool(x: jax.Array) -> jax.Array:
  b, h, w, c = x.shape
  x = x[:, : h // 2 * 2, : w // 2 * 2]
  return x.reshape(b, h // 2, 2, w // 2, 2, c).max((2, 4))  # Its gradient needs no scatter.


def _unit(x: jax.Array) -> jax.Array:
  """Divide by the length over channels. Where all are zero the gradient is zero, not NaN."""
  squares = jnp.square(x).sum(-1, keepdims=True)
  return x / (jnp.sqrt(jnp.maximum(squares, 1e-30)) + 1e-10)
