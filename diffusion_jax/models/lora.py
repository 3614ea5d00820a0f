"""Adapters of layers whose own weights are frozen: LoRA and the other kinds of `models.adapters`.

Low-rank adaptation (Hu et al. 2022, eq. 3) is y = x W + (alpha / rank) x A B. Parameters are
`NAME.lora.PART`, of LoRA `NAME.lora.a` and `NAME.lora.b`; a convolution's A is one with its window
into `rank` channels, B is pointwise. Sizes are static.
"""

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Annotated, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from diffusion_jax.errors import require
from diffusion_jax.limits import Length, OneOf, Range
from diffusion_jax.models.adapters import (
  BIAS,
  KINDS,
  MAGNITUDE,
  WHOLE_BIAS,
  Rank,
  change,
  magnitude,
  new_parts,
)
from diffusion_jax.models.config import Factor, Width
from diffusion_jax.models.layers import Conv, Linear, kernel_init
from diffusion_jax.models.name_patterns import NamePatterns
from diffusion_jax.models.network import PLAIN, Compute, Make, Network
from diffusion_jax.types import Params

TRAINED_KINDS = tuple(kind for kind in KINDS if kind != 'full')
MOST_PATTERNS = 100


@dataclasses.dataclass(frozen=True)
class LoRAConfig:
  """rank and alpha of every adapter; targets: ends of the names of the adapted layers.

  Default: the projections of all attentions. 'ff.net.0.proj' and 'ff.net.2' are the feed-forward
  layers, 'proj_in' and 'proj_out' those around each transformer, 'conv1' and 'conv2' the
  convolutions, '' every layer.

  kind: of `models.adapters.KINDS`. ranks, alphas: others for some of the layers, as pairs of a
  pattern of the end of their names and the value; the first that fits counts. rank_stabilized: the
  scale is alpha / sqrt(rank) (Kalajdzievski 2023). dora: learned norms of the weights (Liu et al.
  2024). factor: of LoKr, the smaller size of its factors, -1 for the nearest to each other. The
  rank of oft and diag_oft is the size of their blocks; alpha has no effect on them.
  """

  section: ClassVar[str] = 'lora'
  rank: Width = 8
  alpha: Factor = 8.0
  targets: Annotated[tuple[str, ...], Length(1, 1000)] = ('to_q', 'to_k', 'to_v', 'to_out.0')
  kind: Annotated[str, OneOf(TRAINED_KINDS)] = 'lora'
  ranks: Annotated[tuple[tuple[str, Width], ...], Length(0, MOST_PATTERNS)] = ()
  alphas: Annotated[tuple[tuple[str, Factor], ...], Length(0, MOST_PATTERNS)] = ()
  rank_stabilized: bool = False
  dora: bool = False
  factor: Annotated[int, Range(-1, 2**20)] = -1

  def __post_init__(self):
    scaled = KINDS[self.kind].additive if self.kind in KINDS else True
    for wrong, key in (
      (not scaled and self.alphas, 'alphas'),
      (not scaled and self.rank_stabilized, 'rank_stabilized'), (not scaled and self.dora, 'dora'),
      (self.kind != 'lokr' and self.factor != -1, 'factor'),
    ):
      require(
        not wrong, f'{self.section}.{key} has no effect on the kind {self.kind}; leave it out.'
      )
    require(self.factor != 0, f'{self.section}.factor is 0; give -1 or a number above 0.')

  def sizes(self, layers: Iterable[str]) -> dict[str, Rank]:
    """Return the sizes of these layers' adapters; UserError for a pattern that fits none."""
    layers = list(layers)
    ranks, alphas = (
      _by_pattern(getattr(self, key), layers, f'{self.section}.{key}', default)
      for key, default in (('ranks', self.rank), ('alphas', self.alpha))
    )
    scaled = KINDS[self.kind].additive
    power = 0.5 if self.rank_stabilized else 0.0
    return {
      layer: Rank(
        ranks[layer], alphas[layer] * ranks[layer] ** power if scaled else 0.0, self.kind,
        self.dora, self.factor,
      ) for layer in layers
    }


def _by_pattern(
  pairs: Sequence[tuple[str, float]], layers: Sequence[str], key: str, default: float
) -> dict[str, float]:
  for pattern, value in pairs:
    one = NamePatterns({pattern: value}, key)
    require(
      any(one.find((layer,), None) is not None for layer in layers),
      f'{key} has {pattern!r}, but no adapted layer fits it; one is {layers[0]!r}.',
    )
  known = NamePatterns(dict(pairs), key)
  return {layer: known.find((layer,), default) for layer in layers}


