"""What the variables of a launcher say of its processes. Nothing here touches the network."""

import dataclasses
import re
from collections.abc import Mapping, Sequence

from diffusion_jax.errors import UserError

Env = Mapping[str, str]
EXPLICIT = ('COORDINATOR_ADDRESS', 'PROCESS_COUNT', 'PROCESS_INDEX')
FIRST_PORT = 65535 - 2**12 + 1
"""Of 4096 ports; which one follows from the number of the job, as in jax itself."""
JOBSET_PORT = 8476


@dataclasses.dataclass(frozen=True)
class Cluster:
  """How this process stands among those of its job.

  kind: explicit, slurm, openmpi, tpu, gke or single.
  coordinator: HOST:PORT at which process 0 listens; empty where none is needed or a TPU knows it.
  processes: how many there are; 0 where only the TPU's own service knows.
  index: which one this is, from 0.
  local_devices: GPUs of this host that are for this process; None for all it sees.
  found: the variables that say so, and what else was seen and why it does not count.
  """

  kind: str
  coordinator: str
  processes: int
  index: int
  local_devices: tuple[int, ...] | None
  found: str


def single(found: str) -> Cluster:
  """One process, because of what is `found`."""
  return Cluster('single', '', 1, 0, None, found)


def quoted(env: Env, names: Sequence[str]) -> str:
  """`A=1, B=2` of those that are set."""
  return ', '.join(f'{name}={env[name]}' for name in names if env.get(name))


def require(env: Env, names: Sequence[str], what: str) -> None:
  """Raises UserError unless all are set."""
  if missing := [name for name in names if not env.get(name)]:
    raise UserError(
      f'{what} is only half there: {quoted(env, names)} is set, but not {", ".join(missing)}; '
      f'set {"it" if len(missing) == 1 else "them"} too, or none of {", ".join(names)}.'
    )


def number(env: Env, name: str, least: int = 0) -> int:
  """The value of a variable as a whole number of at least `least`."""
  text = env.get(name, '')
  if not re.fullmatch(r'[0-9]+', text) or int(text) < least:
    raise UserError(f'{name} is {text!r}; it must be a whole number of at least {least}.')
  return int(text)


def place(env: Env, count: str, index: str) -> tuple[int, int]:
  """(processes, index) of two variables that must fit each other."""
  processes, own = number(env, count, 1), number(env, index)
  if own >= processes:
    raise UserError(f'{index}={own} does not fit {count}={processes}; it counts from 0.')
  return processes, own


def port(env: Env, default: int) -> int:
  """JAX_COORDINATOR_PORT, where it is set, before what the launcher implies."""
  return number(env, 'JAX_COORDINATOR_PORT', 1) if env.get('JAX_COORDINATOR_PORT') else default


def share_of_devices(env: Env, tasks: int, local: int) -> tuple[int, ...] | None:
  """GPUs for task `local` of the `tasks` on this host; None for all that it sees."""
  bound = env.get('SLURM_GPUS_PER_TASK') or env.get('SLURM_GPU_BIND')
  if tasks == 1 or bound:
    return None
  if visible := env.get('CUDA_VISIBLE_DEVICES'):
    count = len(visible.split(','))
    if count < tasks:  # The launcher has shown each task only its own.
      return None
  elif env.get('SLURM_GPUS_ON_NODE'):
    count = number(env, 'SLURM_GPUS_ON_NODE', 1)
  else:
    count = tasks
  if count % tasks:
    raise UserError(
      f'{count} GPUs cannot be divided among {tasks} tasks on this host; start one task for each '
      'GPU, or one for each host.'
    )
  each = count // tasks
  return tuple(range(local * each, (local + 1) * each))


def explicit(env: Env) -> Cluster | None:
  """COORDINATOR_ADDRESS, PROCESS_COUNT and PROCESS_INDEX."""
  if not any(env.get(name) for name in EXPLICIT):
    return None
  require(env, EXPLICIT, 'the address of the processes')
  processes, index = place(env, 'PROCESS_COUNT', 'PROCESS_INDEX')
  address = env['COORDINATOR_ADDRESS']
  if not re.fullmatch(r'.+:[0-9]+', address):
    raise UserError(f'COORDINATOR_ADDRESS is {address!r}; give HOST:PORT.')
  return Cluster('explicit', address, processes, index, None, quoted(env, EXPLICIT))


def open_mpi(env: Env) -> Cluster | None:
  """mpirun of Open MPI; process 0 must run on the host of mpirun, as it does by default."""
  names = ('OMPI_COMM_WORLD_SIZE', 'OMPI_COMM_WORLD_RANK')
  if not any(env.get(name) for name in names):
    return None
  require(env, names, 'Open MPI')
  processes, index = place(env, *names)
  local = ('OMPI_COMM_WORLD_LOCAL_SIZE', 'OMPI_COMM_WORLD_LOCAL_RANK')
  devices = None
  if any(env.get(name) for name in local):
    require(env, local, 'Open MPI')
    devices = share_of_devices(env, *place(env, *local))
  address = '' if processes == 1 else _launcher_of_open_mpi(env)
  return Cluster('openmpi', address, processes, index, devices, quoted(env, names))


