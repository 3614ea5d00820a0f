"""A source around another one."""

from collections.abc import Sequence
from typing import Any


class Wrapped(Sequence):
  """What a subclass does not say is the source's, its length and optional attributes, too."""

  def __init__(self, source: Any):
    self.source = source

  def __getattr__(self, name: str) -> Any:
    if name == 'source':  # Not set yet, such as while it is copied.
      raise AttributeError(name)
    return getattr(self.source, name)

  def __len__(self) -> int:
    return len(self.source)
