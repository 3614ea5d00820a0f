"""Puts parameters, their copies and batches where the table in `diffusion_jax.layout` has them."""

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from diffusion_jax.layout import BATCH, batch_spec, parameter_spec
from diffusion_jax.parallel.pulse import beat
from diffusion_jax.types import Params


def shard_params(params: Params, mesh: Mesh) -> dict[str, NamedSharding]:
  """The sharding of every parameter (arrays or shapes) by name."""
  sizes = mesh.shape
  return {
    name: NamedSharding(mesh, parameter_spec(name, p.shape, sizes)) for name, p in params.items()
  }


def shard_like(tree, params: Params, mesh: Mesh):
  """Shardings for a tree that holds copies of `params`, such as an optimizer state or the EMA.

  A leaf below a dictionary key that names a parameter of the same shape is split like it; all else
  (counters, keys) is replicated.
  """
  replicated = NamedSharding(mesh, PartitionSpec())

  def one(path, leaf):
    name = next((k.key for k in reversed(path) if isinstance(k, jax.tree_util.DictKey)), None)
    if name in params and params[name].shape == leaf.shape:
      return NamedSharding(mesh, parameter_spec(name, leaf.shape, mesh.shape))
    return replicated

  return jax.tree_util.tree_map_with_path(one, tree)


def put_params(params: dict[str, np.ndarray], mesh: Mesh) -> Params:
  """Host arrays onto their shards; arrays that are there already stay."""
  shardings = shard_params(params, mesh)

  def put(name: str, value: np.ndarray) -> jax.Array:
    if isinstance(value, jax.Array) and value.sharding == shardings[name]:
      return value
    return jax.make_array_from_callback(value.shape, shardings[name], lambda index: value[index])

  return {name: put(name, value) for name, value in params.items()}


def batch_sharding(shape: tuple[int, ...], mesh: Mesh) -> NamedSharding:
  """How a field of that shape [b ...] lies on the mesh; b may be that of one process."""
  return NamedSharding(mesh, batch_spec(shape, mesh.shape))


def local_rows(mesh: Mesh, batch_size: int) -> np.ndarray:
  """Rows of a global batch that this process's devices hold: sorted, each once.

  Where a tensor axis runs across processes, several processes hold the same rows.

  Args:
    batch_size: of the global batch; a multiple of data x fsdp.
  """
  shards = NamedSharding(mesh, BATCH).addressable_devices_indices_map((batch_size,)).values()
  rows = np.arange(batch_size)
  return np.unique(np.concatenate([rows[index] for index in shards]))


def put_batch(batch, mesh: Mesh):
  """This process's rows of a global batch -> global arrays, split over data and fsdp.

  And images by their rows over spatial.

  Args:
    batch: arrays [len(local_rows) ...] in the order of `local_rows`.
  """
  shards = mesh.shape['data'] * mesh.shape['fsdp']
  held = local_rows(mesh, shards)  # Shards of one row each stand for shards of any size.

  def put(x):
    size = len(x) // len(held)

    def shard(index):
      start = np.searchsorted(held, (index[0].start or 0) // size) * size
      return x[(slice(start, start + size), *index[1:])]

    shape = (shards * size, *x.shape[1:])
    return jax.make_array_from_callback(shape, batch_sharding(shape, mesh), shard)

  return jax.tree.map(put, batch)


def abstract_batch(spec, mesh: Mesh):
  """Shapes and types of a global batch -> the same with the shardings that `put_batch` gives."""
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=batch_sharding(x.shape, mesh)), spec
  )


def to_host(tree):
  """Arrays over the mesh -> numpy, whole, on every process."""
  def fetch(x):
    if isinstance(x, jax.Array) and not x.is_fully_addressable and not x.is_fully_replicated:
      from jax.experimental import multihost_utils

      x = multihost_utils.process_allgather(x, tiled=True)
    return np.asarray(x)

  return jax.tree.map(fetch, tree)


def whole_batch(batch_size: int, mesh: Mesh) -> int:
  """The batch size rounded up to a multiple of the devices that share a batch."""
  ways = mesh.shape['data'] * mesh.shape['fsdp']
  return -(-batch_size // ways) * ways


def in_batches(function, params, *arrays: np.ndarray, mesh: Mesh, batch_size: int = 64):
  """Yields function(params, *batch) on the host for equal batches; the last is padded, then cut.

  Every process is given the same arrays and gets the same results; the work is split over the
  mesh. One batch size means one compilation.

  Args:
    arrays: [n ...] each.
    batch_size: rounded up as `whole_batch` does.
  """
  batch_size = whole_batch(batch_size, mesh)
  n = len(arrays[0])
  for start in range(0, n, batch_size):
    # Repeating the last row keeps padding harmless for any function of single examples.
    rows = np.minimum(np.arange(start, start + batch_size), n - 1)
    batch = [
      jax.make_array_from_callback(
        (batch_size, *a.shape[1:]), batch_sharding(a.shape, mesh),
        lambda index, part=a[rows]: part[index],
      )
      for a in arrays
    ]
    out = to_host(function(params, *batch))
    beat()
    yield jax.tree.map(lambda x: x[: min(batch_size, n - start)], out)  # noqa: B023
