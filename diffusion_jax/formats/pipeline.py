"""A pipeline as a directory: model_index.json and a folder for each part that it names.

The layout is that of diffusers, or our own with the same folders, where the weights are in
params.safetensors. Tensors stay in their files until they are written: a `Pipeline` is what a
directory or a single file says, not its weights.
"""

import contextlib
import dataclasses
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from diffusion_jax.files import INDEX, inside
from diffusion_jax.formats.networks import (
  DTYPES,
  NATIVE,
  cast,
  find_weights,
  kind_of,
  match_native,
  network_format,
)
from diffusion_jax.formats.published import (
  TRANSFORMERS,
  NetworkFormat,
  from_published_layout,
  match,
  published_name,
  published_shape,
  to_published_layout,
)
from diffusion_jax.formats.tensors import (
  PICKLES,
  NewTensor,
  Tensor,
  open_tensors,
  read_json,
  write_json,
  write_tensors,
)
from diffusion_jax.models.checks import require

_TEXTS = ('.json', '.txt', '.model')
_WEIGHTS = '.safetensors'


@dataclasses.dataclass
class Part:
  """One part of a pipeline.

  library, class: what model_index.json says.
  kind: its name in NETWORKS, or None where we have no network for it.
  config: config.json, of parts with tensors.
  tensors: by published names, of parts with a kind.
  files: all others, copied as they are.
  texts: name -> JSON object that is written beside the weights.
  """

  entry: tuple[str, str]
  kind: str | None = None
  config: dict[str, Any] | None = None
  tensors: dict[str, NewTensor] = dataclasses.field(default_factory=dict)
  files: list[Path] = dataclasses.field(default_factory=list)
  texts: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class Pipeline:
  """model_index.json without its parts, the parts by name, and sentences on what was left out."""

  index: dict[str, Any]
  parts: dict[str, Part]
  notes: list[str] = dataclasses.field(default_factory=list)


def is_pipeline(path: Path) -> bool:
  """Whether a directory is one of a pipeline rather than of one network."""
  return (path / INDEX).is_file()


def read_pipeline(path: Path) -> Pipeline:
  """The pipeline in a directory of either layout.

  Raises:
    UserError: a part is missing or broken, or its name leads out of the directory.
  """
  values = read_json(inside(path / INDEX, path))
  found = Pipeline({}, {})
  for name, entry in values.items():
    if not (isinstance(entry, list) and len(entry) == 2) or name.startswith('_'):
      found.index[name] = entry
      continue
    require(
      re.fullmatch(r'[A-Za-z0-9_]+', name) is not None,
      f'{path / INDEX} names a part {name!r}; a part must be a folder beside it, named in letters, '
      'digits and underscores.',
    )
    if entry[0] is None or entry[1] is None:
      found.index[name] = [None, None]
      continue
    require(
      (path / name).is_dir(), f'{path / INDEX} names a part {name}, but there is no {path / name}.'
    )
    found.parts[name] = read_part(inside(path / name, path), (str(entry[0]), str(entry[1])))
  require(
    bool(found.parts),
    f'{path / INDEX} names no parts as [library, class]; give a pipeline in the layout of '
    'diffusers.',
  )
  for name, part in list(found.parts.items()):
    _leave_out_pickles(found, path / name, name, part)
  return found


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


def read_part(folder: Path, entry: tuple[str, str], kind: str | None = None) -> Part:
  """One part; `kind` overrides what its config.json says."""
  file = folder / 'config.json'
  config = read_json(inside(file, folder)) if file.is_file() else None
  if kind is None and config is not None:
    kind = kind_of(config)
  files = sorted(file for file in folder.iterdir() if file.is_file())
  if kind is None:
    copied = [f for f in files if f.suffix in (*_TEXTS, _WEIGHTS)]
    return Part(entry, files=[inside(f, folder) for f in copied])
  others = [
    inside(f, folder) for f in files if f.suffix in _TEXTS and f.name != 'config.json'
    and not re.search(r'\.safetensors\.index(\..+)?\.json$|\.bin\.index\.json$', f.name)
  ]
  return Part(entry, kind, config, read_weights(folder, network_format(kind), config or {}), others)


