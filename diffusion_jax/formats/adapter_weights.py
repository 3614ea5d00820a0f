"""Adapters of single layers in memory, and how they are made of a file's tensors.

Those of LoRA are `LoRAWeights`; of all other kinds of `models.adapters`, and of DoRA,
`AdapterWeights`. Errors name the layer, and not the file, which the caller knows.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from diffusion_jax.errors import require
from diffusion_jax.formats.adapter_config import EXTRAS, PEFT_TYPES, AdapterConfig, check_alpha
from diffusion_jax.formats.adapter_layers import Joined, split
from diffusion_jax.formats.adapter_names import TOWER, Place
from diffusion_jax.formats.published import from_published_layout
from diffusion_jax.formats.tensors import is_finite
from diffusion_jax.models.adapters import BIAS, KINDS, MAGNITUDE, WHOLE_BIAS, Rank, Rows, block_size

PEFT_TERMS = 5
"""Terms of the series of PEFT's OFT where no config says how many."""


class LoRAWeights(NamedTuple):
  """The LoRA of one layer, which adds (alpha / r) a b to its kernel.

  a [i r] and b [r o] of a dense layer, a [k k i r] and b [1 1 r o] of a convolution.
  """

  a: np.ndarray
  b: np.ndarray
  alpha: float

  @property
  def size(self) -> Rank:
    return Rank(self.a.shape[-1], self.alpha)

  @property
  def parts(self) -> dict[str, np.ndarray]:
    return {'a': self.a, 'b': self.b}


class AdapterWeights(NamedTuple):
  """The adapter of one layer by the parts of its kind, see `models.adapters`."""

  parts: Mapping[str, np.ndarray]
  size: Rank


Weights = LoRAWeights | AdapterWeights


def weights_of(parts: Mapping[str, np.ndarray], size: Rank) -> Weights:
  """Return the weights of these parts."""
  plain = size == Rank(size.rank, size.alpha) and parts.keys() == {'a', 'b'}
  return LoRAWeights(parts['a'], parts['b'], size.alpha) if plain else AdapterWeights(parts, size)


class Layer(NamedTuple):
  """A layer of a file: where, its kernel's shape in our layout, and the network's of which it is.

  biased: whether all of those have a bias.
  """

  place: Place
  kernel: tuple[int, ...]
  several: Joined | None
  biased: bool

  @property
  def where(self) -> str:
    return ' '.join(self.place)

  @property
  def published(self) -> tuple[int, ...]:
    *window, i, o = self.kernel
    return (o, i, *window)


def read_layer(
  tensors: Mapping[str, Any], names: Mapping[str, str], layer: Layer, config: AdapterConfig | None
) -> dict[str, Weights]:
  """The adapters, by the network's layers, of tensors by their parts; UserError for bad ones."""
  kinds = {part.partition('.')[0] for part in tensors if '.' in part}
  require(len(kinds) < 2, f'of several kinds ({" and ".join(sorted(kinds))}): {layer.where}')
  bare = {'diff_b', 'alpha'} >= tensors.keys() and 'diff_b' in tensors
  require(bool(kinds) or bare, f'without its other matrix: {layer.where}')
  kind = next(iter(kinds), 'full')
  own = {part.removeprefix(f'{kind}.'): part for part in tensors if '.' in part}
  if config is not None and kind != 'full':
    _check_config(kind, tensors, layer, config)
  if kind == 'lora':
    parts = _lora(tensors, names, layer)
  else:
    parts = {part: _array(tensors[full], names[full]) for part, full in own.items()}
    _CHECKS[kind](parts, layer)
  size = _size(kind, parts, tensors, names, layer, config)
  for part in ('magnitude', 'vector'):
    if part in tensors:
      fits = KINDS[kind].additive and MAGNITUDE not in parts
      require(fits, f'of DoRA beside {kind}: {layer.where}')
      norms = _array(tensors[part], names[part])
      parts[MAGNITUDE] = _norms(norms, part, names[part], layer)
      size = size._replace(dora=True)
  for part in (BIAS, WHOLE_BIAS):
    if part in tensors:
      parts[part] = _bias(_array(tensors[part], names[part]), names[part], layer)
  return _divided(weights_of(parts, size), layer)


def _check_config(
  kind: str, tensors: Mapping[str, Any], layer: Layer, config: AdapterConfig
) -> None:
  """Raise a UserError for tensors of another kind than the config's, or fewer."""
  own = PEFT_TYPES.get(kind, kind)
  require(
    config.kind in (None, own), f'{config.where} is of {config.kind}, not {own}: {layer.where}'
  )
  missing = [key for key in config.extras if EXTRAS[key] not in tensors]
  require(
    not missing, f'without the tensors of {" and ".join(missing)} in {config.where}: {layer.where}'
  )


