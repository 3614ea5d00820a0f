"""A pipeline as a directory: model_index.json and a folder for each part that it names.

The layout is that of diffusers, or our own with the same folders, where the weights are in
params.safetensors. A model that was trained here has a model_index.json of its own class,
TextToImage, in which the autoencoder and CLIP may be 'asset:NAME'; it is read as the same parts.
Tensors stay in their files until they are asked for: a `Pipeline` is what a directory or a single
file says, not its weights.
"""

import contextlib
import dataclasses
import functools
import os
import re
import shutil
import tempfile
from collections.abc import Container, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from diffusion_jax.diffusion.noise import NoiseConfig
from diffusion_jax.diffusion.parameterization import PREDICTIONS
from diffusion_jax.errors import UserError, require, shown
from diffusion_jax.files import INDEX, check_folder, inside
from diffusion_jax.formats.networks import (
  DTYPES,
  NATIVE,
  cast,
  find_weights,
  kind_of,
  load_params,
  network_format,
  resolve,
  save_params,
)
from diffusion_jax.formats.published import (
  TRANSFORMERS,
  from_published_layout,
  match,
  parse_config,
  published_name,
  published_shape,
  to_published_layout,
)
from diffusion_jax.formats.scheduler import Scheduler, read_scheduler, scheduler_or_plain
from diffusion_jax.formats.tensors import (
  PICKLES,
  NewTensor,
  Tensor,
  open_tensors,
  read_json,
  write_json,
  write_tensors,
)
from diffusion_jax.models.network import Network
from diffusion_jax.types import Params

OWN = 'TextToImage'
"""The class of a model that was trained here."""
SCHEDULER = 'scheduler_config.json'
MOST_PATCH = 64
FOLDERS = {'denoiser': 'unet', 'autoencoder': 'vae'}
"""Our roles of networks -> diffusers' folders, where they differ."""
TOKENIZER = (
  'vocab.json', 'merges.txt', 'tokenizer.json', 'tokenizer_config.json', 'special_tokens_map.json',
  'added_tokens.json',
)
"""Files of a tokenizer."""
_TEXTS = ('.json', '.txt', '.model')
_WEIGHTS = '.safetensors'


@dataclasses.dataclass
class Part:
  """One part of a pipeline.

  entry: library and class in model_index.json.
  path: its folder, which may be 'asset:NAME'; empty for a part of a single file.
  kind: its row of NETWORKS; None where there is none for it.
  values: config.json of a network.
  files: what is copied as it is.
  texts: name -> JSON object that is written beside the weights.
  stored: tensors by published names, of a part of a single file.
  """

  entry: tuple[str, str] = ('', '')
  path: str = ''
  kind: str | None = None
  values: dict[str, Any] = dataclasses.field(default_factory=dict)
  files: list[Path] = dataclasses.field(default_factory=list)
  texts: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
  stored: dict[str, NewTensor] | None = None

  @functools.cached_property
  def config(self) -> Any:
    """The network's config."""
    where = str(resolve(self.path) / 'config.json') if self.path else 'config.json'
    return network_format(self.kind).parse(self.values, where)

  @functools.cached_property
  def tensors(self) -> dict[str, NewTensor]:
    """The network's tensors by published names, unread, from either layout."""
    if self.stored is not None or self.kind is None:
      return self.stored or {}
    folder, spec = resolve(self.path), network_format(self.kind)
    native = folder / NATIVE
    if not native.is_file():
      opened = open_tensors(inside(find_weights(folder, spec.weights), folder))
      renamed = ((spec.rename(name), tensor) for name, tensor in opened.items())
      return {name: lazy(tensor) for name, tensor in renamed if name is not None}
    opened = open_tensors(inside(native, folder))
    matched = match(opened, spec.shapes(self.config), str(native), native=True)
    return {published_name(name): _to_published(name, t) for name, t in matched.items()}

  def expect(self, kinds: Sequence[str]) -> 'Part':
    """Return the part itself. UserError unless it is a network of one of these kinds."""
    if self.kind not in kinds:
      file = resolve(self.path) / 'config.json'
      read_json(file)  # Where there is none, that is what is wrong.
      raise UserError(f'{file} describes none of {", ".join(kinds)}; check which network it is.')
    return self

  def network(self, **options) -> Network:
    """Return the network without weights; options such as dtype."""
    return network_format(self.kind).network(self.config, **options)

  def load(self, *, dtype=jnp.float32, mesh: Mesh | None = None) -> Params:
    """Return the network's parameters, onto the mesh or on the host."""
    return load_params(self.kind, self.path, dtype=dtype, mesh=mesh)[1]

  def json(self, name: str) -> tuple[dict[str, Any], str]:
    """Return one of the JSON files and where it is; an empty one where there is none."""
    file = next((file for file in self.files if file.name == name), None)
    if name in self.texts or file is None:
      return self.texts.get(name, {}), str(Path(self.path) / name)
    return read_json(file), str(file)


