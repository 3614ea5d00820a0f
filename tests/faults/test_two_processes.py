"""Two real processes on one machine train as one with two devices does."""

import json
import os

import pytest

from tests import tiny


@pytest.mark.slow
def test_two_processes_are_one_with_two_devices(tmp_path, small_data):
  values = tiny.autoencoder_config({'adversarial_weight': 0.0}, loop={'total_steps': 3})
  config = tiny.write_config(tmp_path / 'recipe.py', values)
  arguments = lambda name: [
    'train', '--config', config, '--workdir', str(tmp_path / name), '--quiet'
  ]
  address = f'127.0.0.1:{tiny.free_port()}'
  processes = [
    tiny.start(arguments('two'), tiny.environment(
      small_data, devices=1, COORDINATOR_ADDRESS=address, PROCESS_COUNT='2',
      PROCESS_INDEX=str(i),
    ))
    for i in range(2)
  ]
  one = tiny.start(arguments('one'), tiny.environment(small_data, devices=2))
  try:
    results = [process.communicate(timeout=500) for process in (*processes, one)]
  finally:
    for process in (*processes, one):
      process.kill()  # Only has an effect where one hangs.
  for process, (_, err) in zip((*processes, one), results, strict=True):
    assert process.returncode == 0, err[-2000:]
  versions = json.loads((tmp_path / 'two' / 'versions.json').read_text())
  assert (versions['processes'], versions['devices']) == (2, 2)
  found, wanted = tiny.metrics(tmp_path / 'two'), tiny.metrics(tmp_path / 'one')
  assert sorted(found) == sorted(wanted) == [1, 2, 3]
  for step, line in wanted.items():
    for name in ('loss', 'loss_kl', 'gradient_norm'):
      assert found[step][name] == pytest.approx(line[name], rel=1e-5), (step, name)
  assert os.listdir(tmp_path / 'two' / 'model') == os.listdir(tmp_path / 'one' / 'model')
