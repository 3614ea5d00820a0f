"""Conversion of pipelines and single networks between diffusers, single files and our layout.

Tensors are only renamed and reshaped (but for our layout), one at a time in memory.
"""

import math
import shutil
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from diffusion_jax import registry
from diffusion_jax.errors import require
from diffusion_jax.files import inside
from diffusion_jax.formats.networks import CONFIG, DTYPES, Part, network_format, read_part, resolve
from diffusion_jax.formats.original import read_original, write_original
from diffusion_jax.formats.pipeline import (
  DIFFUSION,
  SCHEDULER,
  TEXT_TO_IMAGE,
  Pipeline,
  is_pipeline,
  new_directory,
  read_pipeline,
  typed,
  write_part,
  write_pipeline,
)
from diffusion_jax.formats.single_file import read_single_file, write_single_file
from diffusion_jax.formats.tensors import PICKLES, Tensor, read_json, write_tensors
from diffusion_jax.formats.torch_files import read_state
from diffusion_jax.formats.transformer_names import TABLES

LAYOUTS = ('diffusers', 'single-file', 'native', 'tensors')


def convert(
  source: str, target: str, layout: str, *, dtype: str | None = None, kind: str | None = None,
  prediction: str | None = None, tokenizers: str | None = None,
) -> list[str]:
  """Write `target`, a new directory or file, from `source`; return sentences for people.

  UserError: `source` cannot be read, `target` exists or cannot hold it.

  Args:
    source: a pipeline's directory (diffusers or native), a single .safetensors file, the directory
      of one network, or with `kind` a file with a transformer, which may be PyTorch's.
    layout: one of LAYOUTS; 'tensors' writes those of a PyTorch file, by name and unchanged, to a
      .safetensors file.
    dtype: of the floating tensors; None leaves each as it is.
    kind: of one network, a row of NETWORKS, if not in its config.json; of a single file, of which
      only this transformer is then read.
    prediction: of a single file that lacks it: 'epsilon' or 'v_prediction'.
    tokenizers: for a single file, which holds none: the directory to copy them from, with other
      parts that the file lacks.
  """
  require(layout in LAYOUTS, f'--layout is {layout!r}; choose one of {", ".join(LAYOUTS)}.')
  require(
    dtype is None or dtype in DTYPES, f'--dtype is {dtype!r}; choose one of {", ".join(DTYPES)}.'
  )
  where, there = resolve(source), Path(target)
  require(where.exists(), f'There is no {source}; check --from.')
  if layout == 'tensors':
    require(
      where.is_file() and where.suffix in PICKLES and there.suffix == '.safetensors',
      '--layout tensors makes a .safetensors file of a file of PyTorch '
      f'({", ".join(PICKLES)}); check --from and --to.',
    )
    _convert_tensors(where, there, dtype)
    return []
  if where.is_file() and kind in TABLES:
    return _convert_original(where, there, layout, dtype, kind)
  require(
    where.suffix not in PICKLES,
    f'{source} is a pickle, which can run any code and is never opened as a model; make it '
    f'safetensors with --layout tensors, or name the transformer in it by --type '
    f'({", ".join(TABLES)}).',
  )
  if where.is_dir() and not is_pipeline(where):
    return _convert_part(where, there, layout, dtype, kind)
  require(
    kind is None, '--type names the kind of one network, in a single file '
    f'{" or ".join(TABLES)}; a pipeline says the kinds of its parts.',
  )
  pipeline = _read(where, layout, prediction, tokenizers)
  _check_space(pipeline.parts.values(), there, dtype)
  notes = pipeline.notes
  if layout == 'single-file':
    return notes + write_single_file(pipeline, _single(there), dtype)
  write_pipeline(pipeline, there, layout, dtype)
  return notes


def _read(where: Path, layout: str, prediction: str | None, tokenizers: str | None) -> Pipeline:
  if where.is_dir():
    return _to_diffusers(read_pipeline(where), where)
  require(
    layout != 'single-file',
    f'{where} is a single file already; to change its type, convert to diffusers and back.',
  )
  return read_single_file(where, prediction, None if tokenizers is None else Path(tokenizers))


