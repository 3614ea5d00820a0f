"""A residual network on vectors, the denoiser of points in the plane."""

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import nnx

from diffusion_jax.models.config import Factor, Layers, NetworkConfig, Width
from diffusion_jax.models.layers import linear
from diffusion_jax.types import Condition

FREQUENCIES = 8


@dataclasses.dataclass(frozen=True)
class MLPConfig(NetworkConfig):
  """`depth` blocks of `width`. label_range: the label's largest absolute value."""

  in_features: Width = 2
  out_features: Width = 2
  width: Width = 128
  depth: Layers = 3
  label_range: Factor = 1.0


class Block(nnx.Module):
  """h + fc2(silu(fc1(silu(h)) + time(t))): [b width], [b 2 FREQUENCIES] -> [b width]."""

  def __init__(self, width: int, **kw):
    self.fc1 = linear(width, width, **kw)
    self.time = linear(2 * FREQUENCIES, width, **kw)
    self.fc2 = linear(width, width, **kw)

  def __call__(self, h: jax.Array, t: jax.Array) -> jax.Array:
    return h + self.fc2(nnx.silu(self.fc1(nnx.silu(h)) + self.time(t)))


class MLP(nnx.Module):
  """A denoiser of points: x [b in], t [b] as sinusoids of 1/2 to 2^(FREQUENCIES-2) periods."""

  def __init__(self, config: MLPConfig, **kw):
    self.config = config
    self.conv_in = linear(config.in_features, config.width, **kw)
    self.blocks = nnx.List([Block(config.width, **kw) for _ in range(config.depth)])
    self.conv_out = linear(config.width, config.out_features, **kw)

  def __call__(self, x: jax.Array, t: jax.Array, condition: Condition | None = None) -> jax.Array:
    """Return [b out]; it is conditioned on nothing."""
    del condition
    angles = t[:, None] / self.config.label_range * math.pi * 2.0 ** jnp.arange(-1, 7)
    t = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)
    h = self.conv_in(x)
    for block in self.blocks:
      h = block(h, t)
    return self.conv_out(nnx.silu(h))
