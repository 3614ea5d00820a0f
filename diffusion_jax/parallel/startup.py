"""Start-up of the processes of one job: which there are, and how they meet.

`jax.distributed.initialize` finds the hosts of TPUs, SLURM and Open MPI. Read here is the rest:
three variables of our own, the process's number before jax is imported, and the division of a
host's GPUs among tasks (jax gives one to each, even to a single task).
"""

import contextlib
import dataclasses
import importlib.util
import os
import re
import socket
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from diffusion_jax.errors import UserError

Env = Mapping[str, str]
EXPLICIT = ('COORDINATOR_ADDRESS', 'PROCESS_COUNT', 'PROCESS_INDEX')
JOBSET = ('JOBSET_NAME', 'REPLICATED_JOB_NAME', 'NNODES', 'JOB_COMPLETION_INDEX')
SLURM = ('SLURM_JOB_ID', 'SLURM_STEP_NODELIST', 'SLURM_NTASKS', 'SLURM_PROCID', 'SLURM_LOCALID')
OPEN_MPI = ('OMPI_COMM_WORLD_SIZE', 'OMPI_COMM_WORLD_RANK')
TPU = ('TPU_WORKER_HOSTNAMES', 'TPU_PROCESS_ADDRESSES', 'TPU_WORKER_ID', 'TPU_ML_PLATFORM',
       'MEGASCALE_COORDINATOR_ADDRESS')
NOT_ALONE = {
  'SLURM_NTASKS': 'SLURM, but srun has not started this process: start it with srun',
  'SLURM_JOB_NUM_NODES': 'SLURM, but srun has not started this process: start it with srun',
  'PMI_SIZE': 'MPICH or Intel MPI, whose variables are not read',
  'WORLD_SIZE': 'torchrun, whose variables are not read',
  'JAX_COORDINATOR_ADDRESS': 'jax.distributed, whose variables are not read',
}
"""Variables above 1 where several processes have begun that would not know each other."""
NAMES = {'ompi': 'Open MPI', 'slurm': 'SLURM', 'tpu': 'TPU', 'gke': 'GKE'}
PCI_DEVICES = Path('/sys/bus/pci/devices')
GOOGLE, NETWORK_OR_STORAGE = '0x1ae0', ('0x01', '0x02')
"""A vendor of PCI devices, and beginnings of the classes of those of it that are no TPU."""


@dataclasses.dataclass(frozen=True)
class Cluster:
  """The place of this process in its job.

  kind: explicit, slurm, ompi, tpu, gke or single. processes: 0 where only the TPU's service knows.
  coordinator: HOST:PORT of process 0, '' where jax finds it. local_devices: this process's GPUs of
  the host, () for all visible. found: the variables that say so.
  """

  kind: str
  processes: int = 1
  index: int = 0
  coordinator: str = ''
  local_devices: Sequence[int] = ()
  found: str = 'nothing in the environment names a cluster'


