"""Start-up of the processes of one job: which there are, and how they meet."""

import dataclasses
import os
from collections.abc import Callable, Mapping

from diffusion_jax.errors import UserError
from diffusion_jax.parallel.clusters import (
  EXPLICIT,
  Cluster,
  explicit,
  kubernetes,
  number,
  open_mpi,
  single,
  tpu,
)
from diffusion_jax.parallel.roll_call import roll_call
from diffusion_jax.parallel.slurm import slurm

NAMES = {
  'explicit': 'explicit', 'slurm': 'SLURM', 'openmpi': 'Open MPI', 'tpu': 'TPU', 'gke': 'GKE',
}
MARKS = {
  'SLURM': ('SLURM_JOB_ID',), 'Open MPI': ('OMPI_COMM_WORLD_SIZE',), 'GKE': ('JOBSET_NAME',),
  'TPU': ('TPU_WORKER_HOSTNAMES', 'TPU_PROCESS_ADDRESSES', 'TPU_ML_PLATFORM'),
}
"""Variables that show each cluster, whether it is used or not."""
UNKNOWN = {
  'PMI_SIZE': 'MPICH or Intel MPI', 'WORLD_SIZE': 'torchrun',
  'JAX_COORDINATOR_ADDRESS': 'jax.distributed',
}
"""Variables of launchers that are not read. Not to know them is not to be alone."""


def find_cluster(env: Mapping[str, str] = os.environ) -> Cluster:
  """What the environment says of this process and its peers. Reads nothing else.

  The three explicit variables win over all. mpirun is nearer to its processes than the allocation
  of SLURM that it may run in. Any others must agree.

  Raises:
    UserError: some variables of a cluster are set and others not, or two clusters disagree.
  """
  if cluster := explicit(env):
    return _beside(cluster, env, 'the explicit variables win')
  if cluster := open_mpi(env):
    return _beside(cluster, env, 'mpirun has started this process')
  # GKE tells the hosts of TPUs by the variables of TPUs, beside those of every indexed job.
  pods = tpu(env) or kubernetes(env)
  found = [cluster for cluster in (slurm(env), pods) if cluster]
  several = [cluster for cluster in found if cluster.kind != 'single']
  for other in several[1:]:
    _check_agreement(several[0], other)
  if several:
    return _beside(several[0], env, 'it does not disagree')
  for name, launcher in UNKNOWN.items():
    if env.get(name, '1') != '1':
      raise UserError(
        f'{name}={env[name]} is set, by {launcher}, whose variables are not read; set '
        f'{", ".join(EXPLICIT)} for each process, or unset {name} if this process is alone.'
      )
  return single('; '.join(cluster.found for cluster in found) or
                'nothing in the environment names a cluster')


def start_distributed(
  heartbeat_seconds: int = 100, say: Callable[[str], None] = print
) -> Cluster:
  """Finds the other processes, says so in one line, and joins them.

  Must run before anything else uses a device. A single process joins nobody. Does nothing but
  find where the processes have been joined already.

  Args:
    heartbeat_seconds: without a sign of life for so long, a process counts as dead.
    say: takes the line.

  Raises:
    UserError: see `find_cluster`; or the processes did not meet within
      COORDINATOR_TIMEOUT_SECONDS (300).
  """
  import jax  # Here, for `find_cluster` comes before anything heavy is imported.

  cluster = find_cluster()
  if jax.distributed.is_initialized():
    return cluster
  name = NAMES.get(cluster.kind, 'single')
  if cluster.processes == 1:
    say(f'one process ({name}: {cluster.found})')
    return cluster
  timeout = 300
  if os.environ.get('COORDINATOR_TIMEOUT_SECONDS'):
    timeout = number(os.environ, 'COORDINATOR_TIMEOUT_SECONDS', 1)
  if not cluster.coordinator:
    return _join_tpu(cluster, heartbeat_seconds, timeout, say)
  say(f'process {cluster.index} of {cluster.processes} ({name}: {cluster.found}), '
      f'coordinator {cluster.coordinator}')
  # Where peers do not come, jaxlib ends the process with SIGABRT: too late for a word of ours.
  left = roll_call(cluster.coordinator, cluster.processes, cluster.index, timeout)
  jax.distributed.initialize(
    cluster.coordinator, cluster.processes, cluster.index, cluster.local_devices,
    # Otherwise jax looks for a cluster of its own where local_devices is None, and takes one GPU.
    cluster_detection_method='deactivate', initialization_timeout=max(60, left),
    heartbeat_timeout_seconds=heartbeat_seconds,
  )
  return cluster


def _join_tpu(cluster: Cluster, heartbeat: int, timeout: int, say) -> Cluster:
  """TPU hosts are joined by jax's own detection, which asks the TPU's services."""
  import jax

  say(f'a process of {cluster.processes or "all"} ({NAMES[cluster.kind]}: {cluster.found}), '
      'joined by jax itself')
  try:
    jax.distributed.initialize(
      initialization_timeout=timeout, heartbeat_timeout_seconds=heartbeat
    )
  except (OSError, RuntimeError, ValueError) as error:
    raise UserError(
      f'jax could not join the TPU hosts ({error}); see that jax[tpu] is installed and that this '
      f'is a TPU host, or set {", ".join(EXPLICIT)}.'
    ) from error
  return dataclasses.replace(
    cluster, processes=jax.process_count(), index=jax.process_index()
  )


def _beside(cluster: Cluster, env: Mapping[str, str], why: str) -> Cluster:
  """The cluster, with a word on others that are seen too."""
  own = {NAMES[cluster.kind]} | ({'TPU', 'GKE'} if cluster.kind in ('tpu', 'gke') else set())
  seen = [name for name, marks in MARKS.items() if name not in own and any(map(env.get, marks))]
  if not seen:
    return cluster
  return dataclasses.replace(
    cluster, found=f'{cluster.found}; {" and ".join(seen)} seen too, not used: {why}'
  )


def _check_agreement(one: Cluster, other: Cluster) -> None:
  places = [(c.processes, c.index) for c in (one, other)]
  if 0 in (one.processes, other.processes) or places[0] == places[1]:
    return
  texts = [f'{NAMES[c.kind]} says process {c.index} of {c.processes} ({c.found})'
           for c in (one, other)]
  raise UserError(
    f'two clusters disagree: {" and ".join(texts)}; set {", ".join(EXPLICIT)}, which win over both.'
  )
