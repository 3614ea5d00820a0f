"""Exceptions that are meant for a person rather than for a stack trace."""

from typing import Any

MOST_LETTERS = 4000
"""Of a sentence; names from files may have any number."""


class UserError(Exception):
  """A mistake in the user's input: config, path, data, checkpoint, prompt.

  The message is one sentence that names the thing and the remedy; the command line prints it
  without a stack trace and exits with code 2. Unprintable characters, as in file names, are
  escaped.
  """

  def __init__(self, message: str):
    text = str(message)
    if len(text) > MOST_LETTERS:
      text = f'{text[: MOST_LETTERS // 2]} ... {text[-MOST_LETTERS // 2 :]}'
    super().__init__(''.join(c if c.isprintable() else ascii(c)[1:-1] for c in text))


class Unreadable(UserError):
  """A picture, or another record of a data set, that cannot be read; others of the set may be.

  cause: what is wrong with it, in a few words that are the same for all of which it is true.
  """

  def __init__(self, message: str, cause: str = 'damaged'):
    super().__init__(message)
    self.cause = cause

  def __reduce__(self) -> tuple:  # Or the cause would be lost on the way from another process.
    return type(self), (str(self), self.cause)


class Diverged(RuntimeError):
  """The loss or the gradient was not finite in too many steps in a row."""


def require(condition: bool, message: str) -> None:
  """Raise UserError(message) unless `condition` holds."""
  if not condition:
    raise UserError(message)


def shown(value: Any) -> str:
  """Return a value as it is written, cut where it is long, for a sentence; paths are whole."""
  most, long = (160, 170) if isinstance(value, str) else (20, 80)
  text = repr(value[:most] if isinstance(value, (str, list, tuple)) else value)
  cut = len(text) > long or (isinstance(value, (str, list, tuple)) and len(value) > most)
  return f'{text[:long]}...' if cut else text
