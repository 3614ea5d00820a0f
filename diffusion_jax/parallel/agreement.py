"""What several processes decide together, over JAX's coordination service.

No device takes part, so it works from any thread and while programs run on the devices.
"""

import contextlib
import hashlib
import json
from collections import Counter
from collections.abc import Callable
from typing import TypeVar

import jax
import numpy as np
from jax._src import distributed  # No public door leads to the key-value store.

T = TypeVar('T')

TIMEOUT_SECONDS, A_DAY = 1200, 86_400
_rounds: Counter[str] = Counter()


def agree(name: str, value: str, timeout_seconds: float = TIMEOUT_SECONDS) -> list[str]:
  """Every process's value, in the order of processes; the same list on all of them.

  All processes must call it equally often under each name, and from one thread at a time. It waits
  for the slowest; with one process it costs nothing.

  Raises:
    TimeoutError: a process did not come in time.
  """
  count, index = jax.process_count(), jax.process_index()
  if count == 1:
    return [value]
  _rounds[name] += 1
  client = distributed.global_state.client
  keys = [f'diffusion_jax/{name}/{_rounds[name] - back}' for back in (0, 1)]
  get = lambda key: json.loads(client.blocking_key_value_get(key, int(timeout_seconds * 1000)))
  try:
    if index:
      client.key_value_set(f'{keys[0]}/{index}', json.dumps(value))
      return get(f'{keys[0]}/all')
    values = [value, *(get(f'{keys[0]}/{other}') for other in range(1, count))]
    client.key_value_set(f'{keys[0]}/all', json.dumps(values))
  except jax.errors.JaxRuntimeError as error:
    raise TimeoutError(f'processes did not agree on {name}: {error}') from error
  if _rounds[name] > 1:  # Who has come to this round has read the one before.
    client.key_value_delete(f'{keys[1]}/')
  return values


def in_step(
  name: str, function: Callable[[], T], kinds: tuple[type[Exception], ...],
  timeout_seconds: float = TIMEOUT_SECONDS,
) -> T:
  """What function() returns here; where it raises one of `kinds` anywhere, all raise the same."""
  value, mine = None, ''
  try:
    value = function()
  except kinds as error:
    kind = next(kind for kind in kinds if isinstance(error, kind))
    mine = json.dumps([kind.__name__, str(error)])
  for answer in agree(name, mine, timeout_seconds):
    if answer:
      raised, text = json.loads(answer)
      raise next(kind for kind in kinds if kind.__name__ == raised)(text)
  return value


def post(name: str, text: str) -> None:
  """Leaves a text for all processes, without waiting for any; nothing with one process."""
  if jax.process_count() > 1:
    key = f'diffusion_jax/{name}/{hashlib.sha256(text.encode(errors="replace")).hexdigest()}'
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # Posted before, or no one is there.
      distributed.global_state.client.key_value_set(key, json.dumps(text))


def posted(name: str) -> list[str]:
  """What all processes have posted under a name so far."""
  if jax.process_count() == 1:
    return []
  with contextlib.suppress(jax.errors.JaxRuntimeError):
    found = distributed.global_state.client.key_value_dir_get(f'diffusion_jax/{name}/')
    return [json.loads(text) for _, text in found]
  return []


def sum_over_processes(x: np.ndarray) -> np.ndarray:
  """The sum of every process's array; all must call it with equal shapes, none under way elsewhere.

  Unlike `agree` it goes over the devices, for it is made for what is large.
  """
  if jax.process_count() == 1:
    return x
  from jax.experimental import multihost_utils

  return multihost_utils.process_allgather(x).sum(axis=0, dtype=x.dtype)