def find_cluster(env: Env = os.environ) -> Cluster:
  """The place that the environment gives this process, without heavy imports.

  Explicit variables come first, mpirun before SLURM, in which it may run. UserError where variables
  are missing or make no sense.
  """
  if any(map(env.get, EXPLICIT)):
    processes, index = _place(env, EXPLICIT, *EXPLICIT[1:])
    address = env['COORDINATOR_ADDRESS']
    if not re.fullmatch(r'.+:[0-9]+', address):
      raise UserError(f'COORDINATOR_ADDRESS is {address!r}; give HOST:PORT.')
    return Cluster('explicit', processes, index, address, found=_quoted(env, EXPLICIT))
  if any(map(env.get, OPEN_MPI)):
    processes, index = _place(env, OPEN_MPI, *OPEN_MPI)
    local = ('OMPI_COMM_WORLD_LOCAL_SIZE', 'OMPI_COMM_WORLD_LOCAL_RANK')
    devices = _own_devices(env, *_place(env, local, *local)) if env.get(local[0]) else ()
    return Cluster('ompi', processes, index, '', devices, _quoted(env, OPEN_MPI))
  if (found := _quoted(env, TPU)) or 'tpu' in env.get('JAX_PLATFORMS', ''):
    return _tpu(env, found)
  if env.get('SLURM_STEP_NODELIST'):
    processes, index = _place(env, SLURM, *SLURM[2:4])
    devices = _own_devices(env, _tasks_here(env), _number(env, 'SLURM_LOCALID'))
    return Cluster('slurm', processes, index, '', devices, _quoted(env, SLURM))
  if env.get('JOBSET_NAME'):
    processes, index = _place(env, JOBSET, *JOBSET[2:])
    host = '{0}-{1}-0-0.{0}'.format(env['JOBSET_NAME'], env['REPLICATED_JOB_NAME'])
    address = f'{host}:{env.get("JAX_COORDINATOR_PORT") or 8476}'
    return Cluster('gke', processes, index, address, found=_quoted(env, JOBSET))
  for name, launcher in NOT_ALONE.items():
    if env.get(name, '1') != '1':
      raise UserError(
        f'{name}={env[name]} is set by {launcher}; or set {", ".join(EXPLICIT)} for each process '
        f'(localhost:1, 1 and 0 for one alone), or unset {name}.'
      )
  # A TPU VM says nothing before jax is imported; where jax sees no TPU, it sets TPU_SKIP_MDS_QUERY.
  if not env.get('JAX_PLATFORMS') and not env.get('TPU_SKIP_MDS_QUERY') and _has_tpu(env):
    return Cluster('tpu', 0, found='a TPU on the PCI bus')
  return Cluster('single')


def _has_tpu(env: Env) -> bool:
  """Tell whether jax will use a TPU of this host: a device of Google's, and libtpu to drive it."""
  if not env.get('TPU_LIBRARY_PATH') and importlib.util.find_spec('libtpu') is None:
    return False
  read = lambda path: path.read_text(encoding='ascii').strip()
  with contextlib.suppress(OSError):
    for vendor in PCI_DEVICES.glob('*/vendor'):
      kind = read(vendor.with_name('class'))
      if read(vendor) == GOOGLE and not kind.startswith(NETWORK_OR_STORAGE):
        return True
  return False


def _tpu(env: Env, found: str) -> Cluster:
  platforms = env.get('JAX_PLATFORMS', '')
  if platforms and 'tpu' not in platforms:
    return Cluster('single', found=f'{found}, not used because JAX_PLATFORMS={platforms}')
  hosts = env.get('TPU_PROCESS_ADDRESSES') or env.get('TPU_WORKER_HOSTNAMES') or ''
  alone = env.get('TPU_SKIP_MDS_QUERY') if not hosts else (
    ',' not in hosts and not env.get('MEGASCALE_COORDINATOR_ADDRESS')
  )
  return Cluster('tpu', 1 if alone else 0, found=found or f'JAX_PLATFORMS={platforms}')


def _quoted(env: Env, names: Sequence[str]) -> str:
  return ', '.join(f'{name}={env[name]}' for name in names if env.get(name))


def _number(env: Env, name: str, least: int = 0) -> int:
  text = env.get(name, '')
  if not text.isdecimal() or int(text) < least:
    raise UserError(f'{name} is {text!r}; it must be a whole number of at least {least}.')
  return int(text)


def _place(env: Env, names: Sequence[str], count: str, index: str) -> tuple[int, int]:
  """Return (processes, index), once all of `names` are known to be set."""
  if missing := [name for name in names if not env.get(name)]:
    raise UserError(
      f'{_quoted(env, names)} is set, but not {", ".join(missing)}; set all of '
      f'{", ".join(names)}, or none.'
    )
  processes, own = _number(env, count, 1), _number(env, index)
  if own >= processes:
    raise UserError(f'{index}={own} does not fit {count}={processes}; it counts from 0.')
  return processes, own


def _tasks_here(env: Env) -> int:
  """Return the number of tasks on this node, out of a text such as `2(x3),1`."""
  text = env.get('SLURM_STEP_TASKS_PER_NODE') or env.get('SLURM_TASKS_PER_NODE') or '1'
  counts = []
  for number, times in re.findall(r'(\d+)(?:\(x(\d+)\))?', text):
    counts += [int(number)] * int(times or 1)
  return (counts or [1])[min(int(env.get('SLURM_NODEID') or 0), len(counts) - 1)]


