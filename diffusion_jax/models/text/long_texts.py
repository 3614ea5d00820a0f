"""Texts that are longer than a model reads: bounded before any work, counted and said."""

import threading
from collections.abc import Callable

import jax

CHARACTERS = 256
"""Of a text, so many are read for each token that a model has room for: English has 4 a token."""


def _say(text: str) -> None:
  if jax.process_index() == 0:
    print(text)


class Cut:
  """Counts the different texts of which tokens were left out, and says so.

  It speaks, in the first process alone, after the first, the tenth, the hundredth ..., so that a
  set of millions says it a few times. Several threads may count.

  Args:
    reader: what reads them, as people call it.
  """

  def __init__(self, say: Callable[[str], None] = _say, reader: str = 'the model'):
    self._say, self._reader, self._lock = say, reader, threading.Lock()
    self._known: set[int] = set()
    self._tokens, self._next = 0, 1

  def count(self, texts: list[tuple[str, int]], room: int) -> None:
    """Takes note of texts, each with the tokens that were left out of what was looked at.

    Args:
      room: tokens of a text that are read.
    """
    with self._lock:
      for text, over in texts:
        if hash(text) not in self._known:
          self._known.add(hash(text))
          self._tokens += over
      if len(self._known) < self._next:
        return
      self._next = 10 ** len(str(len(self._known)))
      many = len(self._known)
      self._say(
        f'note: {many:,} text{"s" * (many > 1)} so far, such as {shortened(texts[0][0])!r}, '
        f'{"are" if many > 1 else "is"} longer than the {room} tokens that {self._reader} '
        f'reads; at least {self._tokens:,} tokens are left out.'
      )


def shortened(text: str, length: int = 60) -> str:
  """The text, or its beginning and three points."""
  return text if len(text) <= length else text[: length - 3] + '...'
