"""What is found in the environments of launchers, told without a network."""

import pytest

from diffusion_jax.errors import UserError
from diffusion_jax.parallel.startup import (
  Cluster,
  expand_nodes,
  find_cluster,
  start_distributed,
  tasks_of_nodes,
)

SLURM = {
  'SLURM_JOB_ID': '12345', 'SLURM_NTASKS': '4', 'SLURM_PROCID': '3', 'SLURM_LOCALID': '1',
  'SLURM_STEP_NODELIST': 'gpu[007-008]', 'SLURM_NODEID': '1', 'SLURM_TASKS_PER_NODE': '2(x2)',
}
OPEN_MPI = {
  'OMPI_COMM_WORLD_SIZE': '4', 'OMPI_COMM_WORLD_RANK': '2', 'OMPI_COMM_WORLD_LOCAL_SIZE': '4',
  'OMPI_COMM_WORLD_LOCAL_RANK': '2',
  'OMPI_MCA_orte_hnp_uri': '1314521088.0;tcp://10.96.0.1,10.148.0.1:34911',
}
EXPLICIT = {'COORDINATOR_ADDRESS': 'host:1234', 'PROCESS_COUNT': '2', 'PROCESS_INDEX': '1'}
JOBSET = {
  'KUBERNETES_SERVICE_HOST': '10.0.0.1', 'JOBSET_NAME': 'run', 'REPLICATED_JOB_NAME': 'workers',
  'JOB_COMPLETION_INDEX': '1', 'NNODES': '2',
}
SLICES = {
  'MEGASCALE_COORDINATOR_ADDRESS': 'run-workers-0-0.run', 'MEGASCALE_NUM_SLICES': '2',
  'MEGASCALE_SLICE_ID': '1',
}
TPU = {'TPU_WORKER_HOSTNAMES': 'a,b,c,d', 'TPU_WORKER_ID': '2', 'TPU_ML_PLATFORM': 'JAX'}


def facts(env):
  cluster = find_cluster(env)
  return (cluster.kind, cluster.coordinator, cluster.processes, cluster.index,
          cluster.local_devices)


@pytest.mark.parametrize(('env', 'wanted'), [
  ({}, ('single', '', 1, 0, None)),
  (EXPLICIT, ('explicit', 'host:1234', 2, 1, None)),
  # 12345 mod 4096 is 57 and (65535 - 4095) + 57 is 61497.
  (SLURM, ('slurm', 'gpu007:61497', 4, 3, (1,))),
  # 1314521088 / 4096 is 320928, and mod 4096 that is 1440.
  (OPEN_MPI, ('openmpi', '10.96.0.1:62880', 4, 2, (2,))),
  (OPEN_MPI | {'OMPI_MCA_orte_hnp_uri': '4096.0;tcp6://[fe80::b9b,2620:10d::2]:43370'},
   ('openmpi', '[fe80::b9b]:61441', 4, 2, (2,))),
  (JOBSET, ('gke', 'run-workers-0-0.run:8476', 2, 1, None)),
  (TPU, ('tpu', '', 4, 2, None)),
  (TPU | SLICES, ('tpu', '', 8, 6, None)),
  (TPU | SLICES | JOBSET, ('gke', '', 8, 6, None)),
  ({'TPU_ML_PLATFORM': 'JAX'}, ('tpu', '', 0, 0, None)),
  ({'TPU_WORKER_HOSTNAMES': 'localhost', 'TPU_WORKER_ID': '0'}, ('tpu', '', 1, 0, None)),
])
def test_each_launcher_is_understood(env, wanted):
  assert facts(env) == wanted


@pytest.mark.parametrize(('env', 'wanted'), [(SLURM, 'gpu007:99'), (OPEN_MPI, '10.96.0.1:99'),
                                             (JOBSET, 'run-workers-0-0.run:99')])
def test_the_port_can_be_chosen_as_jax_names_it(env, wanted):
  assert find_cluster(env | {'JAX_COORDINATOR_PORT': '99'}).coordinator == wanted


@pytest.mark.parametrize('env', [EXPLICIT, SLURM, OPEN_MPI, JOBSET, TPU])
def test_what_was_found_names_the_variables(env):
  found = find_cluster(env).found
  assert sum(f'{name}={value}' in found for name, value in env.items()) >= 2


@pytest.mark.parametrize(('env', 'wanted'), [
  ({}, (1,)),
  ({'SLURM_TASKS_PER_NODE': '1(x4)'}, None),
  ({'SLURM_TASKS_PER_NODE': '3,1'}, None),
  ({'SLURM_STEP_TASKS_PER_NODE': '1(x4)'}, None),
  ({'SLURM_GPUS_ON_NODE': '8'}, (4, 5, 6, 7)),
  ({'CUDA_VISIBLE_DEVICES': '0,1,2,3'}, (2, 3)),
  ({'CUDA_VISIBLE_DEVICES': '1'}, None),
  ({'CUDA_VISIBLE_DEVICES': '0,1', 'SLURM_GPUS_PER_TASK': '2'}, None),
])
def test_tasks_of_a_host_share_its_gpus(env, wanted):
  # jax alone would take GPU SLURM_LOCALID and leave all others idle where a host has one task.
  assert find_cluster(SLURM | env).local_devices == wanted


