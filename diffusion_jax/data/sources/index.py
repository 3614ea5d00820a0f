"""What is slow to find out about files, kept as columns of numbers from one start to the next.

Columns lie in a folder of the cache that is named by the files, their sizes and times of change;
they are mapped into memory, so that a start takes as long for a million records as for a thousand.
"""

import contextlib
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from diffusion_jax.config import DataConfig
from diffusion_jax.data.sources.tfds import default_data_dir
from diffusion_jax.data.storage import File
from diffusion_jax.files import atomic_write

VERSION = 2


def kept_in(config: DataConfig) -> Path:
  """The folder of all that is kept."""
  return Path(config.data_dir or default_data_dir()).expanduser() / 'indexes'


class Index:
  """Columns by name; what cannot be kept is made at each start."""

  def __init__(self, kind: str, files: Sequence[File], config: DataConfig):
    stamp = hashlib.sha256(json.dumps([kind, VERSION, files]).encode()).hexdigest()[:32]
    self.folder = kept_in(config) / f'{kind}-{stamp}'
    self._known: dict[str, np.ndarray] = {}

  def __getstate__(self) -> dict[str, Any]:
    return self.__dict__ | {'_known': {}}

  def column(self, name: str, make: Callable[[], np.ndarray]) -> np.ndarray:
    """Return a column, made if it has not been kept."""
    return self.columns((name,), lambda: {name: make()})[name]

  def columns(
    self, names: Sequence[str], make: Callable[[], Mapping[str, np.ndarray]]
  ) -> dict[str, np.ndarray]:
    """Return columns that are made together, unless all of them have been kept."""
    if not all(name in self._known or self._read(name) for name in names):
      made = make()
      self._known |= {name: made[name] for name in names}
      with contextlib.suppress(OSError):  # Nothing can be written there: they stay in memory.
        for name in names:
          with atomic_write(self.folder / f'{name}.npy') as file:
            np.save(file, made[name], allow_pickle=False)
        for name in names:
          self._read(name)
    return {name: self._known[name] for name in names}

  def _read(self, name: str) -> bool:
    with contextlib.suppress(OSError, ValueError, EOFError):
      path = self.folder / f'{name}.npy'
      mode = 'r' if path.stat().st_size > 4096 else None
      self._known[name] = np.load(path, mmap_mode=mode, allow_pickle=False)
      return True
    return False


class Names(Sequence[str]):
  """Texts in two columns: their UTF-8 one after the other, and where each ends."""

  def __init__(self, data: np.ndarray, ends: np.ndarray):
    self.data, self.ends = data, ends

  @classmethod
  def columns(cls, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """(data, ends) of texts."""
    parts = [text.encode(errors='surrogateescape') for text in texts]
    ends = np.cumsum([len(part) for part in parts], dtype=np.int64)
    return np.frombuffer(b''.join(parts), np.uint8), ends

  def __len__(self) -> int:
    return len(self.ends)

  def __getitem__(self, index: int) -> str:
    start = self.ends[index - 1] if index else 0
    return bytes(self.data[start : self.ends[index]]).decode(errors='surrogateescape')
