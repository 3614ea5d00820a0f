"""The device mesh; one device is the smallest. Placement follows the table in `parallel.layout`."""

import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from diffusion_jax.config import MeshConfig
from diffusion_jax.errors import UserError
from diffusion_jax.parallel.layout import AXES, BATCH, batch_spec, parameter_spec
from diffusion_jax.parallel.processes import heartbeat
from diffusion_jax.types import Params

DCN_AXES = ('data', 'fsdp')


def make_mesh(config: MeshConfig, devices=None) -> Mesh:
  """Make a mesh of all devices with the axes of `layout.AXES`; each slice is a block of it.

  Slices are the devices' own (TPU, GPU); other devices are cut into as many equal slices, in
  process order, as the product of dcn sizes; -1 counts as 1 there. UserError where sizes do not
  multiply to the numbers of devices and slices.
  """
  devices = jax.devices() if devices is None else devices
  dcn = {axis: getattr(config, f'dcn_{axis}') for axis in DCN_AXES}
  slices = _slices(devices, math.prod(max(size, 1) for size in dcn.values()))
  over = _filled(dcn, len(slices), 'mesh.dcn_', 'slices')
  within = {axis: getattr(config, axis) for axis in AXES}
  of = 'devices' if len(slices) == 1 else f'devices of each of {len(slices)} slices'
  within = _filled(within, len(slices[0]), 'mesh.', of)
  if within['tensor'] > 1 and within['spatial'] > 1:
    # Found by comparing one convolution with that of one device, jax 0.10.2: values far off.
    raise UserError(
      'mesh.tensor and mesh.spatial are both above 1, for which XLA computes wrong convolutions; '
      'set one of them to 1.'
    )
  grid = place(slices, list(within.values()), [over.get(axis, 1) for axis in AXES])
  return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def place(slices: Sequence[Sequence], within: Sequence[int], over: Sequence[int]) -> np.ndarray:
  """Place each slice's devices in a contiguous block of the mesh; within, over: axis sizes.

  Like mesh_utils.create_hybrid_device_mesh, which knows no slices on simulated devices.
  """
  split = slices[0][0].platform == 'tpu'
  blocks = [
    mesh_utils.create_device_mesh(within, part, allow_split_physical_axes=split)
    for part in slices
  ]
  n = len(within)
  grid = np.stack(blocks).reshape(*over, *within)
  pairs = [axis for pair in zip(range(n), range(n, 2 * n), strict=True) for axis in pair]
  return grid.transpose(pairs).reshape([a * b for a, b in zip(over, within, strict=True)])


def _slices(devices: Sequence, count: int) -> list[list]:
  """Return devices by slice, as they say themselves or else `count` equal parts of them."""
  numbers = [getattr(device, 'slice_index', None) for device in devices]
  if None not in numbers:
    slices = [[d for d in devices if d.slice_index == n] for n in sorted(set(numbers))]
    if len({len(part) for part in slices}) > 1:
      raise UserError(
        f'slices have {", ".join(str(len(part)) for part in slices)} devices; a mesh needs slices '
        'of the same size.'
      )
    return slices
  ordered = sorted(devices, key=lambda d: (d.process_index, d.id))
  size = len(ordered) // max(count, 1)
  if len(ordered) % count:
    raise UserError(
      f'{len(ordered)} devices cannot be cut into {count} equal slices; change mesh.dcn_data or '
      'mesh.dcn_fsdp.'
    )
  slices = [ordered[i : i + size] for i in range(0, len(ordered), size)]
  owners = [process for part in slices for process in {d.process_index for d in part}]
  if len(set(owners)) > 1 and len(owners) > len(set(owners)):
    raise UserError(
      f'{count} slices would cut through the devices of a process; make mesh.dcn_data * '
      f'mesh.dcn_fsdp a divisor of the {len(set(owners))} processes.'
    )
  return slices


