"""How long the drawing of samples for one evaluation may take."""

import time
from collections.abc import Callable

from diffusion_jax.parallel.processes import agree


class Budget:
  """Seconds for a loop over equal batches, by the clock of the first process.

  The first batch may have to compile its program, which is not counted against it: it counts no
  more than the second. So there are always two batches, if so many are wanted.
  """

  def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic):
    self.seconds, self._clock = seconds, clock
    self._last = clock()
    self._times: list[float] = []

  def over(self) -> bool:
    """Whether one batch more would take too long; after each batch, on all processes alike.

    All processes must ask equally often.
    """
    now = self._clock()
    self._times.append(now - self._last)
    self._last = now
    if not self.seconds or len(self._times) < 2:
      return False
    spent = sum(self._times[1:]) + min(self._times[:2])
    return agree('evaluation', str(spent + self._times[-1] > self.seconds))[0] == 'True'