def _own_devices(env: Env, tasks: int, local: int) -> Sequence[int]:
  """Return the GPUs of task `local` of the `tasks` on this host, () for all that it sees."""
  bound = env.get('SLURM_GPUS_PER_TASK') or env.get('SLURM_GPU_BIND')
  visible = env.get('CUDA_VISIBLE_DEVICES', '').split(',')
  # A launcher may have shown each task only its own.
  if tasks == 1 or bound or (visible != [''] and len(visible) < tasks):
    return ()
  count = int(env.get('SLURM_GPUS_ON_NODE') or tasks) if visible == [''] else len(visible)
  if count % tasks:
    raise UserError(
      f'{count} GPUs cannot be divided among {tasks} tasks on this host; start one task for each '
      'GPU, or one for each host.'
    )
  each = count // tasks
  return range(local * each, (local + 1) * each)


def start_distributed(heartbeat_seconds: int = 100, say: Callable[[str], None] = print) -> Cluster:
  """Find and join the other processes before any device is used, and report it in one line.

  A single or already joined process changes nothing. heartbeat_seconds: silence after which a
  process counts as dead. UserError: as `find_cluster`, or no meeting within
  COORDINATOR_TIMEOUT_SECONDS (300).
  """
  import jax  # Here, for `find_cluster` comes before anything heavy is imported.

  cluster = find_cluster()
  if jax.distributed.is_initialized():
    return cluster
  name = NAMES.get(cluster.kind, cluster.kind)
  if cluster.processes == 1:
    say(f'one process ({name}: {cluster.found})')
    return cluster
  place = f'process {cluster.index} of {cluster.processes}'
  say(f'{place if cluster.processes else "one of all processes"} ({name}: {cluster.found})')
  known = {} if not cluster.processes else {
    'num_processes': cluster.processes, 'process_id': cluster.index,
    'local_device_ids': list(cluster.local_devices),
    'cluster_detection_method': 'deactivate' if cluster.coordinator else cluster.kind,
  }
  timeout = 'COORDINATOR_TIMEOUT_SECONDS'
  timeout = _number({timeout: '300', **os.environ}, timeout, 1)
  _join(timeout, coordinator_address=cluster.coordinator or None,
        heartbeat_timeout_seconds=heartbeat_seconds, **known)
  return dataclasses.replace(cluster, processes=jax.process_count(), index=jax.process_index())


def _join(timeout: int, **known: Any) -> None:
  """Call `jax.distributed.initialize`, within `timeout` seconds, or raise UserError.

  In a thread: without peers jaxlib ends the process by SIGABRT, without a message.
  """
  import jax

  # jaxlib's handler of SIGTERM would take the place of ours, which also knows Ctrl-C.
  jax.config.update('jax_enable_preemption_service', False)
  where = known['coordinator_address'] or 'the coordinator that jax has found'
  if known['coordinator_address'] and not known['process_id']:
    try:  # Else jaxlib fails, too, and now and then crashes when the process ends.
      socket.create_server(('', int(where.rpartition(':')[2]))).close()
    except OSError as error:
      raise UserError(
        f'process 0 cannot listen at {where} ({error.strerror}); choose another port by '
        'COORDINATOR_ADDRESS or JAX_COORDINATOR_PORT, or end the program that uses it.'
      ) from error
  failed = []

  def initialize() -> None:
    try:
      jax.distributed.initialize(initialization_timeout=timeout + 60, **known)
    except Exception as error:  # Of many kinds: of sockets, of variables, of services of TPUs.
      failed.append(error)

  thread = threading.Thread(target=initialize, name='join', daemon=True)
  thread.start()
  thread.join(timeout)
  if thread.is_alive():
    raise UserError(
      f'not all processes have met at {where} within {timeout} s; see what became of the others '
      'and that this port of the host of process 0 is open, or give more time by '
      'COORDINATOR_TIMEOUT_SECONDS.'
    )
  if failed:
    raise UserError(
      f'this process could not join the others at {where} ({failed[0]}); where jax does not know '
      f'the cluster set {", ".join(EXPLICIT)} for each process.'
    ) from failed[0]