@dataclasses.dataclass
class Pipeline:
  """model_index.json without its parts, the parts by name, and sentences on what was left out."""

  index: dict[str, Any]
  parts: dict[str, Part]
  notes: list[str] = dataclasses.field(default_factory=list)

  @property
  def own(self) -> bool:
    """True for a model that was trained here."""
    return self.index.get('_class_name') == OWN

  @property
  def latent_patch_size(self) -> int:
    """Edge of the squares of latents that are folded into channels."""
    patch = self.index.get('latent_patch_size', 1)
    require(
      type(patch) is int and 1 <= patch <= MOST_PATCH,
      f'{INDEX} has latent_patch_size {shown(patch)}; give 1 to {MOST_PATCH}.',
    )
    return patch

  def scheduler(self, part: str = 'scheduler') -> Scheduler:
    """Return the noise schedule, the prediction and how to sample.

    Of a model that was trained here, `index['sample']` says how to sample.

    Raises:
      UserError: there is no such part, or what it says is not implemented.
    """
    require(part in self.parts, f'{INDEX} names no {part}; give a text-to-image pipeline.')
    values, where = self.parts[part].json(SCHEDULER)
    if not values and 'noise' not in self.index:
      values = read_json(where)
    if not self.own:
      return read_scheduler(values, where)
    prediction = self.index.get('prediction', values.get('prediction_type', 'epsilon'))
    require(
      isinstance(prediction, str) and prediction in PREDICTIONS,
      f'{where} predicts {shown(prediction)}; only {", ".join(PREDICTIONS)} are known.',
    )
    noise = self.index.get('noise', values)
    require(isinstance(noise, dict), f'{INDEX}: noise is {shown(noise)}; it must be an object.')
    known = {field.name for field in dataclasses.fields(NoiseConfig)}
    noise = parse_config(NoiseConfig, {k: v for k, v in noise.items() if k in known}, {}, where)
    data_std = self.index.get('data_std', 1.0)
    require(
      type(data_std) in (int, float) and 0 < data_std < 1e6,
      f'{INDEX}: data_std is {shown(data_std)}; it must be a number above 0.',
    )
    return Scheduler(noise, prediction, data_std=data_std)


def is_pipeline(path: Path) -> bool:
  """Return whether a directory is one of a pipeline rather than of one network."""
  return (path / INDEX).is_file()


def read_pipeline(path: str | os.PathLike, names: Container[str] | None = None) -> Pipeline:
  """Return the pipeline in a directory of either layout, or 'asset:NAME'.

  Args:
    names: of the parts that are read; None for all, each of which must then be there.

  Raises:
    UserError: no pipeline, or a part that is missing or broken, or leads out of the directory.
  """
  directory = resolve(path)
  require(
    directory.suffix != _WEIGHTS or not directory.is_file(),
    f'{path} is a single file, which holds no tokenizer; make a directory of it: python -m '
    f'diffusion_jax convert --from {path} --to DIR --layout diffusers --tokenizer DIR.',
  )
  require(
    is_pipeline(directory),
    f'{path} is no text-to-image model: it has no {INDEX}; give a directory that train or convert '
    'wrote, or a pipeline of diffusers.',
  )
  values = read_json(inside(directory / INDEX, directory))
  if values.get('_class_name') == OWN:
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