def _to_diffusers(pipeline: Pipeline, where: Path) -> Pipeline:
  """A model that was trained here as a pipeline of diffusers; any other as it is."""
  if pipeline.kind not in (TEXT_TO_IMAGE, DIFFUSION):
    return pipeline
  kinds = {name: part.kind for name, part in pipeline.parts.items() if part.kind}
  conditions = [*pipeline.index.get('conditioners', ['text'])]
  # With one CLIP as it is; of any other `path` does not stand alone.
  plain = set(pipeline.index.get('conditioners', {}).get('text', {})) <= {'path'}
  require(
    kinds.keys() == {'unet', 'vae', 'text_encoder'} and conditions == ['text'] and plain
    and (kinds['unet'], kinds['vae']) == ('unet', 'autoencoder')
    and kinds['text_encoder'] != 't5',
    f'{where} is a model of this library alone (a {kinds.get("unet")} conditioned on '
    f'{" and ".join(conditions) or "nothing"}), for which no other layout has a name; convert its '
    'parts, such as denoiser/, by themselves.',
  )
  require(
    pipeline.latent_patch_size == 1,
    f'{where} has latents that are folded {pipeline.latent_patch_size} x '
    f'{pipeline.latent_patch_size} (latent_patch_size), for which no other layout has a name; '
    'convert its parts, unet/ and the autoencoder, by themselves.',
  )
  parts = dict(pipeline.parts)
  scheduler = parts['scheduler'].json(SCHEDULER)[0].get('_class_name')
  require(
    isinstance(scheduler, str),
    f'{where} has no {SCHEDULER}: {pipeline.index.get("scheduler_note", "it is gone")}.',
  )
  parts['scheduler'].entry = ('diffusers', scheduler)
  text = parts['text_encoder']
  if text.kind == 'clip':  # Of which a pipeline has the text tower alone.
    parts['text_encoder'] = Part(
      text.entry, kind='clip_text',
      values=network_format('clip_text').describe(text.config.text_config),
      stored={n: tensor for n, tensor in text.tensors.items() if n.startswith('text_model.')},
    )
  absent = {key: [None, None] for key in ('safety_checker', 'feature_extractor', 'image_encoder')}
  index = {'_class_name': 'StableDiffusionPipeline', 'requires_safety_checker': False, **absent}
  return Pipeline(index, parts)


def _convert_tensors(where: Path, there: Path, dtype: str | None) -> None:
  require(not there.exists(), f'{there} exists already; choose another --to.')
  found = read_state(where)
  require(bool(found), f'{where} holds no tensors by name.')
  new = {name: Tensor(t.dtype, t.shape, lambda t=t: t) for name, t in found.items()}
  write_tensors(there, typed(new, dtype))


def _convert_part(
  where: Path, there: Path, layout: str, dtype: str | None, kind: str | None
) -> list[str]:
  """One network, given by its directory; sentences on what is not told."""
  if kind is not None:
    registry.check(registry.NETWORKS, kind, '--type')
  config = read_json(inside(where / CONFIG, where))
  part = read_part(where, kind=kind)
  require(
    part.kind is not None,
    f'{where / CONFIG} describes no network that is known here '
    f'({config.get("_class_name") or config.get("architectures")}); name it with --type, one of '
    f'{", ".join(registry.NETWORKS)}.',
  )
  _check_space([part], there, dtype)
  if layout == 'single-file':
    require(
      part.kind in TABLES,
      f'{where} holds one network; a single file is made of a whole pipeline, which has a '
      f'model_index.json, or of a transformer ({" or ".join(TABLES)}).',
    )
    return write_original(part, _single(there), dtype)
  with new_directory(there) as folder:
    write_part(part, folder, layout, dtype)
  return []


def _convert_original(
  where: Path, there: Path, layout: str, dtype: str | None, kind: str
) -> list[str]:
  """The transformer in a single file, by itself; sentences on what is left out or not told."""
  require(layout != 'single-file', f'{where} is a single file already.')
  part, notes = read_original(where, kind)
  _check_space([part], there, dtype)
  with new_directory(there) as folder:
    write_part(part, folder, layout, dtype)
  return notes


def _single(there: Path) -> Path:
  require(
    there.suffix == '.safetensors', f'--to is {there}; a single file ends in .safetensors.'
  )
  return there


def _check_space(parts: Iterable[Part], there: Path, dtype: str | None) -> None:
  """Raise a UserError where the disk is too small, before any work."""
  size = lambda tensor: np.dtype(DTYPES[dtype] if dtype else tensor.dtype).itemsize
  needed = sum(
    size(tensor) * math.prod(tensor.shape) for part in parts for tensor in part.tensors.values()
  )
  parent = next(folder for folder in there.absolute().parents if folder.is_dir())
  free = shutil.disk_usage(parent).free
  require(
    free >= needed,
    f'{there} needs {needed / 1e9:.1f} GB, but {parent} has {free / 1e9:.1f} GB left; free some, '
    'or choose another --to or a smaller --dtype.',
  )
