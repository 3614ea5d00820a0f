"""Files that are whole or not there, whatever ends the process that writes them."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
  """A file that takes the place of `path`, in a folder that is made if need be, once it is left.

  An exception within leaves `path` as it was.
  """
  path.parent.mkdir(parents=True, exist_ok=True)
  temporary = path.with_name(f'.{path.name}.{os.getpid()}.tmp')
  try:
    with temporary.open('wb') as file:
      yield file
    os.replace(temporary, path)
  finally:
    temporary.unlink(missing_ok=True)
