"""A pipeline as a directory: model_index.json and a folder for each part that it names.

The layout is diffusers', or ours with the same folders and params.safetensors. A model trained here
has its own class in model_index.json: TextToImage, whose autoencoder and CLIP may be 'asset:NAME',
or Diffusion, with a space and conditioners of any kind; both are read as the same parts. A
`Pipeline` is a description: tensors stay in their files until used.
"""

import contextlib
import dataclasses
import os
import re
import shutil
import tempfile
from collections.abc import Container, Iterator, Mapping
from pathlib import Path
from typing import Any

from diffusion_jax.diffusion.noise import NoiseConfig
from diffusion_jax.diffusion.parameterization import PREDICTIONS
from diffusion_jax.errors import require, shown
from diffusion_jax.files import INDEX, check_folder, inside, reading
from diffusion_jax.formats.networks import (
  CONFIG,
  NATIVE,
  WEIGHTS,
  Part,
  as_type,
  read_part,
  resolve,
  save_params,
)
from diffusion_jax.formats.published import (
  TRANSFORMERS,
  from_published_layout,
  match,
  parse_config,
)
from diffusion_jax.formats.scheduler import Scheduler, read_scheduler, scheduler_or_plain
from diffusion_jax.formats.tensors import PICKLES, Tensor, read_json, write_json, write_tensors
from diffusion_jax.types import Params

TEXT_TO_IMAGE, DIFFUSION = 'TextToImage', 'Diffusion'
"""The classes of models that were trained here."""
CONVERSION = 'conversion'
"""The entry of an index on the terms of a model that are not those of its network's scheduler."""
SCHEDULER = 'scheduler_config.json'
MOST_PATCH = 64
TEXT_CLASSES = {
  'clip': ('CLIPTextModel', 'CLIPTokenizer'), 't5': ('T5EncoderModel', 'T5Tokenizer')
}
"""transformers' classes of text encoders and tokenizers."""
FOLDERS = {'denoiser': 'unet', 'autoencoder': 'vae'}
"""Our roles of networks -> diffusers' folders, where they differ."""
TRANSFORMER = 'transformer'
"""The folder of a denoiser in pipelines of diffusers without a U-Net."""
TOKENIZER = (
  'vocab.json', 'merges.txt', 'tokenizer.json', 'tokenizer_config.json', 'special_tokens_map.json',
  'added_tokens.json', 'spiece.model',
)
"""Files of a tokenizer."""


@dataclasses.dataclass
class Pipeline:
  """model_index.json without its parts, the parts by name, and sentences on what was left out."""

  index: dict[str, Any]
  parts: dict[str, Part]
  notes: list[str] = dataclasses.field(default_factory=list)

  @property
  def kind(self) -> str:
    """Its class; TEXT_TO_IMAGE or DIFFUSION for a model that was trained here."""
    return self.index.get('_class_name', '')

  @property
  def latent_patch_size(self) -> int:
    """Edge of the squares of latents that are folded into channels."""
    patch = self.index.get('latent_patch_size', self.index.get('space', {}).get('patch', 1))
    require(
      type(patch) is int and 1 <= patch <= MOST_PATCH,
      f'{INDEX} has latent_patch_size {shown(patch)}; give 1 to {MOST_PATCH}.',
    )
    return patch

  def scheduler(self, part: str = 'scheduler') -> Scheduler:
    """Noise schedule, prediction and sampling; UserError: no such part, or one not implemented.

    Sampling of a model trained here is in `index['sample']`.
    """
    require(part in self.parts, f'{INDEX} names no {part}; give a text-to-image pipeline.')
    values, where = self.parts[part].json(SCHEDULER)
    if not values and 'noise' not in self.index:
      values = read_json(where)
    if self.kind not in (TEXT_TO_IMAGE, DIFFUSION):
      return read_scheduler(values, where)
    plain = {'prediction': values.get('prediction_type', 'epsilon'), 'noise': values}
    return own_terms(plain | self.index, where)