def _size(
  kind: str, parts: Mapping[str, np.ndarray], tensors: Mapping[str, Any], names: Mapping[str, str],
  layer: Layer, config: AdapterConfig | None,
) -> Rank:
  require(
    'alpha' not in tensors or kind not in ('full', 'oft'),
    f'with an alpha, which {kind} has no use for: {layer.where}',
  )
  if kind == 'full':
    return Rank(1, 1.0, kind)
  if kind == 'oft':
    return Rank(1, float(PEFT_TERMS if config is None else config.terms), kind)
  rank, role_name = KINDS[kind].rank(parts), layer.place[1]
  said = layer.where
  whole = kind == 'lokr' and {'w1', 'w2'} <= parts.keys()
  if 'alpha' in tensors and not whole:
    alpha, said = _scalar(tensors['alpha'], names['alpha']), names['alpha']
  elif config is not None and kind != 'diag_oft':
    spelt = (role_name, role_name.removeprefix(TOWER))
    alpha = config.alpha_of(spelt, None if whole else rank)
    said = f'{config.where}: alpha of {layer.where}'
  else:
    alpha = 0.0 if kind == 'diag_oft' else float(rank)
  check_alpha(alpha, rank, said)
  return Rank(rank, alpha, kind)


def _divided(one: Weights, layer: Layer) -> dict[str, Weights]:
  """The adapters of the network's layers of which the file's layer is made."""
  several = layer.several
  if several is None:
    return {layer.place[1]: one}
  if isinstance(one, LoRAWeights):
    return split(one, several)
  require(
    one.size.kind != 'diag_oft' and one.parts.get(MAGNITUDE, np.zeros((2, 1))).shape[0] > 1,
    f'of all outputs of {" and ".join(several.parts)} at once, which is not implemented: '
    f'{layer.where}',
  )
  total, start, out = sum(several.widths), 0, {}
  for name, width in zip(several.parts, several.widths, strict=True):
    parts = dict(one.parts)
    for part in {MAGNITUDE, BIAS, WHOLE_BIAS} & parts.keys():
      value = np.roll(parts[part], total // 2, 0) if several.swapped else parts[part]
      parts[part] = value[start : start + width]
    rows = None if one.size.kind == 'oft' else Rows(total, start, several.swapped)
    out[name] = AdapterWeights(parts, one.size._replace(rows=rows))
    start += width
  return out


def _lora(
  tensors: Mapping[str, Any], names: Mapping[str, str], layer: Layer
) -> dict[str, np.ndarray]:
  where, kernel = layer.where, layer.kernel
  require({'lora.a', 'lora.b'} <= tensors.keys(), f'without its other matrix: {where}')
  a, b = (_reshape(tensors[part], names[part], len(kernel)) for part in ('lora.a', 'lora.b'))
  rank, window, middle = a.shape[-1], kernel[:-2], tensors.get('lora.mid')
  require(rank > 0 and b.size > 0, f'of rank 0: {where}')
  if middle is not None:
    name = names['lora.mid']
    a = _composed(a, _reshape(middle, name, len(kernel)), name)
  ones = tuple(1 for _ in window)
  shapes = [list(np.shape(tensors[part])) for part in ('lora.a', 'lora.b')]
  require(
    a.shape == (*kernel[:-1], rank) and b.shape == (*ones, rank, kernel[-1]),
    f'of a wrong shape: {where} ({shapes[0]} and {shapes[1]} for a kernel {list(kernel)})',
  )
  return {'a': a, 'b': b}


def _fit(good: bool, parts: Mapping[str, np.ndarray], layer: Layer) -> None:
  """Raise a UserError unless the parts, which it names with their shapes, are `good`."""
  shapes = ', '.join(f'{part} {list(value.shape)}' for part, value in sorted(parts.items()))
  require(good, f'of a wrong shape: {layer.where} ({shapes} for a kernel {list(layer.kernel)})')


def _factored(parts: Mapping[str, np.ndarray], which: str) -> tuple[int, int, int] | None:
  """(outputs, entries for each, rank) of w_a and w_b, with a core or without; None: no such."""
  a, b, core = (parts.get(name.format(which)) for name in ('w{}_a', 'w{}_b', 't{}'))
  if a is None or b is None or a.ndim != 2 or b.ndim != 2 or not a.size or not b.size:
    return None
  if core is None:
    return (a.shape[0], b.shape[1], b.shape[0]) if a.shape[1] == b.shape[0] else None
  if core.ndim < 3 or core.shape[:2] != (a.shape[0], b.shape[0]) or a.shape[0] != b.shape[0]:
    return None
  return a.shape[1], b.shape[1] * math.prod(core.shape[2:]), b.shape[0]


def _check_loha(parts: Mapping[str, np.ndarray], layer: Layer) -> None:
  missing = {'w1_a', 'w1_b', 'w2_a', 'w2_b'} - parts.keys()
  require(not missing, f'without {", ".join(sorted(missing))}: {layer.where}')
  o, *rest = layer.published
  first, second = _factored(parts, '1'), _factored(parts, '2')
  cores = {'t1', 't2'} & parts.keys()
  _fit(
    first is not None and first == second and first[:2] == (o, math.prod(rest))
    and (not cores or (len(cores) == 2 and _windows(parts, cores, layer))), parts, layer,
  )


def _check_lokr(parts: Mapping[str, np.ndarray], layer: Layer) -> None:
  whole = {n for n in '12' if f'w{n}' in parts}
  pairs = {n for n in '12' if {f'w{n}_a', f'w{n}_b'} & parts.keys()}
  require(whole | pairs == {'1', '2'}, f'without one of its two factors: {layer.where}')
  o, i, *window = layer.published
  first, second = (
    _factored(parts, n) if n in pairs else (len(parts[f'w{n}']), parts[f'w{n}'][:1].size)
    if parts[f'w{n}'].ndim > 1 and parts[f'w{n}'].size else None for n in '12'
  )
  _fit(
    not whole & pairs and first is not None and second is not None
    and (parts['w1'].ndim == 2 if '1' in whole else True)
    and first[0] * second[0] == o and first[1] * second[1] == i * math.prod(window)
    and i % first[1] == 0 and ('t2' not in parts or '2' in pairs)
    and _windows(parts, {'t2'} & parts.keys(), layer), parts, layer,
  )


def _windows(parts: Mapping[str, np.ndarray], cores: set[str], layer: Layer) -> bool:
  return all(parts[core].shape[2:] == layer.kernel[:-2] for core in cores)


def _check_diag_oft(parts: Mapping[str, np.ndarray], layer: Layer) -> None:
  blocks, o = parts.get('blocks'), layer.kernel[-1]
  require(blocks is not None, f'without its blocks: {layer.where}')
  require(blocks.ndim != 4, f'of BOFT, which is not implemented: {layer.where}')
  _fit(
    blocks.ndim == 3 and blocks.shape[1] == blocks.shape[2]
    and blocks.shape[0] * blocks.shape[1] == o
    and parts.get('rescale', np.zeros(o)).size == o, parts, layer,
  )


def _check_oft(parts: Mapping[str, np.ndarray], layer: Layer) -> None:
  skew, inputs = parts['skew'], math.prod(layer.kernel[:-1])
  n = block_size(skew.shape[1]) if skew.ndim == 2 and skew.size else 0
  _fit(n > 1 and inputs % n == 0 and len(skew) in (1, inputs // n), parts, layer)


def _check_full(parts: Mapping[str, np.ndarray], layer: Layer) -> None:
  shape, found = layer.published, parts['diff'].shape if 'diff' in parts else layer.published
  bare = lambda dims: dims[:2] if dims[2:] == (1, 1) else dims
  _fit(bare(found) == bare(shape), parts, layer)


_CHECKS = {
  'loha': _check_loha, 'lokr': _check_lokr, 'oft': _check_oft, 'diag_oft': _check_diag_oft,
  'full': _check_full,
}


def _norms(norms: np.ndarray, part: str, name: str, layer: Layer) -> np.ndarray:
  """Norms of DoRA by outputs as [o 1 ...], or of LyCORIS by inputs as [1 i ...].

  PEFT's vectors are by outputs, [o] or [1 o 1 1].
  """
  o, i, *window = layer.published
  ones = tuple(1 for _ in window)
  shape = norms.shape
  if part == 'magnitude' and len(shape) > 1 and shape[0] == 1 and shape[1] == i and norms.size == i:
    return norms.reshape(1, i, *ones)
  good = norms.size == o and max(shape, default=0) == o
  require(good, f'{name} of shape {list(shape)} is no norm of each output of {layer.where}')
  return norms.reshape(o, 1, *ones)


def _bias(bias: np.ndarray, name: str, layer: Layer) -> np.ndarray:
  require(layer.biased, f'{name} changes a bias that the layer does not have: {layer.where}')
  good = bias.shape == (layer.kernel[-1],)
  require(good, f'{name} of shape {list(bias.shape)} is no bias of {layer.where}')
  return bias


def _array(tensor: Any, name: str) -> np.ndarray:
  value = np.array(tensor)
  require(value.dtype.kind in 'fV', f'{name} is of type {value.dtype}, not of floating numbers')
  require(is_finite(value), f'{name} has values that are not finite')
  return value


def _reshape(tensor: Any, name: str, dims: int) -> np.ndarray:
  """A published matrix in our layout; a window of 1x1 may be stored or not, whatever the layer."""
  value = _array(tensor, name)
  if dims == 2 and value.ndim == 4 and value.shape[2:] == (1, 1):
    value = value[..., 0, 0]
  elif dims == 4 and value.ndim == 2:
    value = value[..., None, None]
  return np.ascontiguousarray(from_published_layout('kernel.kernel', value))


def _composed(a: np.ndarray, middle: np.ndarray, name: str) -> np.ndarray:
  """LyCORIS' third matrix of a convolution, [k k r r], after the first, [1 1 i r]: [k k i r]."""
  rank = a.shape[-1]
  require(
    a.ndim == 4 and a.shape[:2] == (1, 1) and middle.shape[2:] == (rank, rank),
    f'{name} of shape {list(middle.shape)} stands between no two matrices of a convolution',
  )
  return a[0, 0].astype(np.float32) @ middle.astype(np.float32)


def _scalar(tensor: Any, name: str) -> float:
  value = np.asarray(tensor)
  good = value.size == 1 and value.dtype.kind in 'fVi'
  require(good, f'{name} of shape {list(value.shape)} and type {value.dtype} is no number')
  return float(value.reshape(()))