def _launcher_of_open_mpi(env: Env) -> str:
  """HOST:PORT from a value such as `1314521088.0;tcp://10.0.0.1,10.1.0.1:34911`."""
  uri = env.get('OMPI_MCA_orte_hnp_uri', '')
  match = re.match(r'(\d+)\.\d+;tcp6?://(?:\[([^\],]+)|([^,:\[]+))', uri)
  if not match:
    raise UserError(
      f'Open MPI does not tell where mpirun runs (OMPI_MCA_orte_hnp_uri is {uri!r}; version 5 no '
      'longer sets it); set COORDINATOR_ADDRESS=HOST:PORT, PROCESS_COUNT=$OMPI_COMM_WORLD_SIZE and '
      'PROCESS_INDEX=$OMPI_COMM_WORLD_RANK in each process.'
    )
  job, v6, v4 = match.groups()
  # Jobs of Open MPI are numbered in steps of 2^12.
  return f'{f"[{v6}]" if v6 else v4}:{port(env, FIRST_PORT + int(job) // 2**12 % 2**12)}'


def kubernetes(env: Env) -> Cluster | None:
  """An indexed Job of a JobSet, whose template says NNODES, as launch/jobset.yaml does."""
  if not env.get('KUBERNETES_SERVICE_HOST'):
    return None
  names = ('JOBSET_NAME', 'REPLICATED_JOB_NAME', 'JOB_COMPLETION_INDEX', 'NNODES')
  if not any(env.get(name) for name in names[:3]):
    return single('a pod (KUBERNETES_SERVICE_HOST) that no JobSet has started')
  require(env, names, 'the JobSet')
  processes, index = place(env, 'NNODES', 'JOB_COMPLETION_INDEX')
  host = '{0}-{1}-0-0.{0}'.format(env['JOBSET_NAME'], env['REPLICATED_JOB_NAME'])
  address = f'{host}:{port(env, JOBSET_PORT)}'
  return Cluster('gke', address, processes, index, None, quoted(env, names))


def tpu(env: Env) -> Cluster | None:
  """TPU hosts. jax itself joins them; what can be known without the network is given here."""
  names = ('TPU_PROCESS_ADDRESSES', 'TPU_WORKER_HOSTNAMES', 'TPU_WORKER_ID', 'TPU_ML_PLATFORM',
           'MEGASCALE_COORDINATOR_ADDRESS', 'MEGASCALE_NUM_SLICES', 'MEGASCALE_SLICE_ID')
  if not any(env.get(name) for name in names):
    return None
  found, platforms = quoted(env, names), env.get('JAX_PLATFORMS', '')
  if platforms and 'tpu' not in platforms.split(','):
    return single(f'TPU seen ({found}), not used because JAX_PLATFORMS={platforms}')
  hosts = (env.get('TPU_PROCESS_ADDRESSES') or env.get('TPU_WORKER_HOSTNAMES') or '').split(',')
  if hosts == ['']:
    return _tpu_without_hosts(env, found)
  if any(env.get(name) for name in names[-3:]):
    require(env, names[-3:], 'the set of TPU slices')
    slices, piece = place(env, 'MEGASCALE_NUM_SLICES', 'MEGASCALE_SLICE_ID')
  else:
    slices, piece = 1, 0
  worker = 0
  if len(hosts) > 1:
    if not env.get('TPU_WORKER_ID'):
      raise UserError(f'TPU_WORKER_ID is missing beside {found}; set it to this host\'s number.')
    worker = number(env, 'TPU_WORKER_ID')
    if worker >= len(hosts):
      raise UserError(f'TPU_WORKER_ID={worker} does not fit the {len(hosts)} hosts in {found}.')
  kind = 'gke' if env.get('KUBERNETES_SERVICE_HOST') else 'tpu'
  return Cluster(kind, '', slices * len(hosts), piece * len(hosts) + worker, None, found)


def _tpu_without_hosts(env: Env, found: str) -> Cluster:
  if not env.get('TPU_ML_PLATFORM'):  # jax sets it when it is imported and sees chips and libtpu.
    return single(f'TPU variables seen ({found}), but jax sees no TPU')
  if env.get('TPU_SKIP_MDS_QUERY'):
    return single(f'a TPU ({found}), alone because TPU_SKIP_MDS_QUERY is set')
  return Cluster('tpu', '', 0, 0, None, f'{found}; the hosts are known to the metadata server')
