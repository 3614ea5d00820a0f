"""One of two processes that save and restore together; run by test_checkpoints.

  python two_savers.py ADDRESS INDEX FOLDER OTHER_FOLDER

Prints one JSON object: what this process saw.
"""

import json
import resource
import sys
from pathlib import Path

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from diffusion_jax.checkpoint.checkpoints import Checkpoints, Keep
from diffusion_jax.parallel.processes import agree

SIZE = 1 << 16


def arrays(step: int) -> dict[str, np.ndarray]:
  """A function of the step that no other step shares; not to be compressed."""
  noise = np.random.default_rng(step).standard_normal((SIZE, 2), np.float32)
  return {'split': noise, 'rows': noise[:64] * step, 'whole': np.float32(step) * np.ones(3, 'f4')}


def state(step: int, put=lambda name, x: x) -> dict:
  """arrays(step) as a training state."""
  params = {name: put(name, x) for name, x in arrays(step).items()}
  return {'params': params, 'opt_state': {}, 'ema': {}, 'rest': {}}


def main(address: str, index: int, folder: Path, other: Path) -> dict:
  """other: a place that only the second process looks at."""
  jax.config.update('jax_cpu_collectives_implementation', 'gloo')
  jax.distributed.initialize(address, 2, index)
  mesh = jax.make_mesh((4, 2), ('a', 'b'), axis_types=(jax.sharding.AxisType.Auto,) * 2)
  specs = {'split': ('a', 'b'), 'rows': ('b',), 'whole': ()}

  def put(name, x):
    sharding = NamedSharding(mesh, PartitionSpec(*specs[name]))
    return jax.make_array_from_callback(x.shape, sharding, lambda part: x[part])

  said, seen = [], {}
  checkpoints = Checkpoints(folder, Keep(last=4), say=said.append)
  seen['saved'] = [checkpoints.save(step, state(step, put), step) for step in (1, 2, 3)]
  seen['waited'] = checkpoints.wait()
  if index == 1:  # This one alone cannot write large files; the other must not wait for it.
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 12, limits[1]))
  checkpoints.save(4, state(4, put), 4)
  seen['failed'] = checkpoints.wait(), checkpoints.error, checkpoints.steps()
  if index == 1:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
  seen['again'] = checkpoints.save(4, state(4, put), 4), checkpoints.wait(), checkpoints.steps()
  checkpoints.close()

  if index == 1:
    import shutil

    shutil.copytree(folder, other)
    for file in (other / '4' / 'params').rglob('d/*'):
      file.write_bytes(file.read_bytes()[:100])  # Process 0 looks at the whole files in `folder`.
    for file in (folder / '3' / 'params').rglob('ocdbt.process_1/d/*'):
      damaged = bytearray(file.read_bytes())
      damaged[len(damaged) // 2] ^= 1
      for place in (folder, other):
        (place / file.relative_to(folder)).write_bytes(damaged)
  agree('damaged', '')
  abstract = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state(0, put)
  )
  checkpoints = Checkpoints(other if index else folder, say=said.append)
  step, found, data = checkpoints.restore(abstract)
  for name, x in arrays(step).items():
    for shard in found['params'][name].addressable_shards:
      np.testing.assert_array_equal(shard.data, x[shard.index])
  checkpoints.close()
  return {**seen, 'restored': [step, data], 'said': said}


if __name__ == '__main__':
  address, index, *folders = sys.argv[1:]
  print(json.dumps(main(address, int(index), *map(Path, folders))))
