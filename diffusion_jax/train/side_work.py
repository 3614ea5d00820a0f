"""Work beside training that only shows: whatever becomes of it, training goes on."""

import dataclasses
import time
from collections.abc import Callable
from typing import Any, TypeVar

import jax

from diffusion_jax.files import first_line
from diffusion_jax.train.health import Stopping

T = TypeVar('T')
RETRY_SECONDS = 60.0
_MOST_KEPT = 12
"""Kept to be tried again; each may hold a picture of some megabytes."""


@dataclasses.dataclass
class _Failure:
  """reason: of the last time. times: in a row. again: the work, None where it is not to be kept."""

  reason: str
  times: int
  again: Callable[[], Any] | None
  due: float


class SideWork:
  """Does what only shows. What fails is named, counted, tried again, and never raises.

  A full disk, one that can only be read, a damaged file and a bug in what draws are all alike here:
  none of them is worth the steps since the last checkpoint.

  Args:
    say: takes a line for people.
  """

  def __init__(self, say: Callable[[str], None], retry_seconds: float = RETRY_SECONDS):
    self.say, self._retry_seconds = say, retry_seconds
    self._failures: dict[str, _Failure] = {}
    self._dropped = 0

  @property
  def errors(self) -> list[str]:
    """A sentence for each work whose last try has failed."""
    found = [
      f'{what}: {failure.reason}' + (f' ({failure.times} times)' if failure.times > 1 else '')
      for what, failure in self._failures.items()
    ]
    return found + ([f'{self._dropped} more were given up'] if self._dropped else [])

  def __call__(
    self, what: str, work: Callable[[], T], otherwise: T | None = None, *, keep: bool = False
  ) -> T | None:
    """What work() returns, `otherwise` where it fails.

    Args:
      what: names it; the error ends when work of this name succeeds.
      keep: try it again later, by `again`.
    """
    try:
      result = work()
    except Stopping:
      raise
    except Exception as error:
      self._failed(what, error, work if keep else None)
      return otherwise
    if self._failures.pop(what, None) is not None:
      self.say(f'{what} has succeeded again.')
    return result

  def together(self, what: str, work: Callable[[], T], otherwise: T | None = None) -> T | None:
    """As a call, for work in which all processes take part.

    With several an error is raised: the others may wait within it for this one.
    """
    return work() if jax.process_count() > 1 else self(what, work, otherwise)

  def _failed(self, what: str, error: Exception, again: Callable[[], Any] | None) -> None:
    before = self._failures.pop(what, None)
    reason = first_line(error)
    self._failures[what] = _Failure(
      reason, before.times + 1 if before else 1, again, time.monotonic() + self._retry_seconds
    )
    if before is None or before.reason != reason:
      later = f'; trying again in {self._retry_seconds:g} s' if again else ''
      self.say(f'{what} failed ({reason}); training goes on without{later}.')
    kept = [name for name, failure in self._failures.items() if failure.again is not None]
    for name in kept[:-_MOST_KEPT]:
      del self._failures[name]
      self._dropped += 1

  def again(self, now: bool = False) -> None:
    """Tries again what has failed and is due; all of it with `now`."""
    if not self._failures:
      return
    for what, failure in list(self._failures.items()):
      if failure.again is not None and (now or time.monotonic() >= failure.due):
        self(what, failure.again, keep=True)
