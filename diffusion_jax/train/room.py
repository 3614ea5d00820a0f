"""The end of a run waits until its last checkpoint and its model are on disk."""

import json
import math
import time
from collections.abc import Callable

from diffusion_jax.io.saving import may_pass, of_storage, reason
from diffusion_jax.parallel.agreement import A_DAY, agree
from diffusion_jax.train.safety import Safety
from diffusion_jax.train.saving import Saver

TRIES = 3


def wait_for_room(
  safety: Safety, saver: Saver, *, save: Callable[[], None], export: Callable[[], None],
  say: Callable[[str], None],
) -> str:
  """Returns '' once both are written, or what is missing when the time for that is up.

  What more room would not mend, such as a file where a folder should be, is tried `TRIES` times.
  All processes must call it together. Each try is said.

  Args:
    save: starts to save the last step, by all processes.
    export: writes the model; does nothing on processes other than 0.

  Raises:
    Stopping: a process was asked to stop meanwhile.
  """
  end = time.monotonic() + (safety.config.room_timeout_seconds or math.inf)
  pause = safety.config.checkpoint_retry_seconds
  exported, tries = False, 0
  while True:
    with safety.watchdog.allow(0, 'checkpoint'):
      saver.wait()
      problem = '' if exported else _tried(export)
      exported = not problem
      # Process 0 alone exports, and its clock decides for all.
      tries += 1
      troubles = list(filter(None, (saver.trouble, problem)))
      over = time.monotonic() > end or (tries >= TRIES and not all(map(may_pass, troubles)))
      missing, over = json.loads(agree('room', json.dumps([' '.join(troubles), over]), A_DAY)[0])
    if not missing or over:
      return missing
    say(f'{missing} Waiting for room; the next try is in {pause:g} s, and a signal ends that.')
    safety.tell('saving', message=missing)
    for _ in range(max(1, math.ceil(pause))):  # As often on all processes.
      time.sleep(min(1.0, pause))
      safety.watchdog.beat()
      safety.stop.settle()
    if saver.trouble:
      save()


def _tried(export: Callable[[], None]) -> str:
  """What keeps the model from being written, '' once it is."""
  try:
    export()
  except Exception as error:
    if not of_storage(error):
      raise
    return f'the model could not be exported ({reason(error)}).'
  return ''
