"""What was made last, kept up to a size."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any

_LOCKS = 64


class Kept:
  """Values by key of at most so much together, of which the one used last stays in any case.

  Threads that ask for the same one wait for it to be made once. `make` must ask for nothing of the
  same object. size: gives how much a value is.
  """

  def __init__(self, most: int, size: Callable[[Any], int]):
    self._most, self._size, self._sum = most, size, 0
    self._values: OrderedDict[Hashable, Any] = OrderedDict()
    self._lock = threading.Lock()
    self._making = [threading.Lock() for _ in range(_LOCKS)]

  def __call__(self, key: Hashable, make: Callable[[], Any]) -> Any:
    """The value of a key, made if it is not kept."""
    with self._making[hash(key) % _LOCKS]:
      with self._lock:
        if key in self._values:
          self._values.move_to_end(key)
          return self._values[key]
      value = make()
      with self._lock:
        self._values[key] = value
        self._sum += self._size(value)
        while self._sum > self._most and len(self._values) > 1:
          self._sum -= self._size(self._values.popitem(last=False)[1])
      return value