@pytest.mark.parametrize(('env', 'words'), [
  ({'PROCESS_COUNT': '2'}, 'not COORDINATOR_ADDRESS, PROCESS_INDEX; set them too'),
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
  (SLURM | {'SLURM_STEP_NODELIST': 'gpu[1-'}, 'not a list of nodes'),
  (SLURM | {'SLURM_TASKS_PER_NODE': 'x2'}, 'does not tell the tasks'),
  ({'OMPI_COMM_WORLD_SIZE': '2'}, 'not OMPI_COMM_WORLD_RANK'),
  (OPEN_MPI | {'OMPI_MCA_orte_hnp_uri': ''}, 'does not tell where mpirun runs'),
  ({'KUBERNETES_SERVICE_HOST': 'x', 'JOB_COMPLETION_INDEX': '0'}, 'not JOBSET_NAME'),
  (TPU | {'TPU_WORKER_ID': ''}, 'TPU_WORKER_ID is missing'),
  (TPU | {'TPU_WORKER_ID': '4'}, 'does not fit the 4 hosts'),
  (TPU | {'MEGASCALE_NUM_SLICES': '2'}, 'the set of TPU slices is only half there'),
  ({'PMI_SIZE': '4', 'PMI_RANK': '1'}, 'MPICH or Intel MPI, whose variables are not read'),
  ({'JAX_COORDINATOR_ADDRESS': 'host:1'}, 'by jax.distributed'),
  (SLURM | TPU, 'two clusters disagree: SLURM says process 3 of 4 .* and TPU says process 2 of 4'),
])
def test_half_environments_and_disagreement_are_errors(env, words):
  with pytest.raises(UserError, match=words):
    find_cluster(env)


def test_explicit_wins_over_all_and_says_so():
  cluster = find_cluster(EXPLICIT | SLURM | OPEN_MPI | TPU)
  assert (cluster.kind, cluster.processes, cluster.index) == ('explicit', 2, 1)
  assert cluster.found.endswith(
    'SLURM and Open MPI and TPU seen too, not used: the explicit variables win'
  )


def test_mpirun_in_an_allocation_of_slurm_is_nearer():
  cluster = find_cluster(OPEN_MPI | {'SLURM_JOB_ID': '7', 'SLURM_NTASKS': '16'})
  assert (cluster.kind, cluster.processes) == ('openmpi', 4)
  assert 'SLURM seen too, not used' in cluster.found


@pytest.mark.parametrize(('env', 'words'), [
  ({'SLURM_JOB_ID': '7', 'SLURM_NTASKS': '1'}, 'SLURM_JOB_ID=7'),
  ({'KUBERNETES_SERVICE_HOST': 'x'}, 'no JobSet'),
  (TPU | {'JAX_PLATFORMS': 'cpu'}, 'not used because JAX_PLATFORMS=cpu'),
  ({'TPU_WORKER_ID': '0'}, 'jax sees no TPU'),
])
def test_what_was_seen_and_is_not_used_is_said(env, words):
  cluster = find_cluster(env)
  assert (cluster.kind, cluster.processes, words in cluster.found) == ('single', 1, True)


@pytest.mark.parametrize(('text', 'wanted'), [
  ('node001', ['node001']),
  ('a,b-1', ['a', 'b-1']),
  ('gpu[001-003,7],cpu3', ['gpu001', 'gpu002', 'gpu003', 'gpu7', 'cpu3']),
  ('n[8-11]', ['n8', 'n9', 'n10', 'n11']),
  ('rack[1-2]n[09-10]', ['rack1n09', 'rack1n10', 'rack2n09', 'rack2n10']),
  ('gpu[1-2]-ib', ['gpu1-ib', 'gpu2-ib']),
])
def test_lists_of_nodes(text, wanted):
  assert expand_nodes(text) == wanted


@pytest.mark.parametrize('text', ['', 'a[1-2', 'a1-2]', 'a[x]', 'a[3-1]', 'a,,b', 'a[]', 'a[[1]]'])
def test_what_is_no_list_of_nodes(text):
  with pytest.raises(UserError, match='as SLURM writes it'):
    expand_nodes(text)


def test_tasks_of_nodes():
  assert tasks_of_nodes('2(x3),1') == [2, 2, 2, 1] and tasks_of_nodes('8') == [8]


def test_one_process_joins_nobody_and_says_so():
  import jax

  lines = []
  cluster = start_distributed(say=lines.append)
  assert isinstance(cluster, Cluster) and cluster.processes == 1
  assert lines == [f'one process (single: {cluster.found})']
  assert not jax.distributed.is_initialized()
