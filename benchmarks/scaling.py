"""The cost of more devices: the collectives of a step for 1, 2, 4 ... simulated devices.

Each number of devices has a process of its own, which compiles the step and never runs it. The
batch grows with the devices (weak scaling).

  python -m benchmarks.scaling < CONFIG.json
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from typing import Any

from diffusion_jax.errors import UserError

MESHES = {'data': {'data': -1, 'fsdp': 1}, 'fsdp': {'data': 1, 'fsdp': -1}}
# The program that is read is the partitioned one; making good code of it would take minutes.
QUICK = ('--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true '
         '--xla_cpu_use_fusion_emitters=false')
TIMEOUT = 3600


def measure_scaling(config: dict[str, Any], counts: list[int]) -> list[dict[str, Any]]:
  """For each number of devices and each of MESHES what `step_collectives` returns.

  Raises:
    UserError: a process fails; the message ends with what it said last.
  """
  return [found for count in counts for found in _in_process(config, count)]


def _in_process(config: dict[str, Any], count: int) -> list[dict[str, Any]]:
  flags = re.sub(r'--xla_force_host_platform_device_count=\d+', '', os.environ.get('XLA_FLAGS', ''))
  flags = f'{flags} --xla_force_host_platform_device_count={count}'
  flags += ' '.join(['', *(flag for flag in QUICK.split() if flag not in flags)])
  done = subprocess.run(
    [sys.executable, '-m', 'benchmarks.scaling'], input=json.dumps(config), text=True,
    capture_output=True, timeout=TIMEOUT, check=False,
    env={**os.environ, 'XLA_FLAGS': flags.strip(), 'JAX_PLATFORMS': 'cpu'},
  )
  if done.returncode:
    last = (done.stderr.strip() or 'nothing').splitlines()[-1][-300:]
    raise UserError(f'the step for {count} simulated devices could not be compiled: {last}')
  return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
  """Compiles the step of the config on stdin for each of MESHES on the devices there are."""
  from benchmarks.collectives import step_collectives
  from benchmarks.run import built

  config, found = json.load(sys.stdin), []
  import jax

  count = jax.device_count()
  for name, mesh in MESHES.items() if count > 1 else [('one', MESHES['data'])]:
    config['mesh'] = {**config['mesh'], 'tensor': 1, 'spatial': 1, 'dcn_data': 1, 'dcn_fsdp': 1,
                      **mesh}
    with tempfile.TemporaryDirectory() as folder:
      loop = {**config['loop'], 'batch_size': config['loop']['batch_size'] * count}
      training = built({**config, 'loop': loop}, folder, synthetic=True)
      found.append({'devices': count, 'mesh': name, **step_collectives(training)})
  print(json.dumps(found))


if __name__ == '__main__':
  main()
