"""Outputs of frozen networks on images and captions, computed once before training.

encoding: how rows are computed. store: who computes which, and rows in memory. disk: rows in files.
rows: how they are read. spares: for buckets in which nothing can be read.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from diffusion_jax.data.cache.disk import DiskStore
from diffusion_jax.data.cache.encoding import (
  Encoder,
  Latents,
  Null,
  Options,
  Texts,
  local_mesh,
  moments_encoder,
)
from diffusion_jax.data.cache.rows import (
  DIGEST,
  CachedSource,
  Parts,
  Row,
  Rows,
  Shard,
  pack,
  shard_of,
)
from diffusion_jax.data.cache.spares import SpareLatents, SpareRows, Spares, unreadable_groups
from diffusion_jax.data.cache.store import MemoryStore, fill
from diffusion_jax.data.transforms import SIZES, weighted_choice, whole
from diffusion_jax.types import Source

KINDS = ('latents', 'texts')


@dataclasses.dataclass(frozen=True)
class Choose:
  """Replace each kind of cached rows by the fields of one part: of a view, and of a caption."""

  random: ClassVar[bool] = True

  def __call__(self, record: Mapping[str, Parts], rng: np.random.Generator) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for name, parts in record.items():
      if isinstance(parts, (str, np.generic)):  # What a mixture says of its part.
        out[name] = parts
        continue
      # One view draws nothing, so that a caption is drawn as without a cache.
      out |= parts[_chosen(parts, rng) if len(parts) > 1 else 0]
    return out


def _chosen(parts: Parts, rng: np.random.Generator) -> int:
  weights = parts.weights
  return weighted_choice(weights, rng) if weights else int(rng.integers(len(parts)))


def cached_source(
  source: Source, model: Any, frozen: Mapping[str, Any], mesh: Mesh, progress: bool = True, *,
  options: Options | None = None, folder: Path | None = None, name: str = '',
  null: Mapping[str, Any] | None = None, kinds: Sequence[str] = KINDS,
) -> CachedSource:
  """Encode every view of an image and every caption of `source` once, or open what is there.

  A record is {'latents': its views, 'texts': its captions}, `Parts` of which `Choose` takes one
  each. Parts of views have the moments of the model's space, such as 'mean' and 'logvar' [h w c],
  and 'sizes' [6] where records have them; those of captions 'text' [l d], where there are such
  'pooled' [p] and 'mask' int32 [l], and what other conditioners make of the record. A record that
  cannot be read has a row that cannot be read, so that all others keep their numbers.

  Args:
    model: a `pipelines.model.Diffusion`.
    folder: of the files of a cache on disk; None for memory.
    name: of the source, such as 'folder:PATH'.
    null: the condition of nothing, which is kept on the disk, too.
    kinds: of KINDS, those that are wanted.
  """
  options = dataclasses.replace(options or Options(), progress=progress)
  here = local_mesh(mesh)
  encoders: list[Encoder] = []
  if 'latents' in kinds:
    encoders.append(Latents(source, model, frozen, here, options))
  others = [one for one in model.conditioners.values() if one.kept]
  if 'texts' in kinds and others:
    encoders.append(Texts(source, model, frozen, here, options))
  if 'texts' in kinds and folder and null:
    encoders.append(Null({n: np.asarray(v) for n, v in null.items()}, here, options))
  store = lambda kind: MemoryStore() if folder is None else DiskStore(Path(folder, kind), name)
  found = {one.name: fill(one, store(one.name)) for one in encoders}
  rows = {kind: filled.rows for kind, filled in found.items() if kind in KINDS}
  empty = {number for filled in found.values() for number in filled.empty}
  firsts = unreadable_groups(source, sorted(empty)) if hasattr(source, 'buckets') else ()
  if not firsts or 'latents' not in rows:
    return CachedSource(rows, source)
  spares = Spares(source, firsts)
  latents = fill(SpareLatents(spares, model, frozen, here, options), store('spares')).rows
  others = {kind: rows[kind] for kind in rows if kind != 'latents'}
  return CachedSource(rows, source, {
    first: SpareRows(latents, others, span, spares.numbers) for first, span in spares.spans.items()
  })


def synthetic_cache(model: Any, frozen: dict, source: Source) -> CachedSource:
  """Return what `cached_source` does, of random numbers: nothing is encoded.

  Args:
    source: of random images, which tell the sizes.
  """
  rng, encode, kinds = np.random.default_rng(0), moments_encoder(model), {'latents': []}

  @functools.cache
  def moments(height: int, width: int) -> dict[str, Any]:
    images = jax.ShapeDtypeStruct((1, height, width, 3), jnp.uint8)
    return jax.eval_shape(encode, frozen, images)

  for i in range(len(source)):
    image = source[i]['image']
    kinds['latents'].append(pack(_random(moments(*image.shape[:2]), rng) | {SIZES: whole(image)}))
  found: dict[str, Any] = {}
  if model.text is not None:
    found |= jax.eval_shape(model.text.encode, frozen, {'tokens': model.text.tokens([''])})
  for one in model.conditioners.values():
    if one.kept and one is not model.text:
      found |= jax.tree.map(np.asarray, one.of_prompts(frozen, ['']))
  if found:
    kinds['texts'] = [pack(_random(found, rng)) for _ in source]
  return CachedSource({kind: _in_memory(parts) for kind, parts in kinds.items()}, source)


def _random(found: Mapping[str, Any], rng: np.random.Generator) -> dict[str, np.ndarray]:
  """One part of such shapes: a small deviation, whole masks, the arrays that are known."""
  return {
    name: np.asarray(leaf[0]) if isinstance(leaf, np.ndarray)
    else np.full(leaf.shape[1:], -4.6, np.float32) if name == 'logvar'
    else np.ones(leaf.shape[1:], np.int32) if name == 'mask'
    else rng.standard_normal(leaf.shape[1:], np.float32)
    for name, leaf in found.items()
  }


def _in_memory(parts: Sequence[bytes]) -> Rows:
  data = shard_of([Row([part]) for part in parts], np.zeros((len(parts), DIGEST), np.uint8))
  shard = Shard(data.__getitem__, len(data))
  return Rows(len(parts), len(parts), lambda number: shard)
