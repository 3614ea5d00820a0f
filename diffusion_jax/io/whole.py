"""Files that are whole or not there, whatever ends the process that writes them."""

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


@contextlib.contextmanager
def replacing(path: Path, *, flushed: bool = False) -> Iterator[BinaryIO]:
  """A file that takes the place of `path`, in a folder that is made if need be, once it is left.

  An exception within leaves `path` as it was. Several may write it at once: the last one counts.

  Args:
    flushed: whether it must be on the disk first, so that it is whole also after a loss of power.
  """
  path.parent.mkdir(parents=True, exist_ok=True)
  # Not by the process's number, which containers that share a folder have in common.
  temporary = path.with_name(f'.{path.name}.{secrets.token_hex(4)}.tmp')
  try:
    with temporary.open('wb') as file:
      yield file
      if flushed:
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
  finally:
    temporary.unlink(missing_ok=True)
