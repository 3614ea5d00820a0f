"""What is found in the environments of launchers, told without a network."""

import pytest

from diffusion_jax.errors import UserError
from diffusion_jax.parallel import startup
from diffusion_jax.parallel.startup import Cluster, find_cluster, start_distributed

SLURM = {
  'SLURM_JOB_ID': '12345', 'SLURM_NTASKS': '4', 'SLURM_PROCID': '3', 'SLURM_LOCALID': '1',
  'SLURM_STEP_NODELIST': 'gpu[007-008]', 'SLURM_NODEID': '1', 'SLURM_TASKS_PER_NODE': '2(x2)',
}
OPEN_MPI = {
  'OMPI_COMM_WORLD_SIZE': '4', 'OMPI_COMM_WORLD_RANK': '2', 'OMPI_COMM_WORLD_LOCAL_SIZE': '4',
  'OMPI_COMM_WORLD_LOCAL_RANK': '2',
}
EXPLICIT = {'COORDINATOR_ADDRESS': 'host:1234', 'PROCESS_COUNT': '2', 'PROCESS_INDEX': '1'}
JOBSET = {
  'KUBERNETES_SERVICE_HOST': '10.0.0.1', 'JOBSET_NAME': 'run', 'REPLICATED_JOB_NAME': 'workers',
  'JOB_COMPLETION_INDEX': '1', 'NNODES': '2',
}
TPU = {'TPU_WORKER_HOSTNAMES': 'a,b,c,d', 'TPU_WORKER_ID': '2', 'TPU_ML_PLATFORM': 'JAX'}
ONE_TPU = {'TPU_WORKER_HOSTNAMES': 'localhost', 'TPU_WORKER_ID': '0'}


@pytest.fixture(autouse=True)
def no_devices(monkeypatch, tmp_path):
  """Whatever this host has on its bus."""
  monkeypatch.setattr(startup, 'PCI_DEVICES', tmp_path)


@pytest.mark.parametrize(('env', 'wanted'), [
  ({}, Cluster('single')),
  (EXPLICIT, Cluster('explicit', 2, 1, 'host:1234')),
  (EXPLICIT | SLURM | OPEN_MPI | TPU, Cluster('explicit', 2, 1, 'host:1234')),
  (SLURM, Cluster('slurm', 4, 3, local_devices=range(1, 2))),
  (OPEN_MPI, Cluster('ompi', 4, 2, local_devices=range(2, 3))),
  (OPEN_MPI | SLURM, Cluster('ompi', 4, 2, local_devices=range(2, 3))),
  (JOBSET, Cluster('gke', 2, 1, 'run-workers-0-0.run:8476')),
  (JOBSET | {'JAX_COORDINATOR_PORT': '99'}, Cluster('gke', 2, 1, 'run-workers-0-0.run:99')),
  ({'KUBERNETES_SERVICE_HOST': 'x'}, Cluster('single')),
  ({'SLURM_JOB_ID': '7', 'SLURM_NTASKS': '1'}, Cluster('single')),
  # How many there are only jax finds out, once it is imported.
  (TPU, Cluster('tpu', 0)),
  (TPU | JOBSET, Cluster('tpu', 0)),
  ({'JAX_PLATFORMS': 'tpu,cpu'}, Cluster('tpu', 0)),
  (ONE_TPU, Cluster('tpu', 1)),
  (ONE_TPU | {'MEGASCALE_COORDINATOR_ADDRESS': 'a'}, Cluster('tpu', 0)),
  ({'JAX_PLATFORMS': 'tpu', 'TPU_SKIP_MDS_QUERY': '1'}, Cluster('tpu', 1)),
  (TPU | {'JAX_PLATFORMS': 'cpu'}, Cluster('single')),
])
def test_each_launcher_is_understood(env, wanted):
  found = find_cluster(env)
  assert found.found
  for name in ('kind', 'processes', 'index', 'coordinator', 'local_devices'):
    assert getattr(found, name) == getattr(wanted, name), name


@pytest.mark.parametrize('env', [EXPLICIT, SLURM, OPEN_MPI, JOBSET, TPU])
def test_what_was_found_names_the_variables(env):
  found = find_cluster(env).found
  assert sum(f'{name}={value}' in found for name, value in env.items()) >= 2


@pytest.mark.parametrize(('env', 'wanted'), [
  ({}, [1]),
  ({'SLURM_TASKS_PER_NODE': '1(x4)'}, []),
  ({'SLURM_TASKS_PER_NODE': '3,1'}, []),
  ({'SLURM_STEP_TASKS_PER_NODE': '1(x4)'}, []),
  ({'SLURM_GPUS_ON_NODE': '8'}, [4, 5, 6, 7]),
  ({'CUDA_VISIBLE_DEVICES': '0,1,2,3'}, [2, 3]),
  ({'CUDA_VISIBLE_DEVICES': '1'}, []),
  ({'CUDA_VISIBLE_DEVICES': '0,1', 'SLURM_GPUS_PER_TASK': '2'}, []),
])
def test_tasks_of_a_host_divide_its_gpus(env, wanted):
  # jax alone would take GPU SLURM_LOCALID and leave all others idle where a host has one task.
  assert list(find_cluster(SLURM | env).local_devices) == wanted


@pytest.mark.parametrize(('env', 'words'), [
  ({'PROCESS_COUNT': '2'}, 'not COORDINATOR_ADDRESS, PROCESS_INDEX; set all'),
  (EXPLICIT | {'PROCESS_INDEX': '2'}, 'PROCESS_INDEX=2 does not fit PROCESS_COUNT=2'),
  (EXPLICIT | {'PROCESS_COUNT': 'two'}, "PROCESS_COUNT is 'two'; it must be a whole number"),
  (EXPLICIT | {'COORDINATOR_ADDRESS': 'host'}, 'give HOST:PORT'),
  ({'SLURM_JOB_ID': '7', 'SLURM_NTASKS': '4'}, 'srun has not started this process'),
  ({'SLURM_JOB_ID': '7', 'SLURM_JOB_NUM_NODES': '2'}, 'srun has not started this process'),
  # A batch script: SLURM sets SLURM_PROCID there, too.
  ({'SLURM_JOB_ID': '7', 'SLURM_NTASKS': '4', 'SLURM_PROCID': '0', 'SLURM_LOCALID': '0'},
   'start it with srun'),
  ({k: v for k, v in SLURM.items() if k != 'SLURM_PROCID'}, 'not SLURM_PROCID'),
  ({k: v for k, v in SLURM.items() if k != 'SLURM_JOB_ID'}, 'not SLURM_JOB_ID'),
  (SLURM | {'SLURM_GPUS_ON_NODE': '3'}, '3 GPUs cannot be divided among 2 tasks'),
  ({'OMPI_COMM_WORLD_SIZE': '2'}, 'not OMPI_COMM_WORLD_RANK'),
  ({'PMI_SIZE': '4', 'PMI_RANK': '1'}, 'MPICH or Intel MPI, whose variables are not read'),
  ({'JAX_COORDINATOR_ADDRESS': 'host:1'}, 'by jax.distributed'),
])
def test_half_environments_are_errors(env, words):
  with pytest.raises(UserError, match=words):
    find_cluster(env)


def test_one_process_joins_nobody_and_says_so():
  import jax

  lines = []
  cluster = start_distributed(say=lines.append)
  assert isinstance(cluster, Cluster) and cluster.processes == 1
  assert lines == [f'one process (single: {cluster.found})']
  assert not jax.distributed.is_initialized()
