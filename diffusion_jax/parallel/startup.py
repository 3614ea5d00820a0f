"""What the variables of a launcher say of its processes. Nothing here touches the network.

The variables of SLURM: which task this is, of how many, and where the first one runs.

The processes of a job meet once before jax joins them, so that errors can be told in words.

Start-up of the processes of one job: which there are, and how they meet.
"""

import contextlib
import dataclasses
import errno
import itertools
import os
import re
import socket
import time
from collections.abc import Callable, Mapping, Sequence

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


JOB, NODES = 'SLURM_JOB_ID', 'SLURM_STEP_NODELIST'


def expand_nodes(text: str) -> list[str]:
  """`gpu[001-002,7],cpu3` -> gpu001, gpu002, gpu7, cpu3; brackets may be several in a name.

  Raises:
    UserError: it is not a list of nodes.
  """
  name = r'(?:[^,\[\]\s]|\[[^\[\]]*\])+'  # Commas within brackets do not part names.
  if not re.fullmatch(f'{name}(?:,{name})*', text):
    raise UserError(f'{text!r} is not a list of nodes as SLURM writes it: gpu[001-004,7],cpu3.')
  nodes = []
  for item in re.findall(name, text):
    parts = re.split(r'\[([^\]]*)\]', item)
    choices = [_expand_ranges(part) if i % 2 else [part] for i, part in enumerate(parts)]
    nodes += [''.join(parts) for parts in itertools.product(*choices)]
  return nodes


def _expand_ranges(text: str) -> list[str]:
  """`001-002,7` -> 001, 002, 7."""
  numbers = []
  for piece in text.split(','):
    match = re.fullmatch(r'(\d+)(?:-(\d+))?', piece)
    if not match or int(match[2] or match[1]) < int(match[1]):
      raise UserError(f'[{text}] is not a range of nodes as SLURM writes it: [001-004,7].')
    low, high = match[1], match[2] or match[1]
    numbers += [f'{n:0{len(low)}d}' for n in range(int(low), int(high) + 1)]
  return numbers


def tasks_of_nodes(text: str) -> list[int]:
  """`2(x3),1` -> 2, 2, 2, 1: tasks on each node."""
  counts = []
  for piece in text.split(','):
    match = re.fullmatch(r'(\d+)(?:\(x(\d+)\))?', piece)
    if not match:
      raise UserError(f'{text!r} does not tell the tasks of each node as SLURM does: 2(x3),1.')
    counts += [int(match[1])] * int(match[2] or 1)
  return counts


def slurm(env: Env) -> Cluster | None:
  """A task that srun has started, or one process in an allocation of one task.

  Raises:
    UserError: the job has several tasks or nodes, but srun has not started this process.
  """
  if not env.get(JOB) and not env.get(NODES):
    return None
  if env.get(JOB) and not env.get(NODES):
    return _without_srun(env)
  count = 'SLURM_STEP_NUM_TASKS' if env.get('SLURM_STEP_NUM_TASKS') else 'SLURM_NTASKS'
  names = (JOB, count, 'SLURM_PROCID', 'SLURM_LOCALID', NODES)
  require(env, names, 'the step of SLURM')
  processes, index = place(env, count, 'SLURM_PROCID')
  host = expand_nodes(env[NODES])[0]
  address = f'{host}:{port(env, FIRST_PORT + number(env, JOB) % 2**12)}'
  devices = share_of_devices(env, _tasks_here(env, processes), number(env, 'SLURM_LOCALID'))
  return Cluster('slurm', address, processes, index, devices, quoted(env, names))