def own_terms(entries: Mapping[str, Any], where: str) -> Scheduler:
  """Return what a network predicts on which noise, by the entries of an index written here."""
  prediction = entries.get('prediction')
  require(
    isinstance(prediction, str) and prediction in PREDICTIONS,
    f'{where} predicts {shown(prediction)}; only {", ".join(PREDICTIONS)} are known.',
  )
  noise = entries.get('noise')
  require(isinstance(noise, dict), f'{INDEX}: noise is {shown(noise)}; it must be an object.')
  known = {field.name for field in dataclasses.fields(NoiseConfig)}
  noise = parse_config(NoiseConfig, {k: v for k, v in noise.items() if k in known}, {}, where)
  data_std = entries.get('data_std', 1.0)
  require(
    type(data_std) in (int, float) and 0 < data_std < 1e6,
    f'{INDEX}: data_std is {shown(data_std)}; it must be a number above 0.',
  )
  return Scheduler(noise, prediction, data_std=data_std)


def is_pipeline(path: Path) -> bool:
  """Return whether a directory is one of a pipeline rather than of one network."""
  return (path / INDEX).is_file()


def read_pipeline(path: str | os.PathLike, names: Container[str] | None = None) -> Pipeline:
  """The pipeline in a directory of either layout, or 'asset:NAME'; names: required parts, or all.

  UserError: no pipeline, or a part that is missing, broken or outside of the directory.
  """
  directory = resolve(path)
  require(
    directory.suffix != WEIGHTS or not directory.is_file(),
    f'{path} is a single file, which holds no tokenizer; make a directory of it: python -m '
    f'diffusion_jax convert --from {path} --to DIR --layout diffusers --tokenizer DIR.',
  )
  require(
    is_pipeline(directory),
    f'{path} is no text-to-image model: it has no {INDEX}; give a directory that train or convert '
    'wrote, or a pipeline of diffusers.',
  )
  values = read_json(inside(directory / INDEX, directory))
  if values.get('_class_name') in (TEXT_TO_IMAGE, DIFFUSION):
    return Pipeline(values, _own_parts(directory, values))
  found = Pipeline({}, {})
  for name, entry in values.items():
    if not (isinstance(entry, list) and len(entry) == 2) or name.startswith('_'):
      found.index[name] = entry
      continue
    require(
      re.fullmatch(r'[A-Za-z0-9_]+', name) is not None,
      f'{directory / INDEX} names a part {name!r}; a part must be a folder beside it, named in '
      'letters, digits and underscores.',
    )
    if entry[0] is None or entry[1] is None:
      found.index[name] = [None, None]
    elif names is None or name in names:
      folder = directory / name
      require(
        folder.is_dir(), f'{directory / INDEX} names a part {name}, but there is no {folder}.'
      )
      part = read_part(inside(folder, directory), (str(entry[0]), str(entry[1])))
      found.parts[name] = part
  require(
    bool(found.parts),
    f'{directory / INDEX} names no parts as [library, class]; give a pipeline in the layout of '
    'diffusers.',
  )
  for name, part in list(found.parts.items()) if names is None else ():
    _leave_out_pickles(found, directory / name, name, part)
  return found


def _own_paths(directory: Path, index: Mapping[str, Any]) -> dict[str, str]:
  """Paths of the parts of a model trained here, by diffusers' names; of DIFFUSION perhaps without
  some."""
  if index['_class_name'] == TEXT_TO_IMAGE:
    return {'unet': 'unet'} | {
      name: text if (text := str(index.get(role, role))).startswith('asset:') else role
      for name, role in (('vae', 'autoencoder'), ('text_encoder', 'clip'))
    }
  with reading(directory / INDEX, 'describes no model', 'export it again'):
    found = {'vae': index['space'].get('autoencoder')}
    found |= _text_paths(index['conditioners'].get('text', {}))
    return {'unet': 'denoiser'} | {name: str(path) for name, path in found.items() if path}