def read_weights(folder: Path, spec: NetworkFormat, config: dict[str, Any]) -> dict[str, NewTensor]:
  """The tensors of one network by published names, from either layout."""
  native = folder / NATIVE
  if not native.is_file():
    tensors = open_tensors(inside(find_weights(folder, spec.weights), folder))
    renamed = ((spec.rename(name), tensor) for name, tensor in tensors.items())
    return {name: lazy(tensor) for name, tensor in renamed if name is not None}
  tensors = open_tensors(inside(native, folder))
  matched = match_native(tensors, _shapes(spec, config, folder), str(native))
  return {published_name(name): _to_published(name, t) for name, t in matched.items()}


def check_part(part: Part, where: str) -> None:
  """Raises a UserError for a tensor whose name or shape is not that of the part's config."""
  if part.kind is not None:
    match(part.tensors, _shapes(network_format(part.kind), part.config or {}, Path(where)), where)


def lazy(tensor: Tensor) -> NewTensor:
  """A tensor of a file as one to be written."""
  return NewTensor(tensor.dtype, tensor.shape, lambda: np.asarray(tensor))


def _to_published(name: str, tensor: Tensor) -> NewTensor:
  shape = published_shape(name, tensor.shape)
  return NewTensor(tensor.dtype, shape, lambda: to_published_layout(name, np.asarray(tensor)))


def _shapes(spec: NetworkFormat, config: dict[str, Any], folder: Path) -> dict[str, Any]:
  """Name -> shape of our network of that config."""
  return spec.shapes(spec.parse(config, str(folder / 'config.json')))


def write_pipeline(pipeline: Pipeline, path: Path, layout: str, dtype: str | None) -> None:
  """Writes the directory, all or nothing; an unchanged type where dtype is None.

  Raises:
    UserError: a network that we do not implement (native), or values that dtype cannot hold.
  """
  with new_directory(path) as folder:
    for name, part in pipeline.parts.items():
      write_part(part, folder / name, layout, dtype)
    entries = {name: list(part.entry) for name, part in pipeline.parts.items()}
    write_json(folder / INDEX, pipeline.index | entries)


def write_part(part: Part, folder: Path, layout: str, dtype: str | None) -> None:
  """Writes the folder of one part."""
  folder.mkdir(parents=True, exist_ok=True)
  for file in part.files:
    shutil.copyfile(file, folder / file.name)
  for name, values in part.texts.items():
    write_json(folder / name, values)
  if part.kind is None:
    return
  spec, tensors = network_format(part.kind), part.tensors
  if layout == 'native':
    tensors = _to_native(part, spec, folder)
  config = dict(part.config or {})
  if dtype and spec.weights == TRANSFORMERS:
    config.pop('torch_dtype', None)
    config['dtype'] = dtype
  write_json(folder / 'config.json', config)
  write_tensors(folder / (NATIVE if layout == 'native' else spec.weights), typed(tensors, dtype))


def _to_native(part: Part, spec: NetworkFormat, folder: Path) -> dict[str, NewTensor]:
  shapes = _shapes(spec, part.config or {}, folder)

  def native(name: str, tensor: NewTensor) -> NewTensor:
    shape = tuple(shapes[name].shape)
    return NewTensor(tensor.dtype, shape, lambda: from_published_layout(name, tensor.make()))

  matched = match(part.tensors, shapes, folder.name)
  return {name: native(name, tensor) for name, tensor in matched.items()}


def typed(tensors: dict[str, NewTensor], dtype: str | None) -> dict[str, NewTensor]:
  """The tensors in another floating type; whole numbers stay, and all where dtype is None."""
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
