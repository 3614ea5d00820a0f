"""Layers of many networks: convolutions, dense layers, residual blocks, embeddings.

Arrays are NHWC. Modules hold only parameters and compute as their `Compute` says. Submodules have
the names of diffusers' checkpoints, so conversion renames leaves.
"""

import math
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
from flax import nnx

from diffusion_jax.backend.cpu import add_bias, convolve
from diffusion_jax.models import kernels
from diffusion_jax.models.network import PLAIN, Compute
from diffusion_jax.models.norms import GroupNorm
from diffusion_jax.parallel.layout import constrain

# PyTorch's default, U(-1/sqrt(fan_in), 1/sqrt(fan_in)), from which the references were trained.
kernel_init = nnx.initializers.variance_scaling(1 / 3, 'fan_in', 'uniform')


class Conv(nnx.Module):
  """Square 2-D convolution, [b h w i] -> [b h' w' o]; the one place that computes convolutions.

  padding: symmetric, or ((top, bottom), (left, right)); of zeros, or as `network.TILING` says.
  Parameters: kernel [k k i o], bias [o].
  """

  def __init__(
    self, in_features: int, out_features: int, kernel_size: int = 3, *, stride: int = 1,
    padding: int | tuple[tuple[int, int], tuple[int, int]] = 1, use_bias: bool = True,
    init=kernel_init, compute: Compute = PLAIN, rngs: nnx.Rngs,
  ):
    shape = (kernel_size, kernel_size, in_features, out_features)
    self.kernel = nnx.Param(init(rngs.params(), shape, compute.param_dtype))
    self.bias = nnx.Param(jnp.zeros((out_features,), compute.param_dtype)) if use_bias else None
    self.stride = stride
    self.padding = ((padding, padding),) * 2 if isinstance(padding, int) else padding
    self.lora = nnx.data(None)
    self.dtype = compute.dtype
    self.wrapped = compute.tiling in ('y', 'both'), compute.tiling in ('x', 'both')
    self.heeds = 'tiling' if any(map(any, self.padding)) else None

  def __call__(self, x: jax.Array) -> jax.Array:
    x = x.astype(self.dtype)
    y = self.convolve(x, self.kernel[...])
    y = y if self.bias is None else add_bias(y, self.bias[...])
    return y if self.lora is None else y + self.lora(x, self.convolve, self.kernel[...])

  def convolve(self, x: jax.Array, kernel: jax.Array) -> jax.Array:
    """x [b h w i] with any kernel [k k i o] of this layer's window."""
    kernel = kernel.astype(self.dtype)
    if self._disjoint(x.shape):
      return _patches(x, self.stride) @ kernel.reshape(-1, kernel.shape[-1])
    padding, none = self.padding, (0, 0)
    if any(self.wrapped):
      axes = list(zip(self.padding, self.wrapped, strict=True))
      around = [pad if wraps else none for pad, wraps in axes]
      x = jnp.pad(x, (none, *around, none), mode='wrap')
      padding = [none if wraps else pad for pad, wraps in axes]
    return convolve(x, kernel, self.stride, tuple(padding))

  def _disjoint(self, shape: tuple[int, ...]) -> bool:
    """Return whether windows tile the input, so that the convolution is one matrix product."""
    k = self.kernel.shape[0]
    tiles = shape[1] % k == 0 and shape[2] % k == 0
    return k == self.stride and tiles and self.padding == ((0, 0), (0, 0))


