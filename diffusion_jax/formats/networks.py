"""Networks in directories, in the layout of diffusers and transformers or in our own.

A directory holds config.json and safetensors, one file or shards with an index, readable and
writable by both libraries' `from_pretrained` and here. Our own params.safetensors has our names and
axes, so devices read their shards in place. Weights go tensor by tensor from file to devices.
Nothing is unpickled or downloaded. Kinds of networks are the rows of `registry.NETWORKS`.
"""

import contextlib
import dataclasses
import functools
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from diffusion_jax import registry
from diffusion_jax.errors import UserError, require, shown
from diffusion_jax.files import inside
from diffusion_jax.formats.published import (
  TRANSFORMERS,
  NetworkFormat,
  from_published,
  from_published_layout,
  match,
  published_name,
  published_shape,
  to_published_layout,
  to_published_names,
)
from diffusion_jax.formats.tensors import (
  INDEX,
  PICKLES,
  Tensor,
  open_tensors,
  read_json,
  write_json,
  write_tensors,
)
from diffusion_jax.models.network import Network, merge, split
from diffusion_jax.models.perceptual import lpips_shapes
from diffusion_jax.parallel.mesh import shard_params
from diffusion_jax.types import Params

ASSETS = Path(__file__).resolve().parents[1] / 'assets'
PREFIX = 'asset:'
DTYPES = {
  'float32': np.dtype(np.float32), 'float16': np.dtype(np.float16),
  'bfloat16': np.dtype(ml_dtypes.bfloat16),
}
CONFIG = 'config.json'
NATIVE = 'params.safetensors'
LAYOUTS = ('diffusers', 'native')
TEXTS, WEIGHTS = ('.json', '.txt', '.model'), '.safetensors'
"""Files that are copied as they are, and those of weights."""


_shapes_only: ContextVar[bool] = ContextVar('shapes_only', default=False)


@contextlib.contextmanager
def shapes_only() -> Iterator[None]:
  """Within, `Part.load` gives shapes and types of parameters, and opens no weights."""
  token = _shapes_only.set(True)
  try:
    yield
  finally:
    _shapes_only.reset(token)


def network_format(name: str, where: str = '') -> NetworkFormat:
  """The format of a row of `registry.NETWORKS`; a class's row has `NetworkFormat.default`.

  where: the option or key with the name, for the UserError without such a row.
  """
  row = registry.load(registry.NETWORKS, name, where)
  return row if isinstance(row, NetworkFormat) else NetworkFormat.default(row)


def config_of(row: Any) -> type:
  """Return the dataclass of the configs of a row of `registry.NETWORKS`, for `limits.ByType`."""
  return (row if isinstance(row, NetworkFormat) else NetworkFormat.default(row)).config


def kind_of(values: Mapping[str, Any]) -> str | None:
  """Return the name of the kind of network that a config.json describes; None for no known one."""
  return next((name for name, spec in _formats() if spec.matches(values)), None)


def format_of(config: Any) -> NetworkFormat:
  """Return the format whose configs are of this type. UserError where there is none."""
  for _, spec in _formats():
    if type(config) is spec.config:
      return spec
  raise UserError(f'No kind of network has a config of type {type(config).__name__}.')


def _formats() -> Iterator[tuple[str, NetworkFormat]]:
  registry.import_plugins()
  return ((name, network_format(name)) for name in registry.NETWORKS)


def resolve(path: str | os.PathLike) -> Path:
  """The packaged file or directory NAME for 'asset:NAME' (or UserError), other paths unchanged."""
  text = os.fspath(path)
  if not text.startswith(PREFIX):
    return Path(text)
  found = (ASSETS / text.removeprefix(PREFIX)).resolve()
  if not found.is_relative_to(ASSETS) or found == ASSETS or not found.exists():
    entries = ASSETS.iterdir() if ASSETS.is_dir() else ()
    names = sorted(PREFIX + entry.name for entry in entries)
    raise UserError(f'There is no {text}; there is {", ".join(names) or "no asset at all"}.')
  return found


