"""Where the hours of a run go, over all of its starts: how much of them is training."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

PHASES = ('start', 'compile', 'data', 'step', 'checkpoint', 'evaluation', 'lost', 'down')
"""start: imports, reading, restoring. data: waiting for a batch. lost: work done again, or never,
because a start ended without saving it. down: between one start's last word and the next start."""


class Goodput:
  """Seconds by phase, beginning with 'start'.

  Args:
    clock: seconds, growing.
  """

  def __init__(self, clock: Callable[[], float] = time.monotonic):
    self._totals = dict.fromkeys(PHASES, 0.0)
    self._clock, self._phase, self._since = clock, 'start', clock()

  def goes_on(
    self, saved: dict[str, float] | None, last: dict[str, float] | None, down: float
  ) -> None:
    """Takes over the accounts of the starts before this one.

    Args:
      saved: totals in the checkpoint that this start begins with, None without one.
      last: totals in the last word of the start before. What it did after `saved` is lost.
      down: seconds between that word and this start.
    """
    saved, last = saved or {}, last or {}
    after = sum(last.values()) - sum(saved.values())
    for name, seconds in saved.items():
      self._totals[name] += seconds
    self._totals['lost'] += max(after, 0.0)
    self._totals['down'] += max(down, 0.0)

  def _turn(self, phase: str) -> str:
    now, before = self._clock(), self._phase
    self._totals[before] += now - self._since
    self._phase, self._since = phase, now
    return before

  @contextmanager
  def phase(self, name: str) -> Iterator[None]:
    """Counts what happens within as `name`; of nested phases the inner counts."""
    before = self._turn(name)
    try:
      yield
    finally:
      self._turn(before)

  def enter(self, name: str) -> None:
    """From now on all that has no phase of its own counts as `name`."""
    self._turn(name)

  def totals(self) -> dict[str, float]:
    """Seconds by phase up to now."""
    self._turn(self._phase)
    return {name: round(seconds, 6) for name, seconds in self._totals.items()}

  def seconds(self) -> float:
    """All of them, without the time between starts."""
    totals = self.totals()
    return sum(totals.values()) - totals['down']

  def fraction(self) -> float:
    """Share of the whole that went into steps whose results were kept."""
    totals = self.totals()
    return totals['step'] / max(sum(totals.values()), 1e-9)