def _filled(sizes: dict[str, int], total: int, prefix: str, of: str) -> dict[str, int]:
  """Return the sizes with -1 filled in, so that they multiply to `total`."""
  for axis, size in sizes.items():
    if size == 0 or size < -1:
      raise UserError(f'{prefix}{axis} is {size}; give a positive size, or -1 for what is left.')
  values = list(sizes.values())
  if values.count(-1) > 1:
    raise UserError(f'more than one of {prefix}{f", {prefix}".join(sizes)} is -1; only one can be.')
  known = math.prod(size for size in values if size != -1)
  if total % known or (-1 not in values and known != total):
    shown = ', '.join(f'{prefix}{axis}={size}' for axis, size in sizes.items())
    raise UserError(
      f'the mesh does not fit {total} {of}: {shown}; make the sizes multiply to {total}, or set '
      'one of them to -1.'
    )
  return {axis: total // known if size == -1 else size for axis, size in sizes.items()}


def shard_params(params: Params, mesh: Mesh) -> dict[str, NamedSharding]:
  """Return the sharding of every parameter (arrays or shapes) by name."""
  sizes = mesh.shape
  return {
    name: NamedSharding(mesh, parameter_spec(name, p.shape, sizes)) for name, p in params.items()
  }


def shard_like(tree, params: Params, mesh: Mesh):
  """Shardings for a tree with copies of `params`, such as an optimizer state or the EMA.

  A leaf below a key that names a parameter of its rank is split by the same rule, where its shape
  allows it; others, such as sums over an axis, are replicated.
  """
  replicated = NamedSharding(mesh, PartitionSpec())

  def one(path, leaf):
    name = next((k.key for k in reversed(path) if isinstance(k, jax.tree_util.DictKey)), None)
    if name in params and len(params[name].shape) == len(leaf.shape):
      return NamedSharding(mesh, parameter_spec(name, leaf.shape, mesh.shape))
    return replicated

  return jax.tree_util.tree_map_with_path(one, tree)


def put_params(params: dict[str, np.ndarray], mesh: Mesh) -> Params:
  """Put host arrays onto their shards; arrays that are there already stay."""
  shardings = shard_params(params, mesh)

  def put(name: str, value: np.ndarray) -> jax.Array:
    if isinstance(value, jax.Array) and value.sharding == shardings[name]:
      return value
    return jax.make_array_from_callback(value.shape, shardings[name], lambda index: value[index])

  return {name: put(name, value) for name, value in params.items()}


def batch_sharding(shape: tuple[int, ...], mesh: Mesh) -> NamedSharding:
  """The sharding of a field [b ...] on the mesh; b may be that of one process."""
  return NamedSharding(mesh, batch_spec(shape, mesh.shape))


def local_rows(mesh: Mesh, batch_size: int) -> np.ndarray:
  """The rows of a global batch on this process's devices: sorted, each once.

  Several processes have the same ones where a tensor axis spans them. batch_size: a multiple of
  data x fsdp.
  """
  shards = NamedSharding(mesh, BATCH).addressable_devices_indices_map((batch_size,)).values()
  rows = np.arange(batch_size)
  return np.unique(np.concatenate([rows[index] for index in shards]))


def put_batch(batch, mesh: Mesh):
  """Put this process's rows, ordered as `local_rows`, into global arrays split by `batch_spec`."""
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
  """Return the shapes of a global batch with the shardings that `put_batch` gives."""
  return with_shardings(spec, jax.tree.map(lambda x: batch_sharding(x.shape, mesh), spec))


def with_shardings(tree, shardings):
  """Return the shapes and types of a tree, with shardings of the same structure."""
  return jax.tree.map(
    lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree, shardings
  )


def to_host(tree):
  """Bring arrays from the mesh to every process, as complete numpy arrays."""
  def fetch(x):
    if isinstance(x, jax.Array) and not x.is_fully_addressable and not x.is_fully_replicated:
      x = multihost_utils.process_allgather(x, tiled=True)
    return np.asarray(x)

  return jax.tree.map(fetch, tree)


def whole_batch(batch_size: int, mesh: Mesh) -> int:
  """Return the batch size rounded up to a multiple of the devices that divide a batch."""
  ways = mesh.shape['data'] * mesh.shape['fsdp']
  return -(-batch_size // ways) * ways


def in_batches(function, params, *arrays: np.ndarray, mesh: Mesh, batch_size: int = 64):
  """Yield function(params, *batch) on the host for equal batches; the last is padded, then cut.

  Every process passes the same arrays [n ...] and gets the same results; the mesh splits the work.
  batch_size: rounded up as by `whole_batch`.
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
    heartbeat()
    yield jax.tree.map(lambda x: x[: min(batch_size, n - start)], out)  # noqa: B023
