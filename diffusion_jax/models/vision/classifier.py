"""A small residual network that names classes; what it sees before its last layer are features.

One of noised z, by which samples are guided, is told how much noise there is.
"""

import dataclasses
from typing import Annotated

import jax
import jax.numpy as jnp
from flax import nnx

from diffusion_jax.limits import Length
from diffusion_jax.models.config import (
  Edge,
  Factor,
  Layers,
  NetworkConfig,
  Width,
  Widths,
  check_size,
)
from diffusion_jax.models.layers import (
  Conv,
  Downsample2D,
  ResnetBlock2D,
  TimestepEmbedding,
  linear,
  timestep_embedding,
)
from diffusion_jax.models.network import Blocks
from diffusion_jax.models.norms import GroupNorm
from diffusion_jax.types import Latents, PerExample


@dataclasses.dataclass(frozen=True)
class ClassifierConfig(NetworkConfig):
  """block_out_channels: of each level; every one but the last ends by halving height and width.

  image_size: in pixels, in training; patch_size: pixels that the first layer merges. class_names:
  of the logits, in order. noised: '' for clean images, else the space (`registry.SPACES`) whose
  noised z, of in_channels, it sees, whose places are then its pixels; scaling_factor: of the
  autoencoder of that space, 1 for none.
  """

  block_out_channels: Widths = (32, 64, 128)
  layers_per_block: Layers = 1
  norm_num_groups: Width = 8
  image_size: Edge = 64
  patch_size: Edge = 2
  class_names: tuple[Annotated[str, Length(0, 200)], ...] = ()
  noised: Annotated[str, Length(0, 50)] = ''
  in_channels: Width = 3
  scaling_factor: Factor = 1.0

  def check(self) -> None:
    self.check_blocks(self.layers_per_block * len(self.block_out_channels))
    self.check_groups()
    self.require(
      self.image_size % self.factor == 0, 'image_size',
      f'must be a multiple of {self.factor}, by which patch_size and the levels divide it',
    )
    self.require(
      len(set(self.class_names)) == len(self.class_names), 'class_names', 'must name a class once'
    )
    self.require(
      bool(self.noised) or self.in_channels == 3, 'in_channels', 'must be 3, those of images'
    )

  @property
  def factor(self) -> int:
    """Pixels along the edge of one place of the last level."""
    return self.patch_size * 2 ** (len(self.block_out_channels) - 1)

  @property
  def time_features(self) -> int | None:
    """Width of the embedding of the noise; None for a network of clean images."""
    return 4 * self.block_out_channels[0] if self.noised else None


class Level(nnx.Module):
  """Residual blocks, and halving but for the last level."""

  def __init__(self, config: ClassifierConfig, into: int, out: int, *, last: bool, **kw):
    self.resnets = nnx.List([
      ResnetBlock2D(
        out if i else into, out, groups=config.norm_num_groups, epsilon=1e-5,
        time_features=config.time_features, **kw,
      ) for i in range(config.layers_per_block)
    ])
    self.downsample = None if last else Downsample2D(out, **kw)


class Classifier(Blocks):
  """Residual network (He et al. 2016) with group norms and a mean over all places at its end."""

  def __init__(self, config: ClassifierConfig, **kw):
    super().__init__(**kw)
    self.config, p, widths = config, config.patch_size, config.block_out_channels
    into = (widths[0], *widths)
    self.conv_in = Conv(config.in_channels, widths[0], p, stride=p, padding=0, **kw)
    self.time_embedding = (
      TimestepEmbedding(widths[0], config.time_features, **kw) if config.noised else None
    )
    self.levels = nnx.List([
      Level(config, into[i], width, last=i == len(widths) - 1, **kw)
      for i, width in enumerate(widths)
    ])
    self.norm_out = GroupNorm(config.norm_num_groups, widths[-1], 1e-5, **kw)
    self.head = linear(widths[-1], len(config.class_names), **kw)

  def features(self, x: Latents, t: PerExample | None = None) -> jax.Array:
    """As a call, but return the input of the last layer, [b d], float32.

    UserError unless height and width are multiples of the config's factor.
    """
    config = self.config
    check_size(x.shape, config.in_channels, config.factor, 'Images of a classifier')
    return self.run_all(self._features, x, t)

  def _features(self, x: Latents, t: PerExample | None) -> jax.Array:
    time = [] if self.time_embedding is None else [
      self.time_embedding(timestep_embedding(t, self.config.block_out_channels[0]))
    ]
    x = self.conv_in(x)
    for level in self.levels:
      for block in level.resnets:
        x = self.run(block, x, *time)
      x = x if level.downsample is None else self.run(level.downsample, x)
    return self.norm_out(x, activate=True).astype(jnp.float32).mean(axis=(1, 2))

  def __call__(self, x: Latents, t: PerExample | None = None) -> tuple[jax.Array, jax.Array]:
    """Pixels in [-1, 1] [b h w 3] -> (features [b d], logits [b classes]), float32.

    Of one that is `noised`: z of unit variance [b h w c] and t [b] in [0, 1000], which grows with
    the noise.
    """
    features = self.features(x, t)
    return features, self.head(features).astype(jnp.float32)