def _patches(x: jax.Array, size: int) -> jax.Array:
  """Disjoint square patches: [b h w c] -> [b h/size w/size size*size*c]."""
  if size == 1:
    return x
  b, h, w, c = x.shape
  x = x.reshape(b, h // size, size, w // size, size, c).swapaxes(2, 3)
  return x.reshape(b, h // size, w // size, size * size * c)


def pointwise(in_features: int, out_features: int, **kw) -> Conv:
  """A 1x1 convolution."""
  return Conv(in_features, out_features, 1, padding=0, **kw)


class Linear(nnx.Module):
  """Dense layer, [... i] -> [... o]. Parameters: kernel [i o], bias [o]."""

  heeds = 'matmul_precision'

  def __init__(
    self, in_features: int, out_features: int, *, use_bias: bool = True, init=kernel_init,
    compute: Compute = PLAIN, rngs: nnx.Rngs,
  ):
    self.kernel = nnx.Param(init(rngs.params(), (in_features, out_features), compute.param_dtype))
    self.bias = nnx.Param(jnp.zeros((out_features,), compute.param_dtype)) if use_bias else None
    self.lora = nnx.data(None)
    self.dtype, self.matmul_precision = compute.dtype, compute.matmul_precision

  def __call__(self, x: jax.Array) -> jax.Array:
    x = x.astype(self.dtype)
    kernel = self.kernel[...]
    narrow = self.matmul_precision == 'float8' and kernels.fits(x, kernel)
    y = kernels.product(x, kernel) if narrow else x @ kernel.astype(self.dtype)
    y = y if self.bias is None else add_bias(y, self.bias[...])
    return y if self.lora is None else y + self.lora(x, jnp.matmul, kernel)


def embed(count: int, features: int, init, *, compute: Compute = PLAIN, rngs) -> nnx.Embed:
  """A table of `count` rows, [...] -> [... features]."""
  return nnx.Embed(
    count, features, embedding_init=init, dtype=compute.dtype, param_dtype=compute.param_dtype,
    rngs=rngs,
  )


def linear(in_features: int, out_features: int, **kw) -> Linear:
  """A dense layer with the package's initialisation."""
  return Linear(in_features, out_features, **kw)


class Function(nnx.Module):
  """A function without parameters in its place of a numbered list; dropout's is the identity."""

  def __init__(self, function: Callable[[jax.Array], jax.Array] = lambda x: x):
    self.function = function

  def __call__(self, x: jax.Array) -> jax.Array:
    return self.function(x)


class Named(nnx.Module):
  """One layer under a name, where published files have a module around it."""

  def __init__(self, **layer: Callable):
    ((self.name, made),) = layer.items()
    setattr(self, self.name, made)

  def __call__(self, x: jax.Array) -> jax.Array:
    return getattr(self, self.name)(x)


def in_turn(layers: Iterable[Callable], x: jax.Array) -> jax.Array:
  """Return x after one layer after another."""
  for layer in layers:
    x = layer(x)
  return x


def double(x: jax.Array) -> jax.Array:
  """Nearest-neighbour doubling: [b h w c] -> [b 2h 2w c]."""
  b, h, w, c = x.shape
  x = jnp.broadcast_to(x[:, :, None, :, None], (b, h, 2, w, 2, c))
  return x.reshape(b, 2 * h, 2 * w, c)


class ResnetBlock2D(nnx.Module):
  """Residual block (He et al. 2016; with time as in DDPM, Ho et al. 2020, appendix B).

  norm, silu, conv, + projected time embedding, norm, silu, conv, + (projected) input. time_features
  None: no time embedding (the autoencoder). scale_shift: the time embedding scales and shifts the
  second norm's result instead (Dhariwal & Nichol 2021, eq. 3).
  """

  def __init__(
    self, in_channels: int, out_channels: int, *, groups: int, epsilon: float,
    time_features: int | None = None, scale_shift: bool = False, **kw,
  ):
    self.norm1 = GroupNorm(groups, in_channels, epsilon, **kw)
    self.conv1 = Conv(in_channels, out_channels, **kw)
    timed, projected = time_features is not None, out_channels * (2 if scale_shift else 1)
    self.time_emb_proj = linear(time_features, projected, **kw) if timed else None
    self.norm2 = GroupNorm(groups, out_channels, epsilon, **kw)
    self.conv2 = Conv(out_channels, out_channels, **kw)
    same = in_channels == out_channels
    self.conv_shortcut = None if same else pointwise(in_channels, out_channels, **kw)
    self.scale_shift = scale_shift

  def __call__(
    self, x: jax.Array, time: jax.Array | None = None, skip: jax.Array | None = None
  ) -> jax.Array:
    """x [b h w i] or x [b h w i - s] and skip [b h w s], time [b e] after its MLP -> [b h w o]."""
    x = x if skip is None else jnp.concatenate([x, skip], -1)
    y = constrain(self.conv1(self.norm1(x, activate=True)), 'features')
    if self.time_emb_proj is None:
      y = self.norm2(y, activate=True)
    else:
      shift = constrain(self.time_emb_proj(nnx.silu(time)), 'vector')[:, None, None]
      if self.scale_shift:
        scale, shift = jnp.split(shift, 2, axis=-1)
        y = nnx.silu(self.norm2(y) * (1 + scale) + shift)
      else:
        y = self.norm2(y + shift, activate=True)
    y = self.conv2(y)
    return constrain(y + (x if self.conv_shortcut is None else self.conv_shortcut(x)), 'image')


class Upsample2D(nnx.Module):
  """Nearest-neighbour doubling and a convolution: [b h w c] -> [b 2h 2w c]."""

  def __init__(self, channels: int, **kw):
    self.conv = Conv(channels, channels, **kw)

  def __call__(self, x: jax.Array) -> jax.Array:
    return constrain(self.conv(double(x)), 'image')


class Downsample2D(nnx.Module):
  """Convolution of stride 2: [b h w c] -> [b h/2 w/2 c].

  asymmetric: pads (0, 1) on both axes (the autoencoder); otherwise (1, 1) (the U-Net).
  """

  def __init__(self, channels: int, *, asymmetric: bool = False, **kw):
    padding = ((0, 1), (0, 1)) if asymmetric else 1
    self.conv = Conv(channels, channels, stride=2, padding=padding, **kw)

  def __call__(self, x: jax.Array) -> jax.Array:
    return constrain(self.conv(x), 'image')


def timestep_embedding(t: jax.Array, features: int, *, flip_sin_to_cos: bool = True,
                       freq_shift: float = 0.0, max_period: float = 10_000.0) -> jax.Array:
  """Sinusoids of the time (Vaswani et al. 2017, sec. 3.5), float32: t [b] -> [b features].

  Frequencies are max_period^(-i / (features/2 - freq_shift)); cosines first with flip_sin_to_cos
  (Stable Diffusion). An odd number of features is padded with a zero.
  """
  half = features // 2
  exponents = -math.log(max_period) * jnp.arange(half, dtype=jnp.float32) / (half - freq_shift)
  angles = t.astype(jnp.float32)[:, None] * jnp.exp(exponents)[None]
  pair = jnp.sin(angles), jnp.cos(angles)
  pair = pair[::-1] if flip_sin_to_cos else pair
  pair = [constrain(part, 'vector') for part in pair]
  both = constrain(jnp.concatenate(pair, -1), 'vector')
  return jnp.pad(both, ((0, 0), (0, features % 2)))


class TimestepEmbedding(nnx.Module):
  """Two-layer SiLU MLP over the sinusoids: [b i] -> [b o].

  more_features: of another input [b m], whose projection is added to the sinusoids.
  """

  def __init__(
    self, in_features: int, out_features: int, *, more_features: int | None = None,
    out_init=kernel_init, **kw,
  ):
    self.linear_1 = linear(in_features, out_features, **kw)
    self.linear_2 = linear(out_features, out_features, init=out_init, **kw)
    self.cond_proj = None if more_features is None else linear(
      more_features, in_features, use_bias=False, **kw
    )

  def __call__(self, x: jax.Array, more: jax.Array | None = None) -> jax.Array:
    x = x if self.cond_proj is None else x + self.cond_proj(more)
    hidden = constrain(self.linear_1(x), 'vector')
    return constrain(self.linear_2(nnx.silu(hidden)), 'vector')
