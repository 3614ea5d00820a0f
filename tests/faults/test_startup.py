"""Real processes meet, or say in words why they could not."""

import os
import socket
import subprocess
import sys
import time

import pytest

from tests import tiny

pytestmark = pytest.mark.slow
JOIN = """
import sys
from diffusion_jax.errors import UserError
from diffusion_jax.parallel.startup import start_distributed

try:
  cluster = start_distributed()
except UserError as error:
  print(error, file=sys.stderr)
  sys.exit(2)

import jax
import numpy as np
from jax.experimental import multihost_utils

assert jax.config.jax_cpu_collectives_implementation == 'gloo'
own = np.asarray([10 * (cluster.index + 1), jax.local_device_count()])
print(multihost_utils.process_allgather(own).tolist(), jax.process_index(), jax.process_count())
"""
LAUNCHERS = ('SLURM_', 'OMPI_', 'PMI', 'TPU_', 'MEGASCALE_', 'KUBERNETES_', 'COORDINATOR_')


def _start(*arguments: str, **env: str) -> subprocess.Popen:
  """A process of JOIN, or of other arguments to Python."""
  inherited = {k: v for k, v in os.environ.items() if not k.startswith(LAUNCHERS)}
  inherited |= {'XLA_FLAGS': '--xla_force_host_platform_device_count=1',
                'PYTHONPATH': str(tiny.ROOT)}
  return subprocess.Popen(
    [sys.executable, '-u', *(arguments or ('-c', JOIN))], env=inherited | env, text=True,
    cwd=tiny.ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
  )


def _results(*processes) -> list[tuple[int, str, str]]:
  """(exit code, stdout, stderr) of each, none of which is left behind."""
  try:
    outputs = [process.communicate(timeout=60) for process in processes]
  finally:
    for process in processes:
      process.kill()  # Only has an effect where one hangs.
  return [(p.returncode, *output) for p, output in zip(processes, outputs, strict=True)]


def _slurm(index: int, port: int) -> dict[str, str]:
  return {
    'SLURM_JOB_ID': '4242', 'SLURM_NTASKS': '2', 'SLURM_PROCID': str(index), 'SLURM_NODEID': '0',
    'SLURM_LOCALID': str(index), 'SLURM_TASKS_PER_NODE': '2', 'SLURM_STEP_NODELIST': 'localhost',
    'JAX_COORDINATOR_PORT': str(port),
  }


def _open_mpi(index: int, port: int) -> dict[str, str]:
  return {
    'OMPI_COMM_WORLD_SIZE': '2', 'OMPI_COMM_WORLD_RANK': str(index),
    'OMPI_COMM_WORLD_LOCAL_SIZE': '2', 'OMPI_COMM_WORLD_LOCAL_RANK': str(index),
    'OMPI_MCA_orte_hnp_uri': '1314521088.0;tcp://127.0.0.1,10.0.0.1:34911',
    'JAX_COORDINATOR_PORT': str(port),
  }


@pytest.mark.parametrize(('environment', 'name'), [(_slurm, 'SLURM'), (_open_mpi, 'Open MPI')])
def test_two_processes_of_a_launcher_meet_and_compute_together(environment, name):
  port = tiny.free_port()
  results = _results(*(_start(**environment(i, port)) for i in range(2)))
  for i, (code, out, err) in enumerate(results):
    assert code == 0, err[-2000:]
    found, *_, computed = out.splitlines()  # Gloo speaks, too.
    assert computed == f'[[10, 1], [20, 1]] {i} 2'
    assert found.startswith(f'process {i} of 2 ({name}: ')


def _explicit(index: int, port: int, **more: str) -> dict[str, str]:
  # Without the log of jaxlib, which tells process 0 that it ends what it has begun.
  return {
    'COORDINATOR_ADDRESS': f'127.0.0.1:{port}', 'PROCESS_COUNT': '2', 'PROCESS_INDEX': str(index),
    'TF_CPP_MIN_LOG_LEVEL': '3', **more,
  }


@pytest.mark.parametrize('index', [0, 1])
def test_without_its_peer_a_process_leaves_with_one_sentence(index):
  # jaxlib itself would end the process with SIGABRT and a stack trace.
  start, port = time.monotonic(), tiny.free_port()
  [(code, _, err)] = _results(_start(**_explicit(index, port, COORDINATOR_TIMEOUT_SECONDS='1')))
  assert code == 2 and len(err.splitlines()) == 1, err
  assert err.startswith(f'not all processes have met at 127.0.0.1:{port} within 1 s; see what')
  assert time.monotonic() - start < 20


def test_a_port_that_another_program_uses():
  with socket.create_server(('', 0)) as server:
    port = server.getsockname()[1]
    [(code, _, err)] = _results(_start(**_explicit(0, port)))
  assert code == 2 and f'process 0 cannot listen at 127.0.0.1:{port} (Address already' in err, err


def test_a_launcher_that_jax_does_not_understand():
  """Version 5 of Open MPI no longer says where mpirun runs."""
  [(code, _, err)] = _results(_start(OMPI_COMM_WORLD_SIZE='2', OMPI_COMM_WORLD_RANK='0'))
  assert code == 2 and 'where jax does not know the cluster set COORDINATOR_ADDRESS' in err, err


def test_a_signal_between_joining_and_training_is_heard():
  """jaxlib has a handler of SIGTERM of its own, which would swallow it."""
  script = f"""
import os, signal, sys
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
from diffusion_jax.parallel.startup import _join
_join(60, coordinator_address='127.0.0.1:{tiny.free_port()}', num_processes=1, process_id=0)
os.kill(os.getpid(), signal.SIGTERM)
"""
  env = os.environ | {'PYTHONPATH': str(tiny.ROOT)}
  done = subprocess.run([sys.executable, '-c', script], env=env, timeout=60, check=False)
  assert done.returncode == 143


def test_hosts_of_a_tpu_pod_that_no_variable_names_share_one_workdir(tmp_path):
  """Before jax is imported none of them knows its number: each would open it as process 0."""
  port, workdir = str(tiny.free_port()), str(tmp_path / 'run')
  results = _results(*(
    _start('tests/faults/tpu_host.py', str(i), port, workdir, JAX_PLATFORMS='') for i in range(2)
  ))
  for i, (code, out, err) in enumerate(results):
    assert code == 0, err[-2000:]
    assert out.splitlines()[-1] == f'False tpu {i} 2 {i == 0}'
