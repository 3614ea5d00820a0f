"""Real processes: each reads the rows that its devices hold, and together they are the batch."""

import json
import os
import subprocess
import sys

import pytest

from tests.tiny import ROOT, free_port

SCRIPT = """
import json, sys
import jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec
index, address = int(sys.argv[1]), sys.argv[2]
jax.distributed.initialize(address, 2, index)
from diffusion_jax.data.loader import Loader
from diffusion_jax.data.sources.arrays import ArraySource
from diffusion_jax.parallel.mesh import MeshConfig, make_mesh
from diffusion_jax.parallel.mesh import local_rows, put_batch

class Noise:
  random = True
  def __call__(self, record, rng):
    return record | {'noise': np.float32(rng.random(3))}

source = ArraySource({'n': np.arange(19, dtype=np.int32)})
whole = Loader(source, [Noise()], batch_size=8, seed=1)
expected = [next(whole) for _ in range(3)]
inner = jax.devices()
across = [inner[i] for i in (0, 2, 1, 3)]  # Neighbours on the mesh are of different processes.
result = {}
for name, devices, sizes in (
  ('data', inner, (4, 1, 1)), ('fsdp', inner, (2, 2, 1)), ('data, far apart', across, (4, 1, 1)),
  ('tensor inside', inner, (2, 1, 2)), ('tensor across', across, (2, 1, 2)),
  ('all tensor', inner, (1, 1, 4)),
):
  mesh = make_mesh(MeshConfig(*sizes), devices)
  rows = local_rows(mesh, 8)
  loader = Loader(source, [Noise()], batch_size=8, rows=rows, seed=1)
  gather = jax.jit(lambda x: x, out_shardings=NamedSharding(mesh, PartitionSpec()))
  for batch in expected:
    mine = next(loader)
    assert len(mine['n']) == len(rows)
    for key, value in put_batch(mine, mesh).items():
      np.testing.assert_array_equal(np.asarray(gather(value)), batch[key])
      spec = loader.spec()[key]
      assert (spec.shape, spec.dtype) == (value.shape, value.dtype)
  result[name] = rows.tolist()
print(json.dumps(result))
"""
ALL = list(range(8))


@pytest.mark.slow
def test_two_processes_hold_the_rows_of_their_devices():
  address = f'127.0.0.1:{free_port()}'
  env = {
    **os.environ, 'XLA_FLAGS': '--xla_force_host_platform_device_count=2',
    'JAX_CPU_COLLECTIVES_IMPLEMENTATION': 'gloo',
  }
  processes = [
    subprocess.Popen(
      [sys.executable, '-c', SCRIPT, str(i), address], env=env, cwd=ROOT, text=True,
      stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )
    for i in range(2)
  ]
  try:
    results = [process.communicate(timeout=120) for process in processes]
  finally:
    for process in processes:
      process.kill()  # Only has an effect where one hangs.
  for process, (_, err) in zip(processes, results, strict=True):
    assert process.returncode == 0, err[-2000:]
  first, second = (json.loads(out.strip().splitlines()[-1]) for out, _ in results)
  assert first == {
    'data': [0, 1, 2, 3], 'fsdp': [0, 1, 2, 3], 'data, far apart': [0, 1, 4, 5],
    'tensor inside': [0, 1, 2, 3], 'tensor across': ALL, 'all tensor': ALL,
  }
  assert second == {
    'data': [4, 5, 6, 7], 'fsdp': [4, 5, 6, 7], 'data, far apart': [2, 3, 6, 7],
    'tensor inside': [4, 5, 6, 7], 'tensor across': ALL, 'all tensor': ALL,
  }
