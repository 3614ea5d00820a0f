"""Latents and text embeddings computed once, before training, instead of in every step."""

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
from diffusion_jax.data.sources.tfds import ImageSource
from diffusion_jax.errors import Unreadable, UserError
from diffusion_jax.parallel.mesh import in_batches, put_params
from diffusion_jax.parallel.processes import agree
from diffusion_jax.pixels import to_float
from diffusion_jax.types import Record


@dataclasses.dataclass(frozen=True)
class ChooseText:
  """A record of the cache -> 'mean', 'std' [h w c], 'text' [l d] of one of its captions.

  And 'pooled' [p], where the model is told it.
  """

  random: ClassVar[bool] = True

  def __call__(self, record: dict, rng: np.random.Generator) -> dict:
    chosen = int(rng.integers(len(record['texts'])))
    text = record['texts'][chosen]
    out = {'mean': record['mean'], 'std': record['std'], 'text': text.astype(np.float32)}
    if 'pooled' in record:
      out['pooled'] = record['pooled'][chosen].astype(np.float32)
    return out


def moments_encoder(model) -> Callable:
  """The jitted (autoencoder, uint8 images [b h w 3]) -> mean and std of unscaled latents."""

  def encode(params, images):
    mean, logvar = model.autoencoder.bind(params).encode(to_float(images))
    return mean.astype(jnp.float32), jnp.exp(logvar.astype(jnp.float32) / 2)

  return jit(encode)


def cached_source(
  source: ImageSource, model, frozen: dict, mesh: Mesh, progress: bool = True
) -> ArraySource:
  """Encodes every image and every caption of `source` once.

  Columns: 'mean' and 'std' [h w c], moments of the unscaled latents, float32; 'texts' [k l d], the
  embeddings of the record's k captions, float16 to halve the memory; 'pooled' [k p] for SDXL.

  A record that cannot be read in any of the processes has a row that cannot be read, so that all
  others keep their numbers.
  """
  params = {role: put_params(frozen[role], mesh) for role in ('autoencoder', *model.text.networks)}
  records, unreadable = _read(source, progress)
  images = np.stack([record['image'] for record in records])
  captions = [caption for record in records for caption in record['captions']]
  moments = list(tqdm(
    in_batches(moments_encoder(model), params['autoencoder'], images, mesh=mesh),
    total=-(-len(images) // 64), desc='encoding images', disable=not progress, leave=False,
  ))
  mean, std = (np.concatenate(part) for part in zip(*moments, strict=True))
  told = [
    jax.tree.map(lambda part: part.astype(np.float16), condition) for condition in tqdm(
      in_batches(
        jax.jit(model.text.encode), params, model.tokens(captions), mesh=mesh, batch_size=256
      ),
      total=-(-len(captions) // 256), desc='encoding captions', disable=not progress, leave=False,
    )
  ]
  ends = np.cumsum([len(record['captions']) for record in records])[:-1]
  columns = {'texts': np.concatenate([c.text for c in told])}
  if model.text.pooled:
    columns['pooled'] = np.concatenate([c.pooled for c in told])
  by_record = {name: np.split(column, ends) for name, column in columns.items()}
  return ArraySource({'mean': mean, 'std': std, **by_record}, unreadable)


def _read(source: ImageSource, progress: bool) -> tuple[list[Record], dict[int, str]]:
  """(all records, why some cannot be read); in the place of these is a black image without text.

  All processes have the same, for they encode them together.
  """
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


def synthetic_cache(model, frozen: dict, count: int) -> ArraySource:
  """What `cached_source` gives, of random numbers; nothing is encoded."""
  images = jax.ShapeDtypeStruct((1, model.image_size, model.image_size, 3), jnp.uint8)
  latents, _ = jax.eval_shape(moments_encoder(model), frozen['autoencoder'], images)
  told = jax.eval_shape(model.text.encode, frozen, model.tokens(['']))
  rng = np.random.default_rng(0)
  draw = lambda *shape: rng.standard_normal((count, *shape), np.float32)
  shape = latents.shape[1:]
  columns = {
    'mean': draw(*shape), 'std': np.full((count, *shape), 0.1, np.float32),
    'texts': draw(1, *told.text.shape[1:]).astype(np.float16),
  }
  if told.pooled is not None:
    columns['pooled'] = draw(1, *told.pooled.shape[1:]).astype(np.float16)
  return ArraySource(columns)
