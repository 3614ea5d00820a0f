"""Start-up of processes and the device mesh. One device is the smallest mesh."""

import dataclasses
import math
import os
from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from diffusion_jax.errors import UserError
from diffusion_jax.layout import AXES

DCN_AXES = ('data', 'fsdp')


@dataclasses.dataclass(frozen=True)
class MeshConfig:
  """Sizes of the mesh axes within a slice, whose devices share a fast network (ICI, NVLink).

  data: replicas. fsdp: parameters and batch are both split. tensor: heads and inner channels are
  split. spatial: rows of images are split, for images too large for one device; not together with
  tensor. One of the four may be -1: all devices of the slice that are left.

  dcn_data, dcn_fsdp: sizes of the same axes over slices, which a slower network (DCN) joins; one
  may be -1: all slices that are left. There are none for tensor and spatial: those talk within
  every layer, data once in a step and fsdp once for the parameters of a layer.
  """

  data: int = -1
  fsdp: int = 1
  tensor: int = 1
  spatial: int = 1
  dcn_data: int = -1
  dcn_fsdp: int = 1


def start_distributed() -> None:
  """Joins the processes named by COORDINATOR_ADDRESS, PROCESS_COUNT and PROCESS_INDEX, if any.

  Raises:
    UserError: when only some of the three are set.
  """
  names = ('COORDINATOR_ADDRESS', 'PROCESS_COUNT', 'PROCESS_INDEX')
  values = [os.environ.get(name) for name in names]
  if not any(values) or jax.distributed.is_initialized():
    return
  missing = [name for name, value in zip(names, values, strict=True) if not value]
  if missing:
    raise UserError(f'set {", ".join(missing)} too, or none of {", ".join(names)}.')
  jax.distributed.initialize(values[0], int(values[1]), int(values[2]))


def make_mesh(config: MeshConfig, devices=None) -> Mesh:
  """A mesh of all devices with the axes of `layout.AXES`; each slice is a block of it.

  Slices are what devices say they are (TPU, GPU). Other devices are taken for as many equal
  slices, in the order of their processes, as the dcn sizes multiply to; -1 counts as 1 there.

  Raises:
    UserError: when the sizes do not multiply to the numbers of devices and slices, or both tensor
      and spatial are used.
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
  """Devices of each slice -> their places in the mesh: slices are contiguous blocks of it.

  As mesh_utils.create_hybrid_device_mesh, which knows no slices on simulated devices.

  Args:
    within, over: sizes of the axes within a slice and over slices.
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
  """Devices by slice, as they say themselves or else `count` equal parts of them."""
  numbers = [getattr(device, 'slice_index', None) for device in devices]
  if None not in numbers:
    slices = [[d for d, m in zip(devices, numbers, strict=True) if m == n]
              for n in sorted(set(numbers))]
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
  """The sizes with -1 filled in, so that they multiply to `total`."""
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
