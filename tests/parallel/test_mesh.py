"""Sizes of the mesh, and how processes are told of one another."""

import jax
import pytest

from diffusion_jax.errors import UserError
from diffusion_jax.parallel.mesh import MeshConfig, make_mesh


@pytest.mark.parametrize(('config', 'wanted'), [
  (MeshConfig(), (8, 1, 1)),
  (MeshConfig(data=2, fsdp=-1, tensor=2), (2, 2, 2)),
  (MeshConfig(data=1, fsdp=8), (1, 8, 1)),
])
def test_minus_one_takes_the_devices_that_are_left(config, wanted):
  mesh = make_mesh(config)
  assert tuple(mesh.shape[axis] for axis in ('data', 'fsdp', 'tensor')) == wanted
  assert set(mesh.devices.flat) == set(jax.devices())


@pytest.mark.parametrize(('config', 'words'), [
  (MeshConfig(data=3), 'does not fit 8 devices'),
  (MeshConfig(data=4), 'does not fit 8 devices'),
  (MeshConfig(data=-1, tensor=3), 'does not fit 8 devices'),
  (MeshConfig(data=-1, fsdp=-1), 'more than one'),
  (MeshConfig(fsdp=0), 'mesh.fsdp is 0'),
  (MeshConfig(tensor=-2), 'mesh.tensor is -2'),
])
def test_sizes_that_do_not_fit(config, words):
  with pytest.raises(UserError, match=words):
    make_mesh(config)
