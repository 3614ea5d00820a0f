"""The variables of SLURM: which task this is, of how many, and where the first one runs."""

import itertools
import re

from diffusion_jax.errors import UserError
from diffusion_jax.parallel.clusters import (
  FIRST_PORT,
  Cluster,
  Env,
  number,
  place,
  port,
  quoted,
  require,
  share_of_devices,
  single,
)

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