def _own_parts(directory: Path, index: Mapping[str, Any]) -> dict[str, Part]:
  """The parts of a model that was trained here, by the names that diffusers has for them."""
  at = lambda role: (
    named if (named := str(index.get(role, role))).startswith('asset:') else directory / role
  )
  text = read_part(at('clip'), ('transformers', 'CLIPTextModel'))
  files = [file for file in text.files if file.name in TOKENIZER]
  tokenizer = Part(('transformers', 'CLIPTokenizer'), text.path, files=files)
  text.files = []
  return {
    'unet': read_part(directory / 'unet', ('diffusers', 'UNet2DConditionModel')),
    'vae': read_part(at('autoencoder'), ('diffusers', 'AutoencoderKL')),
    'text_encoder': text, 'tokenizer': tokenizer,
    'scheduler': read_part(directory / 'scheduler', ('diffusers', 'DDIMScheduler')),
  }


def _leave_out_pickles(pipeline: Pipeline, folder: Path, name: str, part: Part) -> None:
  """A part of no known kind has to bring weights that may be copied, if it has any."""
  pickles = sorted(file.name for file in folder.iterdir() if file.suffix in PICKLES)
  safe = any(file.suffix == _WEIGHTS for file in part.files)
  if part.kind is None and pickles and not safe:
    del pipeline.parts[name]
    pipeline.index[name] = [None, None]
    pipeline.notes.append(
      f'{name} is left out: its weights, {pickles[0]}, are a pickle, which is never opened.'
    )


def read_part(
  path: str | os.PathLike, entry: tuple[str, str] = ('', ''), kind: str | None = None
) -> Part:
  """Return one part, of a pipeline or alone; `kind` overrides what its config.json says."""
  folder = resolve(path)
  file = folder / 'config.json'
  values = read_json(inside(file, folder)) if file.is_file() else {}
  kind = kind or kind_of(values)
  files = sorted(file for file in folder.iterdir() if file.is_file()) if folder.is_dir() else []
  if kind is None:
    copied = [inside(f, folder) for f in files if f.suffix in (*_TEXTS, _WEIGHTS)]
    return Part(entry, os.fspath(path), files=copied)
  others = [
    inside(f, folder) for f in files if f.suffix in _TEXTS and f.name != 'config.json'
    and not re.search(r'\.safetensors\.index(\..+)?\.json$|\.bin\.index\.json$', f.name)
  ]
  return Part(entry, os.fspath(path), kind, values, others)


def check_part(part: Part, where: str) -> None:
  """Raise a UserError for a tensor whose name or shape is not that of the part's config."""
  if part.kind is not None:
    match(part.tensors, network_format(part.kind).shapes(part.config), where)


def lazy(tensor: Tensor) -> NewTensor:
  """Return a tensor of a file as one to be written."""
  return NewTensor(tensor.dtype, tensor.shape, lambda: np.asarray(tensor))


def _to_published(name: str, tensor: Tensor) -> NewTensor:
  shape = published_shape(name, tensor.shape)
  return NewTensor(tensor.dtype, shape, lambda: to_published_layout(name, np.asarray(tensor)))


