"""What the transformer denoisers share: patches, positions, adaLN-zero and feed-forward layers."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from diffusion_jax.layout import constrain
from diffusion_jax.models.attention import Nothing
from diffusion_jax.models.checks import MOST, require
from diffusion_jax.models.layers import linear

zeros = nnx.initializers.zeros_init()


def normalize(x: jax.Array, epsilon: float = 1e-6) -> jax.Array:
  """LayerNorm without parameters (Ba et al. 2016) over the last axis, statistics in float32."""
  y = x.astype(jnp.float32)
  y = y - y.mean(-1, keepdims=True)
  return (y * lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + epsilon)).astype(x.dtype)


def modulate(x: jax.Array, shift: jax.Array, scale: jax.Array) -> jax.Array:
  """x (1 + scale) + shift (Perez et al. 2018, eq. 1): x [b n c], shift and scale [b 1 c]."""
  return x * (1 + scale) + shift


class Modulation(nnx.Module):
  """Condition [b c] -> `parts` arrays [b 1 c] of shifts, scales and gates, all zero at first.

  With gates at zero every block starts as the identity: adaLN-zero (Peebles & Xie 2023, sec. 3.2).
  """

  def __init__(self, features: int, parts: int, **kw):
    self.linear = linear(features, parts * features, init=zeros, **kw)
    self.parts = parts

  def __call__(self, condition: jax.Array) -> list[jax.Array]:
    return jnp.split(self.linear(nnx.silu(condition))[:, None], self.parts, axis=-1)


class GELU(nnx.Module):
  """GELU in its tanh approximation (Hendrycks & Gimpel 2016, sec. 2) of a dense layer."""

  def __init__(self, in_features: int, out_features: int, **kw):
    self.proj = linear(in_features, out_features, **kw)

  def __call__(self, x: jax.Array) -> jax.Array:
    return jax.nn.gelu(constrain(self.proj(x), 'hidden'), approximate=True)


class FeedForward(nnx.Module):
  """GELU at 4 times the width and back: [b n c] -> [b n c]."""

  def __init__(self, features: int, **kw):
    hidden = 4 * features
    self.net = nnx.List(
      [GELU(features, hidden, **kw), Nothing(), linear(hidden, features, **kw)]
    )

  def __call__(self, x: jax.Array) -> jax.Array:
    return constrain(self.net[2](self.net[0](x)), 'tokens')


def sincos_positions(rows: np.ndarray, columns: np.ndarray, features: int) -> jax.Array:
  """Sinusoids of positions in the plane, float32: [h] and [w] -> [h w features].

  The first half of the features tells the column, the second the row; each is sines, then cosines,
  of frequencies 10000^(-4i/features) (Vaswani et al. 2017, sec. 3.5). `features` must be a
  multiple of 4.
  """
  def along(positions: np.ndarray) -> jax.Array:
    frequencies = 10_000.0 ** -(np.arange(features // 4) / (features // 4))
    angles = np.asarray(positions, np.float64)[:, None] * frequencies
    return jnp.asarray(np.concatenate([np.sin(angles), np.cos(angles)], -1), jnp.float32)

  shape = (len(rows), len(columns), features // 2)
  column, row = along(columns)[None], along(rows)[:, None]
  return jnp.concatenate([jnp.broadcast_to(column, shape), jnp.broadcast_to(row, shape)], -1)


def grid_positions(cells: int, trained_cells: int) -> np.ndarray:
  """Where `cells` patches lie along an axis that has `trained_cells` of them in training."""
  # In float32, and divided twice, as in the published code: its rounding is part of the table.
  return np.arange(cells, dtype=np.float32) / np.float32(cells / trained_cells)


def unpatch(x: jax.Array, grid: tuple[int, int], patch: int) -> jax.Array:
  """Tokens [b h*w patch*patch*c] -> image [b h*patch w*patch c]."""
  h, w = grid
  x = x.reshape(x.shape[0], h, w, patch, patch, -1).swapaxes(2, 3)
  return x.reshape(x.shape[0], h * patch, w * patch, -1)


def check_input(config: Any, x: jax.Array, t: jax.Array) -> None:
  """Raises UserError unless x is [b h w c] of whole patches and t is [b]."""
  c, patch = config.in_channels, config.patch_size
  require(x.ndim == 4 and x.shape[-1] == c,
          f'The latents must have shape [b h w {c}], not {list(x.shape)}.')
  require(
    x.shape[1] % patch == 0 and x.shape[2] % patch == 0 and x.shape[1] * x.shape[2] > 0,
    f'The latents of {x.shape[1]}x{x.shape[2]} cannot be cut into patches: height and width must '
    f'be multiples of patch_size={patch}.',
  )
  require(t.shape == x.shape[:1], f'The times must have shape [{x.shape[0]}], not {t.shape}.')


def check_width(config: Any) -> None:
  """Raises UserError unless sines and cosines of both axes fill the width."""
  require(
    config.features <= MOST,
    f'{type(config).__name__}: num_attention_heads * attention_head_dim is {config.features:,}; '
    f'it may be {MOST:,}.',
  )
  require(
    config.features % 4 == 0,
    f'{type(config).__name__}: num_attention_heads * attention_head_dim must be a multiple of 4, '
    f'not {config.features}.',
  )
  require(
    config.sample_size % config.patch_size == 0,
    f'{type(config).__name__}.sample_size={config.sample_size} must be a multiple of '
    f'patch_size={config.patch_size}.',
  )