def _own_parts(directory: Path, index: Mapping[str, Any]) -> dict[str, Part]:
  """Parts of a model trained here, by diffusers' names."""
  paths = _own_paths(directory, index)
  entries = {
    'unet': ('diffusers', 'UNet2DConditionModel'), 'vae': ('diffusers', 'AutoencoderKL'),
    'scheduler': ('diffusers', 'DDIMScheduler'),
  }
  parts = {
    name: read_part(own_path(path, directory), entries.get(name, ('', '')))
    for name, path in {**paths, 'scheduler': 'scheduler'}.items()
  }
  for name in [name for name in parts if name.startswith('text_encoder')]:
    text, tokenizer = parts[name], name.replace('text_encoder', 'tokenizer')
    model, reader = TEXT_CLASSES['t5' if text.kind == 't5' else 'clip']
    text.entry = 'transformers', model
    if tokenizer not in parts:
      files = [file for file in text.files if file.name in TOKENIZER]
      parts[tokenizer] = Part(('transformers', reader), text.path, files=files)
    text.files = []
  return parts


def _text_paths(options: Mapping[str, Any]) -> dict[str, str]:
  """The folders of text encoders, and of tokenizers of their own, by diffusers' names."""
  found = {}
  for number, one in enumerate(options.get('encoders', [options] if options else []), 1):
    suffix = f'_{number}' if number > 1 else ''
    found |= {f'text_encoder{suffix}': one['path'], f'tokenizer{suffix}': one.get('tokenizer')}
  return found


def own_path(path: str, directory: Path) -> str:
  """The path of a part in an index; UserError for one outside of the directory."""
  return path if path.startswith('asset:') else str(inside(directory / path, directory))


def _leave_out_pickles(pipeline: Pipeline, folder: Path, name: str, part: Part) -> None:
  """A part of no known kind has to bring weights that may be copied, if it has any."""
  pickles = sorted(file.name for file in folder.iterdir() if file.suffix in PICKLES)
  safe = any(file.suffix == WEIGHTS for file in part.files)
  if part.kind is None and pickles and not safe:
    del pipeline.parts[name]
    pipeline.index[name] = [None, None]
    pipeline.notes.append(
      f'{name} is left out: its weights, {pickles[0]}, are a pickle, which is never opened.'
    )


def write_pipeline(pipeline: Pipeline, path: Path, layout: str, dtype: str | None) -> None:
  """Write the directory atomically; types are unchanged where dtype is None.

  UserError: a network not implemented here (native), or values out of dtype's range.
  """
  with new_directory(path) as folder:
    for name, part in pipeline.parts.items():
      write_part(part, folder / name, layout, dtype)
    entries = {name: list(part.entry) for name, part in pipeline.parts.items()}
    write_json(folder / INDEX, pipeline.index | entries)


def write_part(part: Part, folder: Path, layout: str, dtype: str | None) -> None:
  """Write the folder of one part."""
  folder.mkdir(parents=True, exist_ok=True)
  for file in part.files:
    shutil.copyfile(file, folder / file.name)
  for name, values in part.texts.items():
    write_json(folder / name, values)
  if part.kind is None:
    return
  native, weights = layout == 'native', part.format.weights
  config = dict(part.values)
  if dtype and weights == TRANSFORMERS:
    config.pop('torch_dtype', None)
    config['dtype'] = dtype
  write_json(folder / CONFIG, config)
  tensors = _to_native(part, folder) if native else part.tensors
  write_tensors(folder / (NATIVE if native else weights), typed(tensors, dtype))


def _to_native(part: Part, folder: Path) -> dict[str, Tensor]:
  shapes = part.format.shapes(part.config)
  change = lambda name: lambda value: from_published_layout(name, value)
  matched = match(part.tensors, shapes, folder.name)
  return {name: t.then(change(name), tuple(shapes[name].shape)) for name, t in matched.items()}


def typed(tensors: dict[str, Tensor], dtype: str | None) -> dict[str, Tensor]:
  """The tensors in another floating type; whole numbers stay, all where dtype is None."""
  is_floating = lambda tensor: tensor.dtype.kind in 'fV'  # Those of ml_dtypes have the kind V.
  return {
    name: as_type(name, tensor, dtype) if dtype and is_floating(tensor) else tensor
    for name, tensor in tensors.items()
  }