def _tasks_here(env: Env, processes: int) -> int:
  """Tasks of this step on this node."""
  text = env.get('SLURM_STEP_TASKS_PER_NODE') or env.get('SLURM_TASKS_PER_NODE')
  nodes = len(expand_nodes(env[NODES]))
  if text and env.get('SLURM_NODEID'):
    counts, node = tasks_of_nodes(text), number(env, 'SLURM_NODEID')
    if node < len(counts):
      return counts[node]
  return -(-processes // nodes)


def _without_srun(env: Env) -> Cluster:
  """In an allocation, but not in a step: also a batch script, where SLURM_PROCID is always 0."""
  names = ('SLURM_NTASKS', 'SLURM_JOB_NUM_NODES')
  seen = quoted(env, (JOB, *names, 'SLURM_PROCID'))
  if any(env.get(name) and number(env, name) > 1 for name in names) or (
    env.get('SLURM_PROCID', '0') != '0'
  ):
    raise UserError(
      f'this is a SLURM job of several tasks ({seen}), but srun has not started this process '
      f'({NODES} is not set); start it with srun, or for one process on purpose set '
      'COORDINATOR_ADDRESS=localhost:1, PROCESS_COUNT=1 and PROCESS_INDEX=0.'
    )
  return single(f'SLURM seen ({seen}), but srun has not started this process')


HELLO = 'diffusion_jax'
GO = b'go\n'


def roll_call(coordinator: str, processes: int, index: int, timeout: float) -> int:
  """Returns once all processes are there; the port is free again when it does.

  Process 0 listens at the coordinator's port, the others tell it their number and wait for its
  word.

  Args:
    coordinator: HOST:PORT of process 0.
    timeout: seconds to wait for the others.

  Returns:
    Seconds that are left of `timeout`.

  Raises:
    UserError: not all came in time, two have the same number, or they count differently.
  """
  host, _, port = coordinator.rpartition(':')
  end = time.monotonic() + timeout
  if index == 0:
    _Host(coordinator, int(port), processes, timeout).wait(end)
  else:
    _answer(host.strip('[]'), int(port), processes, index, timeout)
  return int(end - time.monotonic())


class _Host:
  """Process 0: takes down who has come."""

  def __init__(self, coordinator: str, port: int, processes: int, timeout: float):
    self.coordinator, self.processes, self.timeout = coordinator, processes, timeout
    self.present: dict[int, socket.socket] = {}
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    try:
      self.server = socket.create_server(
        ('', port), family=family, dualstack_ipv6=both, backlog=max(64, processes)
      )
    except OSError as error:
      if error.errno not in (errno.EADDRINUSE, errno.EACCES):
        raise
      raise UserError(
        f'process 0 cannot listen at port {port} ({os.strerror(error.errno)}); choose another by '
        'COORDINATOR_ADDRESS or JAX_COORDINATOR_PORT, or end the program that uses it.'
      ) from error

  def wait(self, end: float) -> None:
    with contextlib.ExitStack() as stack:
      stack.enter_context(self.server)
      try:
        while len(self.present) < self.processes - 1:
          self.server.settimeout(max(0.001, end - time.monotonic()))
          self._admit(stack.enter_context(self.server.accept()[0]))
          self.present = {i: c for i, c in self.present.items() if not _has_left(c)}
      except TimeoutError:
        self._refuse(
          f'process 0 waited {self.timeout:g} s at {self.coordinator}, but {self._missing()} of '
          f'{self.processes} did not come; see what became of them, or give more time by '
          'COORDINATOR_TIMEOUT_SECONDS.'
        )
      for connection in self.present.values():
        with contextlib.suppress(OSError):  # Gone in this moment: jax will miss it.
          connection.sendall(GO)

  def _admit(self, connection: socket.socket) -> None:
    """Enters a process; others who come by, such as a health check, are not counted."""
    connection.settimeout(2)
    try:
      words = connection.recv(200).decode('ascii').split()  # One line, so one packet.
    except (OSError, UnicodeDecodeError):
      return
    if len(words) != 3 or words[0] != HELLO or not (words[1] + words[2]).isdigit():
      return
    processes, index = int(words[1]), int(words[2])
    if processes != self.processes:
      self._refuse(
        f'process {index} was told of {processes} processes and process 0 of {self.processes}; '
        'start all with the same number.', connection
      )
    if index in self.present and not _has_left(self.present[index]):
      self._refuse(f'two processes have the number {index}; give each its own.', connection)
    self.present[index] = connection

  def _missing(self) -> str:
    missing = [str(i) for i in range(1, self.processes) if i not in self.present]
    more = f' and {len(missing) - 8} more' if len(missing) > 8 else ''
    return f'process {", ".join(missing[:8])}{more}'

  def _refuse(self, message: str, *others: socket.socket) -> None:
    for connection in (*self.present.values(), *others):
      with contextlib.suppress(OSError):
        connection.sendall(f'{message}\n'.encode())
    raise UserError(message)


def _has_left(connection: socket.socket) -> bool:
  connection.setblocking(False)
  try:
    return connection.recv(1, socket.MSG_PEEK) == b''
  except BlockingIOError:
    return False
  except OSError:
    return True
  finally:
    connection.settimeout(2)


def _answer(host: str, port: int, processes: int, index: int, timeout: float) -> None:
  """Another process: tells its number until process 0 lets it go on."""
  end, pause, reason = time.monotonic() + timeout, 0.05, 'nobody answers'
  while (left := end - time.monotonic()) > 0:
    try:
      with socket.create_connection((host, port), timeout=min(left, 10)) as connection:
        connection.sendall(f'{HELLO} {processes} {index}\n'.encode())
        # Process 0 speaks last: a little later than it stops to wait, so that its word arrives.
        connection.settimeout(left + 2)
        reply = connection.makefile('rb').readline(2000)
    except OSError as error:
      reason = error.strerror or str(error)
    else:
      if reply == GO:
        return
      text = reply.decode('utf-8', 'replace').strip()
      if text.startswith(('process ', 'two processes ')):
        raise UserError(text)
      reason = 'another program answers there' if reply else 'it hung up'
    time.sleep(min(pause, max(0, end - time.monotonic())))
    pause = min(2, pause * 1.5)
  raise UserError(
    f'process {index} of {processes} could not reach process 0 at {host}:{port} within '
    f'{timeout:g} s ({reason}); see that process 0 runs and that this port of its host is open, '
    'or give more time by COORDINATOR_TIMEOUT_SECONDS.'
  )


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
