"""A denoiser: two convolutions, and between them the time and the mean of the text."""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
from flax import nnx

from diffusion_jax.models.denoiser import Denoiser
from diffusion_jax.models.network import PLAIN
from diffusion_jax.registry import NETWORKS, register


@dataclasses.dataclass(frozen=True)
class SmallConfig:
  """sample_size: edge of x in training. Channels of x, of the result and between; of the text."""

  sample_size: int = 8
  in_channels: int = 4
  out_channels: int = 4
  width: int = 8
  text_width: int = 16
  factor: ClassVar[int] = 1

  @property
  def conditions(self):
    """Fields of the condition that it reads, with their shapes."""
    return {'text': (None, self.text_width)}


class Small(Denoiser):
  """x [b h w c], t [b], text [b l d] -> [b h w o]."""

  def __init__(self, config: SmallConfig, *, compute=PLAIN, rngs):
    super().__init__(compute=compute, rngs=rngs)
    self.config = config
    types = {'dtype': compute.dtype, 'param_dtype': compute.param_dtype, 'rngs': rngs}
    self.conv_in = nnx.Conv(config.in_channels, config.width, (3, 3), **types)
    self.time = nnx.Linear(1, config.width, **types)
    self.text = nnx.Linear(config.text_width, config.width, **types)
    self.conv_out = nnx.Conv(config.width, config.out_channels, (3, 3), **types)

  def __call__(self, x, t, condition):
    x = self.join(x, t, condition)
    h = self.time(t[:, None].astype(jnp.float32) / 1000) + self.text(condition.text.mean(1))
    return self.conv_out(nnx.silu(self.conv_in(x) + h[:, None, None]))


register(NETWORKS, 'small', f'{__name__}:Small')
