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


def _free_port() -> int:
  with socket.socket() as s:
    s.bind(('127.0.0.1', 0))
    return s.getsockname()[1]


def _start(**env: str) -> subprocess.Popen:
  inherited = {k: v for k, v in os.environ.items() if not k.startswith(LAUNCHERS)}
  inherited |= {'XLA_FLAGS': '--xla_force_host_platform_device_count=1',
                'PYTHONPATH': str(tiny.ROOT)}
  return subprocess.Popen(
    [sys.executable, '-u', '-c', JOIN], env=inherited | env, text=True, cwd=tiny.ROOT,
    stdout=subprocess.PIPE, stderr=subprocess.PIPE,
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
  port = _free_port()
  results = _results(*(_start(**environment(i, port)) for i in range(2)))
  for i, (code, out, err) in enumerate(results):
    assert code == 0, err[-2000:]
    found, *_, computed = out.splitlines()  # Gloo speaks, too.
    assert computed == f'[[10, 1], [20, 1]] {i} 2'
    assert found.startswith(f'process {i} of 2 ({name}: ') and found.endswith(f':{port}')


@pytest.mark.parametrize('index', [0, 1])
def test_without_its_peer_a_process_leaves_with_one_sentence(index):
  # jaxlib itself would end the process with SIGABRT and a stack trace.
  start, port = time.monotonic(), _free_port()
  [(code, _, err)] = _results(_start(
    COORDINATOR_ADDRESS=f'127.0.0.1:{port}', PROCESS_COUNT='2', PROCESS_INDEX=str(index),
    COORDINATOR_TIMEOUT_SECONDS='1',
  ))
  assert code == 2 and len(err.splitlines()) == 1, err
  assert err.startswith((
    f'process 0 waited 1 s at 127.0.0.1:{port}, but process 1 of 2 did not come',
    f'process 1 of 2 could not reach process 0 at 127.0.0.1:{port} within 1 s (Connection refused)',
  )[index]), err
  assert time.monotonic() - start < 20