def write_pipeline(pipeline: Pipeline, path: Path, layout: str, dtype: str | None) -> None:
  """Write the directory, all or nothing; with unchanged types where dtype is None.

  Raises:
    UserError: a network that we do not implement (native), or values that dtype cannot hold.
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
  spec, tensors = network_format(part.kind), part.tensors
  if layout == 'native':
    tensors = _to_native(part, folder)
  config = dict(part.values)
  if dtype and spec.weights == TRANSFORMERS:
    config.pop('torch_dtype', None)
    config['dtype'] = dtype
  write_json(folder / 'config.json', config)
  write_tensors(folder / (NATIVE if layout == 'native' else spec.weights), typed(tensors, dtype))


def _to_native(part: Part, folder: Path) -> dict[str, NewTensor]:
  shapes = network_format(part.kind).shapes(part.config)

  def native(name: str, tensor: NewTensor) -> NewTensor:
    shape = tuple(shapes[name].shape)
    return NewTensor(tensor.dtype, shape, lambda: from_published_layout(name, tensor.make()))

  matched = match(part.tensors, shapes, folder.name)
  return {name: native(name, tensor) for name, tensor in matched.items()}


def typed(tensors: dict[str, NewTensor], dtype: str | None) -> dict[str, NewTensor]:
  """Return the tensors in another floating type; whole numbers stay, all where dtype is None."""
  if dtype is None:
    return tensors
  is_floating = lambda tensor: tensor.dtype.kind in 'fV'  # Those of ml_dtypes have the kind V.

  def change(name: str, tensor: NewTensor) -> NewTensor:
    make = lambda: cast(name, np.asarray(tensor.make()), dtype)
    return NewTensor(DTYPES[dtype], tensor.shape, make) if is_floating(tensor) else tensor

  return {name: change(name, tensor) for name, tensor in tensors.items()}


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
  """Write scheduler/scheduler_config.json and return what model_index.json says of it."""
  values, why = scheduler_or_plain(scheduler)
  (directory / 'scheduler').mkdir(parents=True, exist_ok=True)
  if values is not None:
    write_json(directory / 'scheduler' / SCHEDULER, values)
  return {} if why is None else {'scheduler_note': why}


def write_trained(
  directory: Path, config: Any, params: Params, scheduler: Scheduler, *, sample: Mapping[str, Any],
  latent_patch_size: int, autoencoder: str, clip: str, dtype: str,
) -> None:
  """Write a model that was trained here; `read_pipeline` reads it.

  Args:
    config, params: of the denoiser.
    scheduler: the noise schedule, the prediction and the steps; scheduler_config.json is what
      diffusers samples alike with, or, where it has nothing for these steps, plain ones, and
      model_index.json says why. Without a class for the noise schedule there is no such file.
    sample: how to sample, in our terms.
    autoencoder, clip: folders that are copied, or 'asset:NAME'.
  """
  save_params(directory / 'unet', config, params, dtype=dtype)
  index = {
    '_class_name': OWN, 'sample': dict(sample), 'latent_patch_size': latent_patch_size,
    'noise': scheduler.schedule.saved(), 'prediction': scheduler.prediction,
    'data_std': scheduler.data_std, **export_scheduler(directory, scheduler),
  }
  for role, path in (('autoencoder', autoencoder), ('clip', clip)):
    index[role] = path if path.startswith('asset:') else role
    if index[role] == role:
      shutil.copytree(resolve(path), directory / role, dirs_exist_ok=True)
  write_json(directory / INDEX, index)


def save_changed(
  directory: Path, source: str, changed: Mapping[str, tuple[Any, Params]], dtype: str
) -> None:
  """Write a copy of the pipeline in `source` with other (config, params) for some roles.

  Single files of weights that lie beside the parts are of the old model and left behind.
  """
  skip = {FOLDERS.get(role, role) for role in changed}
  origin = resolve(source)

  def ignore(folder: str, names: list[str]) -> set[str]:
    if Path(folder) != origin:
      return set()
    weights = {name for name in names if Path(name).suffix in (_WEIGHTS, *PICKLES)}
    return (skip & set(names)) | weights | {name for name in names if name.startswith('.')}

  check_folder(origin)
  shutil.copytree(origin, directory, ignore=ignore, dirs_exist_ok=True)
  for role, (config, params) in changed.items():
    save_params(directory / FOLDERS.get(role, role), config, params, dtype=dtype)
