"""Children that save without end and are killed at random moments; run by test_checkpoints.

  python killed_savers.py FOLDER KILLS

Every child first reads what the ones before left. Prints one JSON object: a list of what each child
found, and a list of what lay in the folder after each kill.
"""

import json
import os
import random
import select
import signal
import sys
import time
from pathlib import Path

import jax
import numpy as np

from diffusion_jax.checkpoint.checkpoints import Checkpoints, Keep

LIMIT_SECONDS = 30


def state(step: int) -> dict:
  """A function of the step."""
  noise = np.random.default_rng(step).standard_normal((4, 1 << 15), np.float32)
  params = {f'p{i}': x for i, x in enumerate(noise)}
  return {'params': params, 'opt_state': {'m': noise}, 'ema': {}, 'rest': {}}


def child(folder: Path, out: int) -> None:
  """Read, tell, save until killed."""
  place = jax.devices()[0]
  sharding = jax.sharding.SingleDeviceSharding(place)
  checkpoints = Checkpoints(folder, Keep(last=2))
  found = checkpoints.restore(jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), state(0)
  ))
  step = 0
  if found is not None:
    step, restored, data = found
    jax.tree.map(np.testing.assert_array_equal, restored, state(step))
    assert data == [step]
  os.write(out, f'{step}\n'.encode())
  while True:
    step += 1
    checkpoints.save(step, jax.device_put(state(step), place), [step])


def start(folder: Path) -> tuple[int, str]:
  """(process id, what the child told once it had read); '' when it died or took too long."""
  read, write = os.pipe()
  pid = os.fork()
  if pid == 0:
    try:
      os.close(read)
      child(folder, write)
    finally:
      os._exit(1)
  os.close(write)
  ready, _, _ = select.select([read], [], [], LIMIT_SECONDS)
  told = os.read(read, 100).decode().strip() if ready else ''
  os.close(read)
  return pid, told


def main(folder: Path, kills: int) -> dict:
  """The first child is killed a little later, so that there is something to lose."""
  moments, found, left = random.Random(0), [], []
  for index in range(kills + 1):
    pid, told = start(folder)
    try:
      found.append(int(told) if told else None)
      if index < kills:
        time.sleep(moments.uniform(0, 0.2) + (1 if index == 0 else 0))
    finally:
      os.kill(pid, signal.SIGKILL)
      os.waitpid(pid, 0)
    left.append(sorted(path.name for path in folder.iterdir()))
  return {'found': found, 'left': left}


if __name__ == '__main__':
  print(json.dumps(main(Path(sys.argv[1]), int(sys.argv[2]))))