@dataclasses.dataclass
class Part:
  """A network in a directory, unread; or another part of a pipeline, whose files are copied.

  entry: library and class in model_index.json. path: its folder, perhaps 'asset:NAME'; empty for a
  part of a single file. kind: its row of NETWORKS, or None. values: config.json of a network.
  files: copied unchanged. texts: name -> JSON object written with the weights. stored: tensors by
  published names, of a single file.
  """

  entry: tuple[str, str] = ('', '')
  path: str = ''
  kind: str | None = None
  values: dict[str, Any] = dataclasses.field(default_factory=dict)
  files: list[Path] = dataclasses.field(default_factory=list)
  texts: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
  stored: dict[str, Tensor] | None = None

  @property
  def format(self) -> NetworkFormat:
    """The format of its kind."""
    return network_format(self.kind)

  @functools.cached_property
  def config(self) -> Any:
    """Config of the network."""
    where = str(resolve(self.path) / CONFIG) if self.path else CONFIG
    return self.format.parse(self.values, where)

  @functools.cached_property
  def tensors(self) -> dict[str, Tensor]:
    """Tensors by published names, unread, from either layout."""
    if self.stored is not None or self.kind is None:
      return self.stored or {}
    file, opened = self._open()
    if file.name != NATIVE:
      return opened
    matched = match(opened, self.format.shapes(self.config), str(file), native=True)
    return {published_name(name): to_published(name, t) for name, t in matched.items()}

  def _open(self) -> tuple[Path, dict[str, Tensor]]:
    """Return the file of the weights, and its tensors by published names, or ours in NATIVE."""
    folder = resolve(self.path)
    native = folder / NATIVE
    if native.is_file():
      return native, open_tensors(inside(native, folder))
    file = inside(find_weights(folder, self.format.weights), folder)
    renamed = ((self.format.rename(name), t) for name, t in open_tensors(file).items())
    return file, {name: tensor for name, tensor in renamed if name is not None}

  def check(self, where: str) -> None:
    """Raise a UserError for a tensor whose name or shape is not that of the config."""
    match(self.tensors, self.format.shapes(self.config), where)

  def expect(self, kinds: Sequence[str]) -> 'Part':
    """Return the part itself. UserError unless it is a network of one of these kinds."""
    if self.kind not in kinds:
      file = resolve(self.path) / CONFIG
      read_json(file)  # Where there is none, that is what is wrong.
      raise UserError(f'{file} describes none of {", ".join(kinds)}; check which network it is.')
    return self

  def network(self, **options) -> Network:
    """Return the network without weights; options such as dtype."""
    return self.format.network(self.config, **options)

  def load(self, *, dtype=jnp.float32, mesh: Mesh | None = None) -> Params:
    """Return the network's parameters, onto the mesh or, without one, as numpy arrays."""
    shapes = self.format.shapes(self.config)
    if _shapes_only.get():
      return {name: jax.ShapeDtypeStruct(leaf.shape, dtype) for name, leaf in shapes.items()}
    file, opened = self._open()
    ours = file.name == NATIVE
    shardings = None if mesh is None else shard_params(shapes, mesh)
    params = {}
    for name, tensor in match(opened, shapes, str(file), native=ours).items():
      view = np.asarray(tensor) if ours else from_published_layout(name, tensor)
      # A copy, so that nothing holds on to the file.
      read = lambda index, view=view: np.array(view[index], dtype, order='C')
      if shardings is None:
        params[name] = read(...)
      else:
        params[name] = jax.make_array_from_callback(view.shape, shardings[name], read)
        params[name].block_until_ready()  # Or the maps of many tensors would stay open at once.
    return params

  def json(self, name: str) -> tuple[dict[str, Any], str]:
    """Return one of the JSON files and where it is; an empty one where there is none."""
    file = next((file for file in self.files if file.name == name), None)
    if name in self.texts or file is None:
      return self.texts.get(name, {}), str(Path(self.path) / name)
    return read_json(file), str(file)


def read_part(
  path: str | os.PathLike, entry: tuple[str, str] = ('', ''), kind: str | None = None
) -> Part:
  """One part, of a pipeline or alone; `kind` overrides its config.json's."""
  folder = resolve(path)
  file = folder / CONFIG
  values = read_json(inside(file, folder)) if file.is_file() else {}
  kind = kind or kind_of(values)
  files = sorted(file for file in folder.iterdir() if file.is_file()) if folder.is_dir() else []
  if kind is None:
    copied = [inside(f, folder) for f in files if f.suffix in (*TEXTS, WEIGHTS)]
    return Part(entry, os.fspath(path), files=copied)
  others = [
    inside(f, folder) for f in files if f.suffix in TEXTS and f.name != CONFIG
    and not re.search(r'\.safetensors\.index(\..+)?\.json$|\.bin\.index\.json$', f.name)
  ]
  return Part(entry, os.fspath(path), kind, values, others)


def read_network(kind: str, path: str | os.PathLike) -> Part:
  """Return the network in a directory, unread. UserError where it is of another kind."""
  spec, file = network_format(kind), resolve(path) / CONFIG
  values = read_json(inside(file, file.parent))
  require(
    spec.matches(values),
    f'{file} describes no {kind}: its {spec.key} is {shown(values.get(spec.key))} and '
    f'must be {" or ".join(map(repr, spec.names))}.',
  )
  return Part(path=os.fspath(path), kind=kind, values=values)


