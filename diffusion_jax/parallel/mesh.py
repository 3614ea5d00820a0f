"""The device mesh. One device is the smallest mesh."""

import dataclasses

import jax
from jax.sharding import AxisType, Mesh

from diffusion_jax.errors import UserError

AXES = ('data', 'fsdp', 'tensor')


@dataclasses.dataclass(frozen=True)
class MeshConfig:
  """Sizes of the mesh axes; one of them may be -1, meaning all devices that are left.

  data: replicas. fsdp: parameters and batch are both split. tensor: wide matrices are split.
  """

  data: int = -1
  fsdp: int = 1
  tensor: int = 1


def make_mesh(config: MeshConfig, devices=None) -> Mesh:
  """A mesh over all devices with axes data, fsdp and tensor.

  Raises:
    UserError: when the sizes do not multiply to the number of devices.
  """
  devices = jax.devices() if devices is None else devices
  sizes = [getattr(config, axis) for axis in AXES]
  known = 1
  for axis, size in zip(AXES, sizes, strict=True):
    if size == 0 or size < -1:
      raise UserError(f'mesh.{axis} is {size}; give a positive size, or -1 for the devices left.')
    known *= max(size, 1)
  if sizes.count(-1) > 1:
    raise UserError('more than one mesh size is -1; only one can take the devices that are left.')
  if len(devices) % known or (-1 not in sizes and known != len(devices)):
    raise UserError(
      f'the mesh {dict(zip(AXES, sizes, strict=True))} does not fit {len(devices)} devices; '
      'make the sizes multiply to that number, or set one of them to -1.'
    )
  sizes = [len(devices) // known if size == -1 else size for size in sizes]
  return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)
