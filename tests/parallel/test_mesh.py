"""Sizes of the mesh, and the places of devices in it."""

import dataclasses

import numpy as np
import pytest
from jax.experimental import mesh_utils
from jax.sharding import AxisType

from diffusion_jax.errors import UserError
from diffusion_jax.layout import AXES
from diffusion_jax.parallel.mesh import MeshConfig, make_mesh, place


def sizes(mesh):
  return {axis: size for axis, size in mesh.shape.items() if size > 1}


def ids(devices):
  return np.vectorize(lambda device: device.id)(devices)


@pytest.mark.parametrize(('config', 'wanted'), [
  (MeshConfig(), {'data': 8}),
  (MeshConfig(data=2, fsdp=-1, tensor=2), {'data': 2, 'fsdp': 2, 'tensor': 2}),
  (MeshConfig(data=1, fsdp=8), {'fsdp': 8}),
  (MeshConfig(fsdp=2, spatial=2), {'data': 2, 'fsdp': 2, 'spatial': 2}),
  (MeshConfig(dcn_data=2), {'data': 8}),
  (MeshConfig(data=1, fsdp=-1, dcn_data=2), {'data': 2, 'fsdp': 4}),
  (MeshConfig(data=1, fsdp=-1, dcn_data=1, dcn_fsdp=2), {'fsdp': 8}),
  (MeshConfig(fsdp=2, dcn_data=-1, dcn_fsdp=2), {'data': 2, 'fsdp': 4}),
])
def test_minus_one_takes_what_is_left(config, wanted):
  mesh = make_mesh(config)
  assert mesh.axis_names == AXES and sizes(mesh) == wanted
  assert mesh.axis_types == (AxisType.Auto,) * len(AXES)
  assert sorted(ids(mesh.devices).flat) == list(range(8))


@pytest.mark.parametrize(('config', 'words'), [
  (MeshConfig(data=3), 'does not fit 8 devices: mesh.data=3, mesh.fsdp=1'),
  (MeshConfig(data=4), 'does not fit 8 devices'),
  (MeshConfig(data=-1, tensor=3), 'does not fit 8 devices'),
  (MeshConfig(data=-1, fsdp=-1), 'more than one of mesh.data, mesh.fsdp'),
  (MeshConfig(fsdp=0), 'mesh.fsdp is 0'),
  (MeshConfig(tensor=-2), 'mesh.tensor is -2'),
  (MeshConfig(tensor=2, spatial=2), 'mesh.tensor and mesh.spatial are both above 1'),
  (MeshConfig(data=8, dcn_data=2), 'does not fit 4 devices of each of 2 slices'),
  (MeshConfig(dcn_data=3), '8 devices cannot be cut into 3 equal slices'),
  (MeshConfig(dcn_data=0), 'mesh.dcn_data is 0'),
  (MeshConfig(dcn_data=-1, dcn_fsdp=-1), 'more than one of mesh.dcn_data, mesh.dcn_fsdp'),
])
def test_sizes_that_do_not_fit(config, words):
  with pytest.raises(UserError, match=words):
    make_mesh(config)


def test_slices_are_blocks_and_the_inner_axes_stay_within_one():
  mesh = make_mesh(MeshConfig(data=1, fsdp=2, tensor=2, dcn_data=2))
  np.testing.assert_array_equal(ids(mesh.devices)[:, :, 0], [[[0, 1], [2, 3]], [[4, 5], [6, 7]]])
  mesh = make_mesh(MeshConfig(data=1, fsdp=2, spatial=2, dcn_data=1, dcn_fsdp=2))
  np.testing.assert_array_equal(ids(mesh.devices)[0, :, :, 0], [[0, 1], [2, 3], [4, 5], [6, 7]])


@dataclasses.dataclass(frozen=True)
class Device:
  """What a device of several slices tells of itself; no machine at hand has such."""

  id: int
  slice_index: int
  process_index: int
  platform: str = 'cpu'
  device_kind: str = 'cpu'


# Two slices of two processes with two devices each, as jax.devices() might list them.
SLICED = [Device(n, n // 2 % 2, n // 2) for n in range(8)]


@pytest.mark.parametrize('config', [
  MeshConfig(), MeshConfig(data=1, fsdp=-1), MeshConfig(data=2, tensor=2, dcn_data=1, dcn_fsdp=2),
])
def test_devices_that_tell_their_slice_lie_as_jax_lays_them(config):
  mesh = make_mesh(config, SLICED)
  dcn = [1, 2, 1, 1] if config.dcn_fsdp == 2 else [2, 1, 1, 1]
  ici = [size // over for size, over in zip(mesh.devices.shape, dcn, strict=True)]
  jaxs = mesh_utils.create_hybrid_device_mesh(ici, dcn, SLICED)
  np.testing.assert_array_equal(ids(mesh.devices), ids(jaxs))
  half = mesh.devices[: len(mesh.devices) // 2] if dcn[0] == 2 else mesh.devices[:, :1]
  assert {device.slice_index for device in half.flat} == {0}


def test_three_slices_on_two_axes_each_way():
  slices = [[Device(10 * n + i, n, n) for i in range(2)] for n in range(6)]
  grid = ids(place(slices, [1, 2], [3, 2]))
  np.testing.assert_array_equal(grid, [[0, 1, 10, 11], [20, 21, 30, 31], [40, 41, 50, 51]])


@pytest.mark.parametrize(('config', 'devices', 'words'), [
  (MeshConfig(dcn_data=1), SLICED, 'does not fit 2 slices: mesh.dcn_data=1, mesh.dcn_fsdp=1'),
  (MeshConfig(dcn_data=3), SLICED, 'does not fit 2 slices'),
  (MeshConfig(), SLICED[:-1], 'slices have 4, 3 devices'),
])
def test_slices_that_do_not_fit(config, devices, words):
  with pytest.raises(UserError, match=words):
    make_mesh(config, devices)


@dataclasses.dataclass(frozen=True)
class Plain:
  """A device that knows no slice, of one of several processes."""

  id: int
  process_index: int
  platform: str = 'cpu'
  device_kind: str = 'cpu'


def test_elsewhere_a_slice_is_a_group_of_processes_and_no_part_of_one():
  devices = [Plain(n, n // 2) for n in reversed(range(8))]
  mesh = make_mesh(MeshConfig(data=1, fsdp=-1, dcn_data=2), devices)
  np.testing.assert_array_equal(ids(mesh.devices)[:, :, 0, 0], [[0, 1, 2, 3], [4, 5, 6, 7]])
  with pytest.raises(UserError, match=r'8 slices would cut .* a divisor of the 4 processes'):
    make_mesh(MeshConfig(dcn_data=8), devices)
