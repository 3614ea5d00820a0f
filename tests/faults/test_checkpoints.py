"""Saving under real kills, on a real full disk and by real processes of which one fails."""

import json
import os
import shutil
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.checkpoint.checkpoints import Checkpoints, Keep
from tests import tiny
from tests.faults import two_savers

FAULTS = tiny.ROOT / 'tests' / 'faults'
KILLS = 20


def _start(script, *arguments, devices):
  environment = {
    **os.environ, 'PYTHONPATH': str(tiny.ROOT), 'JAX_PLATFORMS': 'cpu',
    'XLA_FLAGS': f'--xla_force_host_platform_device_count={devices}',
  }
  return subprocess.Popen(
    [sys.executable, str(FAULTS / script), *map(str, arguments)], env=environment, text=True,
    stdout=subprocess.PIPE, stderr=subprocess.PIPE,
  )


@pytest.mark.slow
def test_killed_at_random_moments_of_saving(tmp_path):
  """A child that finds another content than its step's, or nothing, dies and tells nothing."""
  process = _start('killed_savers.py', tmp_path, KILLS, devices=1)
  try:
    out, err = process.communicate(timeout=180)
  finally:
    process.kill()
  assert process.returncode == 0, err[-2000:]
  result = json.loads(out)
  found, left = result['found'], result['left']
  assert None not in found and len(found) == KILLS + 1, err[-2000:]
  assert found[0] == 0 and found[1] > 0
  half_saved = 0
  for names, after in zip(left, found[1:], strict=False):
    assert after == max(int(name) for name in names if name.isdecimal())
    half_saved += any('tmp' in name for name in names)
  assert half_saved >= KILLS // 4, left
  assert not (tmp_path / 'quarantine').exists()
  # The last child was killed too; who opens next cleans up.
  Checkpoints(tmp_path).close()
  assert len([path for path in tmp_path.iterdir() if path.is_dir()]) <= 3
  assert all(path.name.isdecimal() for path in tmp_path.iterdir())


def _state(step):
  noise = np.random.default_rng(step).standard_normal((2, 1 << 17), np.float32)
  return {'params': {'x': jnp.asarray(noise)}, 'opt_state': {}, 'ema': {}, 'rest': {}}


def _survives(directory, fill, make_room):
  """Save step 1, fill the disk, fail to save step 2, make room, save step 3."""
  said, state = [], _state(0)
  abstract = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
  )
  checkpoints = Checkpoints(directory, Keep(last=3), say=said.append, retry_seconds=0.1)
  assert checkpoints.save(1, _state(1), 1) and checkpoints.wait() and said == []
  fill()
  started = checkpoints.save(2, _state(2), 2)
  assert not checkpoints.wait()
  assert said == [checkpoints.error]
  assert 'step 2 could not be saved (the disk is full' in checkpoints.error
  assert sorted(path.name for path in directory.iterdir()) == ['1']
  step, found, _ = checkpoints.restore(abstract)
  assert step == 1
  jax.tree.map(np.testing.assert_array_equal, found, _state(1))
  time.sleep(0.15)
  assert checkpoints.should_retry()
  assert not checkpoints.save(3, _state(3), 3) or not checkpoints.wait()
  assert not checkpoints.should_retry() and len(said) == 2
  make_room()
  assert checkpoints.save(3, _state(3), 3) and checkpoints.wait()
  assert checkpoints.error == '' and said[2:] == ['checkpoints can be saved again.']
  step, found, data = checkpoints.restore(abstract)
  assert (step, data) == (3, 3)
  jax.tree.map(np.testing.assert_array_equal, found, _state(3))
  checkpoints.close()
  return started


def test_a_full_disk(small_disk):
  disk = small_disk('size=8m')
  ballast = disk / 'ballast'
  started = _survives(
    disk / 'checkpoints', lambda: ballast.write_bytes(bytes(5_500_000)), ballast.unlink
  )
  assert not started  # It is known before anything is written.


def test_a_disk_that_takes_no_more_files(small_disk):
  """Space is left, so the fault shows only while files are written in the background."""
  disk = small_disk('size=32m,nr_inodes=100')
  ballast = disk / 'ballast'
  ballast.mkdir()

  def fill():
    for index in range(os.statvfs(disk).f_ffree - 7):
      (ballast / str(index)).touch()

  assert _survives(disk / 'checkpoints', fill, lambda: shutil.rmtree(ballast))


@pytest.mark.slow
def test_two_processes_come_to_one_verdict(tmp_path):
  """One cannot write; one sees damage that the other does not; one process reads what two wrote."""
  folder, other = tmp_path / 'checkpoints', tmp_path / 'seen_by_one'
  address = f'127.0.0.1:{tiny.free_port()}'
  processes = [
    _start('two_savers.py', address, index, folder, other, devices=4) for index in range(2)
  ]
  try:
    outputs = [process.communicate(timeout=120) for process in processes]
  finally:
    for process in processes:
      process.kill()
  for process, (_, err) in zip(processes, outputs, strict=True):
    assert process.returncode == 0, err[-3000:]
  first, second = (json.loads(out.strip().splitlines()[-1]) for out, _ in outputs)
  assert first['saved'] == second['saved'] == [True] * 3
  assert first['waited'] and second['waited']
  assert first['failed'] == second['failed']
  succeeded, error, steps = first['failed']
  assert not succeeded and 'step 4 could not be saved' in error and steps == [1, 2, 3]
  assert first['again'] == second['again'] == [True, True, [1, 2, 3, 4]]
  assert first['restored'] == second['restored'] == [2, 2]
  assert second['said'] == []  # Process 0 speaks for both.
  assert [line for line in first['said'] if '4 is damaged' in line]
  assert [line for line in first['said'] if '3 is damaged' in line]
  assert sorted(path.name for path in (folder / 'quarantine').iterdir()) == ['3', '4']

  sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  abstract = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), two_savers.state(0)
  )
  checkpoints = Checkpoints(folder)
  step, found, data = checkpoints.restore(abstract)
  assert (step, data) == (2, 2)
  jax.tree.map(np.testing.assert_array_equal, found, two_savers.state(2))
  checkpoints.close()