class LoRA(nnx.Module):
  """The adapter of one layer: a [(k k) i r], b [(1 1) r o]."""

  def __init__(
    self, window: tuple[int, ...], i: int, o: int, size: Rank, *, compute: Compute = PLAIN,
    rngs: nnx.Rngs,
  ):
    self.a = nnx.Param(kernel_init(rngs.params(), (*window, i, size.rank), compute.param_dtype))
    self.b = nnx.Param(jnp.zeros((*(1 for _ in window), size.rank, o), compute.param_dtype))
    self.scale, self.dtype = size.alpha / size.rank, compute.dtype

  def __call__(self, x: jax.Array, product: Callable, kernel: jax.Array) -> jax.Array:
    """x [... i] -> [... o]; `product` applies a kernel of the layer's own window."""
    del kernel
    y = product(x, self.a[...].astype(self.dtype))
    b = self.b[...].astype(self.dtype)
    return self.scale * (y @ b.reshape(b.shape[-2:]))


class Adapter(nnx.Module):
  """The adapter of one layer, of any kind; its parts are parameters."""

  def __init__(
    self, kernel: jax.Array, size: Rank, *, compute: Compute = PLAIN, rngs: nnx.Rngs
  ):
    parts = new_parts(kernel.shape, size, rngs.params())
    if size.dora:
      parts[MAGNITUDE] = magnitude(kernel)
    for name, value in parts.items():
      setattr(self, name, nnx.Param(value.astype(compute.param_dtype)))
    self.parts, self.size, self.dtype = tuple(parts), size, compute.dtype

  def __call__(self, x: jax.Array, product: Callable, kernel: jax.Array) -> jax.Array:
    """The same as `LoRA`'s, of the layer's kernel."""
    parts = {name: getattr(self, name)[...] for name in self.parts}
    # Apart from the frozen weight, which may be in half precision, where small changes vanish.
    return product(x, change(parts, kernel, self.size).astype(self.dtype))


def targets(network: Network, config: LoRAConfig) -> dict[str, Rank]:
  """The layers of a network that the config names; UserError for a target of none."""
  layers = layers_of(network.shapes)
  for target in config.targets:
    require(
      bool(ending(layers, (target,))),
      f'lora.targets has {target!r}, but no layer of the network ends so; one is {layers[0]!r}.',
    )
  return config.sizes(ending(layers, config.targets))


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
  compute = Compute(layer.dtype, layer.kernel.dtype)
  if size.kind == 'lora' and not size.dora and size.rows is None:
    layer.lora = LoRA(tuple(window), i, o, size, compute=compute, rngs=rngs)
  else:
    layer.lora = Adapter(layer.kernel[...], size, compute=compute, rngs=rngs)


def is_lora(name: str) -> bool:
  """Return whether a parameter belongs to an adapter."""
  return name.rpartition('.')[0].endswith('.lora')


def parts_of(params: Params, layers: Iterable[str]) -> dict[str, Params]:
  """Return the parts of each layer's adapter, from parameters among which they are."""
  found: dict[str, Params] = {layer: {} for layer in layers}
  for name, value in params.items():
    layer, _, part = name.rpartition('.lora.')
    if layer in found:
      found[layer][part] = value
  return found


def start_of(params: Params, sizes: Mapping[str, Rank]) -> Params:
  """Return what adapters begin with that depends on the weights: the norms of DoRA."""
  return {
    f'{name}.lora.{MAGNITUDE}': magnitude(params[f'{name}.kernel'])
    for name, size in sizes.items() if size.dora
  }


def merge_lora(
  params: Params, sizes: Mapping[str, Rank], strength: float = 1.0, base: Params | None = None
) -> Params:
  """Parameters with adapters -> those of the plain network that computes the same.

  A convolution's product sums over the rank at each place of the window, in float32. strength: so
  many times the change. base: parameters that the adapters were trained on, where those here have
  others merged into them.
  """
  out = {name: value for name, value in params.items() if not is_lora(name)}
  base = out if base is None else base
  for name, parts in parts_of(params, sizes).items():
    kernel, size = out[f'{name}.kernel'], sizes[name]
    biases = [(size.scale, parts.pop(BIAS, None)), (1.0, parts.pop(WHOLE_BIAS, None))]
    delta = change(parts, base[f'{name}.kernel'], size, strength)
    out[f'{name}.kernel'] = (kernel.astype(jnp.float32) + delta).astype(kernel.dtype)
    for scale, bias in biases:
      if bias is not None:
        old = out[f'{name}.bias']
        new = old.astype(jnp.float32) + strength * scale * bias.astype(jnp.float32)
        out[f'{name}.bias'] = new.astype(old.dtype)
  return out
