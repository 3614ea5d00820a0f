"""Reads and writes networks in the layout of diffusers and transformers, or in our own.

A directory holds config.json and weights in safetensors, in one file or in shards with an index;
both libraries' `from_pretrained` open what `save` writes, and `load` opens what they write. Our own
layout, params.safetensors, has our names and axes, so that every shard of a device is read as it
lies. Weights go tensor by tensor from the file onto the devices. Nothing here unpickles or
downloads. The kinds of networks are the rows of `registry.NETWORKS`.
"""

import os
from collections.abc import Iterator, Mapping
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
  published_shape,
  to_published_layout,
  to_published_names,
)
from diffusion_jax.formats.tensors import (
  INDEX,
  PICKLES,
  NewTensor,
  open_tensors,
  read_json,
  write_json,
  write_tensors,
)
from diffusion_jax.models.network import merge, split
from diffusion_jax.models.perceptual import lpips_shapes
from diffusion_jax.parallel.mesh import shard_params
from diffusion_jax.types import Params


def network_format(name: str, where: str = '') -> NetworkFormat:
  """Return the format of a kind of network, a row of `registry.NETWORKS`.

  A row that is a network's class has `NetworkFormat.default`.

  Args:
    where: the option or key that gives the name, for the error.

  Raises:
    UserError: there is no such row.
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


ASSETS = Path(__file__).resolve().parents[1] / 'assets'
PREFIX = 'asset:'
DTYPES = {
  'float32': np.dtype(np.float32), 'float16': np.dtype(np.float16),
  'bfloat16': np.dtype(ml_dtypes.bfloat16),
}
NATIVE = 'params.safetensors'
LAYOUTS = ('diffusers', 'native')


def resolve(path: str | os.PathLike) -> Path:
  """'asset:NAME' -> the file or directory NAME that the package ships; another path as it is.

  UserError, listing what exists, where there is no such asset.
  """
  text = os.fspath(path)
  if not text.startswith(PREFIX):
    return Path(text)
  name = text.removeprefix(PREFIX)
  found = (ASSETS / name).resolve()
  inside = found.is_relative_to(ASSETS) and found != ASSETS
  if not inside or not found.exists():
    entries = ASSETS.iterdir() if ASSETS.is_dir() else ()
    names = sorted(PREFIX + entry.name for entry in entries)
    raise UserError(f'There is no {text}; there is {", ".join(names) or "no asset at all"}.')
  return found


def load(
  kind: str, path: str | os.PathLike, *, dtype=jnp.float32, mesh: Mesh | None = None
) -> nnx.Module:
  """The network in a directory, such as 'unet', ready to be called.

  Args:
    kind: a row of `registry.NETWORKS`.
    path: the directory; may be 'asset:NAME'.
    dtype: of the parameters and of the computation.
    mesh: devices that share the parameters; None leaves them on the host.

  Raises:
    UserError: something is missing, broken, of another kind, or not implemented.
  """
  config, params = load_params(kind, path, dtype=dtype, mesh=mesh)
  made = network_format(kind).network(config, dtype=dtype, param_dtype=dtype)
  return merge(made.graphdef, params)


def save(
  module: nnx.Module, path: str | os.PathLike, *, dtype: str = 'float32', layout: str = 'diffusers'
) -> None:
  """Write a network as a directory that `load` and, but for 'native', its own library open.

  Args:
    dtype: 'float32', 'float16' or 'bfloat16'.

  Raises:
    UserError: a weight that dtype cannot hold, or a network of no known kind.
  """
  save_params(path, module.config, split(module)[1], dtype=dtype, layout=layout)


def read_config(kind: str, path: str | os.PathLike) -> Any:
  """The config of the network in a directory. UserError where it is of another kind."""
  spec, file = network_format(kind), resolve(path) / 'config.json'
  values = read_json(inside(file, file.parent))
  require(
    spec.matches(values),
    f'{file} describes no {kind}: its {spec.key} is {shown(values.get(spec.key))} and '
    f'must be {" or ".join(map(repr, spec.names))}.',
  )
  return spec.parse(values, str(file))


def load_params(
  kind: str, path: str | os.PathLike, *, dtype=jnp.float32, mesh: Mesh | None = None
) -> tuple[Any, Params]:
  """(config, parameters by dotted name), as `load`; without a mesh numpy arrays on the host."""
  config, spec, directory = read_config(kind, path), network_format(kind), resolve(path)
  native = directory / NATIVE
  file = inside(native if native.is_file() else find_weights(directory, spec.weights), directory)
  return config, read_params(file, spec, spec.shapes(config), dtype=dtype, mesh=mesh)


def read_params(
  file: Path, spec: NetworkFormat, shapes: Params, *, dtype=jnp.float32, mesh: Mesh | None = None
) -> Params:
  """The parameters of `shapes` from one file or index, onto the mesh; published names or ours."""
  tensors, ours = open_tensors(file), file.name == NATIVE
  rename = (lambda name: name) if ours else spec.rename
  matched = match(tensors, shapes, str(file), rename, native=ours)
  shardings = None if mesh is None else shard_params(shapes, mesh)
  params = {}
  for name, tensor in matched.items():
    view = np.asarray(tensor) if ours else from_published_layout(name, tensor)
    # A copy, so that nothing holds on to the file.
    read = lambda index, view=view: np.array(view[index], dtype, order='C')
    if shardings is None:
      params[name] = read(...)
    else:
      params[name] = jax.make_array_from_callback(view.shape, shardings[name], read)
      params[name].block_until_ready()  # Or the maps of many tensors would stay open at once.
  return params


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

  def tensor(name: str, value: Any) -> NewTensor:
    shape = tuple(value.shape) if native else published_shape(name, tuple(value.shape))
    change = (lambda name, value: np.asarray(value)) if native else to_published_layout
    return NewTensor(DTYPES[dtype], shape, lambda: cast(name, change(name, value), dtype))

  values = spec.describe(config)
  if spec.weights == TRANSFORMERS:
    values['dtype'] = dtype
  tensors = {names[name]: tensor(name, value) for name, value in params.items()}
  write_tensors(path / (NATIVE if native else spec.weights), tensors)
  write_json(path / 'config.json', values)


def load_lpips(path: str | os.PathLike) -> dict[str, np.ndarray]:
  """Parameters for models.lpips from a safetensors file of the `lpips` package's state (VGG)."""
  path = resolve(path)
  unused = ('scaling_layer.', 'lins.')  # Constants, and a second name of lin0 to lin4.
  rename = lambda name: None if name.startswith(unused) else name
  return from_published(open_tensors(path), lpips_shapes(), str(path), rename)


def find_weights(directory: Path, name: str) -> Path:
  """The weights' file or index, in full precision or, failing that, the published fp16 variant."""
  stem = name.removesuffix('.safetensors')
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


def cast(name: str, value: np.ndarray, dtype: str) -> np.ndarray:
  """`value` as one of DTYPES. UserError, naming it, where that cannot hold its values."""
  with np.errstate(over='ignore'):
    cast = value.astype(DTYPES[dtype])
  require(
    bool(np.isfinite(cast).all()),
    f'{name} has values that {dtype} cannot hold; save as float32, or look for divergence.',
  )
  return cast
