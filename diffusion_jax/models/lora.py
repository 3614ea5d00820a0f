"""Low-rank adaptation (Hu et al. 2022, eq. 3): y = x W + (alpha / rank) x A B with W frozen.

Parameters are `NAME.lora.a` and `NAME.lora.b`; a convolution's A is one with its window into `rank`
channels, B is pointwise. The factor alpha / rank is static. B starts at zero.
"""

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from diffusion_jax.errors import require
from diffusion_jax.limits import Length
from diffusion_jax.models.config import Factor, Width
from diffusion_jax.models.layers import Conv, Linear, kernel_init
from diffusion_jax.models.network import PLAIN, Compute, Make, Network
from diffusion_jax.types import Params


class Rank(NamedTuple):
  """Size of one adapter; its product is scaled by alpha / rank."""

  rank: int
  alpha: float


@dataclasses.dataclass(frozen=True)
class LoRAConfig:
  """rank and alpha of every adapter; targets: ends of the names of the adapted layers.

  Default: the projections of all attentions. 'ff.net.0.proj' and 'ff.net.2' are the feed-forward
  layers, 'proj_in' and 'proj_out' those around each transformer, 'conv1' and 'conv2' the
  convolutions, '' every layer.
  """

  rank: Width = 8
  alpha: Factor = 8.0
  targets: Annotated[tuple[str, ...], Length(1, 1000)] = ('to_q', 'to_k', 'to_v', 'to_out.0')

  @property
  def size(self) -> Rank:
    return Rank(self.rank, self.alpha)


class LoRA(nnx.Module):
  """The adapter of one layer: a [(k k) i r], b [(1 1) r o]."""

  def __init__(
    self, window: tuple[int, ...], i: int, o: int, size: Rank, *, compute: Compute = PLAIN,
    rngs: nnx.Rngs,
  ):
    self.a = nnx.Param(kernel_init(rngs.params(), (*window, i, size.rank), compute.param_dtype))
    self.b = nnx.Param(jnp.zeros((*(1 for _ in window), size.rank, o), compute.param_dtype))
    self.scale, self.dtype = size.alpha / size.rank, compute.dtype

  def __call__(
    self, x: jax.Array, product: Callable[[jax.Array, jax.Array], jax.Array] = jnp.matmul
  ) -> jax.Array:
    """x [... i] -> [... o]; `product` applies a kernel of the layer's own window."""
    y = product(x, self.a[...].astype(self.dtype))
    b = self.b[...].astype(self.dtype)
    return self.scale * (y @ b.reshape(b.shape[-2:]))


def targets(network: Network, config: LoRAConfig) -> dict[str, Rank]:
  """The layers of a network that the config names; UserError for a target of none."""
  layers = layers_of(network.shapes)
  for target in config.targets:
    require(
      bool(ending(layers, (target,))),
      f'lora.targets has {target!r}, but no layer of the network ends so; one is {layers[0]!r}.',
    )
  return {layer: config.size for layer in ending(layers, config.targets)}


def layers_of(names: Iterable[str]) -> list[str]:
  """Return the layers with a kernel, from names of parameters."""
  return [name.removesuffix('.kernel') for name in names if name.endswith('.kernel')]


def ending(layers: Iterable[str], targets: Sequence[str]) -> list[str]:
  """Return the layers whose dotted names end with one of the targets."""
  return [layer for layer in layers if any(_is(layer, target) for target in targets)]


def _is(layer: str, target: str) -> bool:
  return not target or re.search(rf'(^|\.){re.escape(target)}$', layer) is not None


def with_lora(network: Network, sizes: Mapping[str, Rank]) -> Network:
  """The same network with adapters of these sizes at the layers of these dotted names."""
  sizes = dict(sizes)

  def build(compute: Compute) -> Make:
    plain = network.build(compute)

    def make(rngs: nnx.Rngs) -> nnx.Module:
      module = plain(rngs)
      for name, size in sizes.items():
        _adapt(_layer(module, name), size, rngs)
      return module

    return make

  return Network.built(network.config, build, network.compute)


def _layer(module: nnx.Module, name: str) -> nnx.Module:
  for part in name.split('.'):
    module = module[int(part)] if part.isdecimal() else getattr(module, part)
  require(
    isinstance(module, (Linear, Conv)), f'{name} is no dense layer or convolution: no LoRA fits it.'
  )
  return module


def _adapt(layer: Linear | Conv, size: Rank, rngs: nnx.Rngs) -> None:
  *window, i, o = layer.kernel.shape
  layer.lora = LoRA(
    tuple(window), i, o, size, compute=Compute(layer.dtype, layer.kernel.dtype), rngs=rngs
  )


def is_lora(name: str) -> bool:
  """Return whether a parameter belongs to an adapter."""
  return name.endswith(('.lora.a', '.lora.b'))


def merge_lora(params: Params, sizes: Mapping[str, Rank]) -> Params:
  """Parameters with adapters -> those of the plain network that computes the same.

  A convolution's product sums over the rank at each place of the window, in float32.
  """
  out = {name: value for name, value in params.items() if not is_lora(name)}
  for name, size in sizes.items():
    a, b = (params[f'{name}.lora.{part}'].astype(jnp.float32) for part in 'ab')
    kernel = out[f'{name}.kernel']
    delta = size.alpha / size.rank * (a @ b.reshape(b.shape[-2:]))
    out[f'{name}.kernel'] = (kernel.astype(jnp.float32) + delta).astype(kernel.dtype)
  return out