@contextlib.contextmanager
def new_directory(path: Path) -> Iterator[Path]:
  """A folder that becomes `path` when all has been written. UserError where `path` exists."""
  require(
    not path.exists() or (path.is_dir() and not any(path.iterdir())),
    f'{path} is there already; give a new path.',
  )
  path.parent.mkdir(parents=True, exist_ok=True)
  folder = Path(tempfile.mkdtemp(dir=path.parent, prefix=f'.{path.name}.', suffix='.tmp'))
  try:
    os.chmod(folder, 0o755)
    yield folder
    os.replace(folder, path)
  finally:
    shutil.rmtree(folder, ignore_errors=True)


def export_scheduler(directory: Path, scheduler: Scheduler) -> dict[str, str]:
  """Write scheduler/scheduler_config.json and return its entries of model_index.json."""
  values, why = scheduler_or_plain(scheduler)
  (directory / 'scheduler').mkdir(parents=True, exist_ok=True)
  if values is not None:
    write_json(directory / 'scheduler' / SCHEDULER, values)
  return {} if why is None else {'scheduler_note': why}


def keep_folder(path: str, directory: Path, name: str) -> str:
  """Copy a folder of a model as `name`, and return that; an 'asset:NAME' stays what it is."""
  if path.startswith('asset:'):
    return path
  shutil.copytree(resolve(path), directory / name, dirs_exist_ok=True)
  return name


def keep_changed(
  path: str, directory: Path, name: str, changed: tuple[Any, Params], dtype: str
) -> str:
  """Write a network's folder as `name`, with the tokenizer's files of `path`, and return that."""
  source = resolve(path)
  (directory / name).mkdir(parents=True, exist_ok=True)
  for file in TOKENIZER:
    if (source / file).is_file():
      shutil.copyfile(inside(source / file, source), directory / name / file)
  save_params(directory / name, *changed, dtype=dtype)
  return name


def folder_of(role: str, index: Mapping[str, Any], directory: Path) -> str:
  """Return the folder, or 'asset:NAME', of a network's role in the pipeline with this index."""
  if index.get('_class_name') in (TEXT_TO_IMAGE, DIFFUSION):
    return _own_paths(directory, index)[FOLDERS.get(role, role)]
  return TRANSFORMER if role == 'denoiser' and TRANSFORMER in index else FOLDERS.get(role, role)


def _moved(role: str, index: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
  """(folder, index) of a model trained here once the text encoder of a role is no asset any more.
  """
  if index['_class_name'] == TEXT_TO_IMAGE:
    return 'clip', {**index, 'clip': 'clip'}
  text = index['conditioners']['text']
  if 'encoders' in text:
    number = int(role.removeprefix('text_encoder_') or 1) if role != 'text_encoder' else 1
    encoders = [
      {**one, 'path': role} if place == number else one
      for place, one in enumerate(text['encoders'], 1)
    ]
    text = {**text, 'encoders': encoders}
  else:
    text = {**text, 'path': role}
  return role, {**index, 'conditioners': {**index['conditioners'], 'text': text}}


def save_changed(
  directory: Path, source: str, changed: Mapping[str, tuple[Any, Params]], dtype: str
) -> None:
  """Write a copy of the pipeline in `source` with other (config, params) for some roles.

  Single files of weights next to the parts, which are of the old model, are left out, and all but
  a tokenizer in the folders of those that change.
  """
  origin = resolve(source)
  index = read_json(origin / INDEX)
  folders = {role: folder_of(role, index, origin) for role in changed}
  own = {origin / folder for folder in folders.values()}

  def ignore(folder: str, names: list[str]) -> set[str]:
    if Path(folder) in own:
      return set(names) - set(TOKENIZER)
    if Path(folder) != origin:
      return set()
    weights = {name for name in names if Path(name).suffix in (WEIGHTS, *PICKLES)}
    return weights | {name for name in names if name.startswith('.')}

  check_folder(origin)
  shutil.copytree(origin, directory, ignore=ignore, dirs_exist_ok=True)
  for role, part in changed.items():
    if folders[role].startswith('asset:'):
      folder, index = _moved(role, index)
      keep_changed(folders[role], directory, folder, part, dtype)
      write_json(directory / INDEX, index)
    else:
      save_params(directory / folders[role], *part, dtype=dtype)
