"""LoRA of layers that are one in the files of others: queries, keys and values in one matrix.

Of such a matrix each of the network's layers has all inputs and its own outputs, so that parts
share A and divide B's columns. Where no part uses the other's ranks they are adapters by
themselves, as kohya's scripts and `join` write them.
"""

from collections.abc import Iterable, Mapping
from typing import NamedTuple, TypeVar

import numpy as np

from diffusion_jax.errors import require
from diffusion_jax.formats.transformer_names import (
  LORA_TABLES,
  TABLES,
  Row,
  kind_of_layers,
  rows_of,
)

Weights = TypeVar('Weights')  # `formats.adapters.LoRAWeights`.


class Joined(NamedTuple):
  """Layers of a network that are one layer in a file: their widths, or one with swapped halves."""

  parts: tuple[str, ...]
  widths: tuple[int, ...]
  inputs: int
  swapped: bool

  @property
  def kernel(self) -> tuple[int, int]:
    """Shape of their kernel in our layout."""
    return self.inputs, sum(self.widths)


def original_rows(layers: Iterable[str], *, written: bool = False) -> list[Row]:
  """Return the rows of the names in which others keep a network's layers; [] for no known one.

  written: of the names that we write alone.
  """
  layers = list(layers)
  kind = kind_of_layers(layers)
  tables = (TABLES, LORA_TABLES)[: 1 if written else 2]
  return [row for table in tables for row in rows_of(table.get(kind, []), layers)]


def joined_layers(layers: Mapping[str, tuple[int, ...]]) -> dict[str, Joined]:
  """Return the layers of files that are several of a network's, or one with swapped halves."""
  return {
    row.stored: Joined(
      row.published, tuple(layers[name][-1] for name in row.published),
      layers[row.published[0]][0], row.change == 'swapped',
    )
    for row in original_rows(layers)
    if row.change != 'same' and set(row.published) <= layers.keys()
  }


def split(one: Weights, of: Joined) -> dict[str, Weights]:
  """One adapter of a joined layer -> those of the network's layers, which compute the same."""
  if of.swapped:
    return {of.parts[0]: one._replace(b=_swapped(one.b))}
  rank, count = one.a.shape[-1], len(of.parts)
  pieces = np.split(one.b, np.cumsum(of.widths)[:-1], axis=1)
  used = [np.flatnonzero(np.any(piece != 0, axis=1)) for piece in pieces]
  equal = np.arange(rank).reshape(count, -1) if rank % count == 0 else None
  if equal is not None and all(set(u) <= set(own) for u, own in zip(used, equal, strict=True)):
    used = [*equal]
  total = sum(map(len, used))
  if not total or len(set(np.concatenate(used))) < total:  # Some share a rank.
    return {n: one._replace(b=piece) for n, piece in zip(of.parts, pieces, strict=True)}
  return {
    name: one._replace(a=one.a[:, own], b=piece[own], alpha=one.alpha * len(own) / rank)
    for name, own, piece in zip(of.parts, used, pieces, strict=True) if len(own)
  }


def join(weights: Mapping[str, Weights], of: Joined, where: str) -> Weights:
  """Invert `split`; layers without an adapter get zeros. UserError: other factors alpha / rank."""
  have = {name: weights[name] for name in of.parts if name in weights}
  first = next(iter(have.values()))
  if of.swapped:
    return first._replace(b=_swapped(first.b))
  factors = [one.alpha / one.a.shape[-1] for one in have.values()]
  require(
    len(set(factors)) == 1,
    f'{" and ".join(have)} are scaled by {" and ".join(f"{f:g}" for f in factors)}, but are one '
    f'layer in {where}; give them one alpha / rank, or write the layout peft.',
  )
  ones = [*have.values()]
  if len(have) == len(of.parts) > 1 and all(np.array_equal(one.a, first.a) for one in ones):
    return first._replace(b=np.concatenate([one.b for one in ones], axis=1))
  b, row, column = np.zeros((sum(one.a.shape[-1] for one in ones), sum(of.widths)),
                            first.b.dtype), 0, 0
  for name, width in zip(of.parts, of.widths, strict=True):
    if name in have:
      rank = have[name].a.shape[-1]
      b[row : row + rank, column : column + width] = have[name].b
      row += rank
    column += width
  a = np.concatenate([one.a for one in ones], axis=1)
  return first._replace(a=a, b=b, alpha=sum(one.alpha for one in ones))


def _swapped(b: np.ndarray) -> np.ndarray:
  return np.roll(b, b.shape[1] // 2, axis=1)
