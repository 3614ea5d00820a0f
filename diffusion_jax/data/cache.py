"""Outputs of frozen networks on images and captions, computed once before training."""

import dataclasses
import json
from collections.abc import Callable
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from diffusion_jax.backend.xla import jit
from diffusion_jax.data.sources.arrays import ArraySource
from diffusion_jax.errors import Unreadable, UserError
from diffusion_jax.parallel.mesh import in_batches, put_params
from diffusion_jax.parallel.processes import agree
from diffusion_jax.pixels import to_float
from diffusion_jax.types import Record, Source


@dataclasses.dataclass(frozen=True)
class ChooseText:
  """Replace 'texts' by 'text' [l d], that of one caption, and likewise 'pooled', 'mask' [l]."""

  random: ClassVar[bool] = True

  def __call__(self, record: dict, rng: np.random.Generator) -> dict:
    if 'texts' not in record:
      return record
    out = {name: value for name, value in record.items() if name != 'texts'}
    chosen = int(rng.integers(len(record['texts'])))
    out['text'] = record['texts'][chosen].astype(np.float32)
    if 'pooled' in record:
      out['pooled'] = record['pooled'][chosen].astype(np.float32)
    if 'mask' in record:
      out['mask'] = record['mask'][chosen]
    return out


def cached_source(
  source: Source, model, frozen: dict, mesh: Mesh, progress: bool = True
) -> ArraySource:
  """Encode every image and every caption of `source` once; model: a `pipelines.model.Diffusion`.

  Columns: the moments of the model's space, float32, such as 'mean' and 'std' [h w c]; 'texts'
  [k l d], the embeddings of the record's k captions, float16 to halve the memory; 'pooled' [k p]
  and 'mask' int32 [k l] where there are such; and what other conditioners make of a record.

  A record that cannot be read in any of the processes has a row that cannot be read, so that all
  others keep their numbers.

  Args:
    model: a `pipelines.model.Diffusion`.
  """
  records, unreadable = _read(source, progress)
  images = np.stack([record['image'] for record in records])
  weights = {role: put_params(frozen[role], mesh) for role in model.space.networks}
  moments = list(tqdm(
    in_batches(moments_encoder(model), weights, images, mesh=mesh),
    total=-(-len(images) // 64), desc='encoding images', disable=not progress, leave=False,
  ))
  columns = _joined(moments)
  if model.text is not None:
    columns |= _captions(records, model.text, frozen, mesh, progress)
  for conditioner in model.conditioners.values():
    if conditioner.kept and conditioner is not model.text:
      prompts = [conditioner.prompt(record) or '' for record in records]
      columns |= jax.tree.map(np.asarray, conditioner.of_prompts(frozen, prompts))
  return ArraySource(columns, unreadable)


def moments_encoder(model) -> Callable:
  """The jitted (weights, uint8 images [b h w 3]) -> moments of z."""
  return jit(lambda weights, images: model.space.moments(weights, to_float(images)))


def _captions(records: list[Record], text, frozen: dict, mesh: Mesh, progress: bool) -> dict:
  captions = [caption for record in records for caption in record['captions']]
  weights = {role: put_params(frozen[role], mesh) for role in text.networks}
  encode = jax.jit(lambda weights, tokens: text.encode(weights, {'tokens': tokens}))
  encoded = [
    {name: part if name == 'mask' else part.astype(np.float16) for name, part in one.items()}
    for one in tqdm(
      in_batches(encode, weights, text.tokens(captions), mesh=mesh, batch_size=256),
      total=-(-len(captions) // 256), desc='encoding captions', disable=not progress, leave=False,
    )
  ]
  ends = np.cumsum([len(record['captions']) for record in records])[:-1]
  columns = {name: np.split(column, ends) for name, column in _joined(encoded).items()}
  columns['texts'] = columns.pop('text')
  return columns


def _joined(batches: list[dict]) -> dict[str, np.ndarray]:
  return {name: np.concatenate([one[name] for one in batches]) for name in batches[0]}


def _read(source: Source, progress: bool) -> tuple[list[Record], dict[int, str]]:
  """(all records, unreadable ones black and without text, their errors), alike in all processes."""
  records: dict[int, Record] = {}
  mine: dict[int, str] = {}
  for i in tqdm(range(len(source)), desc='reading images', disable=not progress, leave=False):
    try:
      records[i] = source[i]
    except Unreadable as error:
      mine[i] = str(error)
  unreadable = {
    int(i): why for each in agree('cache/unreadable', json.dumps(mine))
    for i, why in json.loads(each).items()
  }
  if len(unreadable) == len(source):
    raise UserError(f'no record can be read, the first because {unreadable[0]}')
  like = next(record['image'] for record in records.values())
  blank = Record(image=np.zeros_like(like), captions=[''], id='')
  return [blank if i in unreadable else records[i] for i in range(len(source))], unreadable


def synthetic_cache(model, frozen: dict, count: int, size: tuple[int, int]) -> ArraySource:
  """Return what `cached_source` does, of random numbers; nothing is encoded.

  Args:
    size: (height, width) of the images, in pixels.
  """
  images = jax.ShapeDtypeStruct((1, *size, 3), jnp.uint8)
  rng = np.random.default_rng(0)
  normal = lambda *shape: rng.standard_normal((count, *shape), np.float32)
  columns = {
    name: np.full((count, *leaf.shape[1:]), 0.1, np.float32) if name == 'std'
    else normal(*leaf.shape[1:])
    for name, leaf in jax.eval_shape(moments_encoder(model), frozen, images).items()
  }
  if model.text is not None:
    encoded = jax.eval_shape(model.text.encode, frozen, {'tokens': model.text.tokens([''])})
    texts = {
      name: np.ones((count, *leaf.shape), np.int32) if name == 'mask'
      else normal(1, *leaf.shape[1:]).astype(np.float16) for name, leaf in encoded.items()
    }
    columns |= {'texts': texts.pop('text'), **texts}
  for conditioner in model.conditioners.values():
    if conditioner.kept and conditioner is not model.text:
      columns |= jax.tree.map(np.asarray, conditioner.of_prompts(frozen, [''] * count))
  return ArraySource(columns)