def load_params(
  kind: str, path: str | os.PathLike, *, dtype=jnp.float32, mesh: Mesh | None = None
) -> tuple[Any, Params]:
  """Return (config, parameters by dotted name), as `load`; without a mesh on the host."""
  part = read_network(kind, path)
  return part.config, part.load(dtype=dtype, mesh=mesh)


def load(
  kind: str, path: str | os.PathLike, *, dtype=jnp.float32, mesh: Mesh | None = None
) -> nnx.Module:
  """The network in a directory, ready to be called; UserError: missing, broken or of another kind.

  kind: a row of `registry.NETWORKS`, such as 'unet'. path: a directory or 'asset:NAME'. dtype: of
  the parameters and the computation. mesh: of the parameters; None for the host.
  """
  part = read_network(kind, path)
  params = part.load(dtype=dtype, mesh=mesh)
  return merge(part.network(dtype=dtype, param_dtype=dtype).graphdef, params)


def save(
  module: nnx.Module, path: str | os.PathLike, *, dtype: str = 'float32', layout: str = 'diffusers'
) -> None:
  """Write a network as a directory that `load` and, but for 'native', its own library open.

  dtype: 'float32', 'float16' or 'bfloat16'. UserError: a weight outside of its range, or an unknown
  kind.
  """
  save_params(path, module.config, split(module)[1], dtype=dtype, layout=layout)


def save_params(
  path: str | os.PathLike, config: Any, params: Mapping[str, Any], *, dtype: str = 'float32',
  layout: str = 'diffusers',
) -> None:
  """Write a network given by its config and parameters, as `save`."""
  require(dtype in DTYPES, f'dtype must be one of {", ".join(DTYPES)}, not {dtype!r}.')
  require(layout in LAYOUTS, f'layout must be one of {", ".join(LAYOUTS)}, not {layout!r}.')
  spec, path = format_of(config), Path(path)
  native = layout == 'native'
  names = {name: name for name in params} if native else to_published_names(params)

  def tensor(name: str, value: Any) -> Tensor:
    kept = Tensor(value.dtype, tuple(value.shape), lambda: np.asarray(value))
    return as_type(name, kept if native else to_published(name, kept), dtype)

  values = spec.describe(config)
  if spec.weights == TRANSFORMERS:
    values['dtype'] = dtype
  tensors = {names[name]: tensor(name, value) for name, value in params.items()}
  write_tensors(path / (NATIVE if native else spec.weights), tensors)
  write_json(path / CONFIG, values)


def load_lpips(path: str | os.PathLike) -> dict[str, np.ndarray]:
  """Return the parameters of `models.perceptual`, from the state of `lpips` (VGG)."""
  path = resolve(path)
  unused = ('scaling_layer.', 'lins.')  # Constants, and a second name of lin0 to lin4.
  tensors = {n: tensor for n, tensor in open_tensors(path).items() if not n.startswith(unused)}
  return from_published(tensors, lpips_shapes(), str(path))


def find_weights(directory: Path, name: str) -> Path:
  """Return the weights' file or index, in full precision or else the published fp16 variant."""
  stem = name.removesuffix(WEIGHTS)
  for variant in (stem, f'{stem}.fp16'):
    for path in (directory / f'{variant}.safetensors', directory / f'{variant}.safetensors{INDEX}'):
      if path.is_file():
        return path
  # The published names of sharded variants put the variant last.
  if (path := directory / f'{stem}.safetensors.index.fp16.json').is_file():
    return path
  pickles = sorted(p.name for p in directory.iterdir() if p.suffix in PICKLES)
  why = f' ({pickles[0]} is a pickle, which is never opened)' if pickles else ''
  raise UserError(
    f'There is no {directory / name}{why}; give a directory with safetensors weights.'
  )


def to_published(name: str, tensor: Tensor) -> Tensor:
  """Return a parameter of ours as it is published."""
  change = lambda value: to_published_layout(name, value)
  return tensor.then(change, published_shape(name, tensor.shape))


def as_type(name: str, tensor: Tensor, dtype: str) -> Tensor:
  """Return a tensor as one of DTYPES. UserError, once it is made, for values out of range."""
  return tensor.then(lambda value: cast(name, value, dtype), dtype=DTYPES[dtype])


def cast(name: str, value: np.ndarray, dtype: str) -> np.ndarray:
  """`value` as one of DTYPES; UserError, naming it, for values out of range."""
  with np.errstate(over='ignore'):
    cast = value.astype(DTYPES[dtype])
  require(
    bool(np.isfinite(cast).all()),
    f'{name} has values that {dtype} cannot hold; save as float32, or look for divergence.',
  )
  return cast
