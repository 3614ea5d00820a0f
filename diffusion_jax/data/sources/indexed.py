"""Entries in a few large files, with an index of what is slow to find out about them."""

import abc
import io
import json
import re
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from diffusion_jax.config import DataConfig
from diffusion_jax.data import storage
from diffusion_jax.data.finding import TEST, TRAIN, Left
from diffusion_jax.data.images import read_size
from diffusion_jax.data.sources.entries import Classes, Described, Entries
from diffusion_jax.data.sources.index import Index
from diffusion_jax.data.sources.pictures import PictureSource, train_and_test
from diffusion_jax.data.storage import File
from diffusion_jax.errors import Unreadable

_QUICK = 500
"""As `Entries.quick`, of files far away."""
_WORD = re.compile(r'[A-Za-z]+')


class Indexed(Described):
  """Entries of files; sizes, hashes and labels of all are found out once, and kept.

  left: what of the files is not used.
  """

  def __init__(self, files: Sequence[File], config: DataConfig):
    super().__init__(config)
    self.files, self.left = list(files), Left()
    more = f' and {len(files) - 1:,} more' if len(files) > 1 else ''
    self.where = f'{files[0].path}{more}'
    if storage.is_remote(files[0].path):
      self.quick = _QUICK
    self.index = Index(type(self).__name__.lower(), self.files, config)

  def original_sizes(self, numbers: np.ndarray) -> np.ndarray:
    """(height, width) of upright pictures, int32 [n 2]; 0 0 of what cannot be read."""
    return np.asarray(self.index.column('sizes', self._sizes)[numbers])

  def hashes(self, numbers: np.ndarray) -> np.ndarray:
    """Digests of pictures as they were stored, uint8 [n DIGEST]: of length, start and end."""
    return np.asarray(self.index.column('hashes', self._hashes)[numbers])

  def also_in(self, train: Entries) -> int | None:
    """As of `Entries`; of other files it is kept."""
    if not isinstance(train, Indexed):
      return super().also_in(train)

    def count() -> np.ndarray:
      found = super(Indexed, self).also_in(train)
      return np.array([-1 if found is None else found])

    (found,) = self.index.column(f'also-in-{train.index.folder.name}', count)
    return None if found < 0 else int(found)

  @property
  def labels(self) -> Classes | None:
    """The labels of all; None where none has any."""
    found = self.index.columns(('label_numbers', 'label_names'), self._label_columns)
    names = json.loads(found['label_names'].tobytes())
    return Classes(found['label_numbers'], names) if names else None

  @abc.abstractmethod
  def labels_of_all(self) -> Iterable[str | None]:
    """The label of each, None for none."""

  def _sizes(self) -> np.ndarray:
    return super().original_sizes(np.arange(len(self)))

  def _size(self, index: int) -> tuple[int, int]:
    try:  # Of the picture alone: what is kept is of whatever captions there are.
      return read_size(io.BytesIO(self.read(index)), self.where)
    except Unreadable:
      return 0, 0

  def _hashes(self) -> np.ndarray:
    return self.read_hashes(np.arange(len(self)))

  def _label_columns(self) -> dict[str, np.ndarray]:
    found = Classes.of(self.labels_of_all())
    names = np.frombuffer(json.dumps(found.names).encode(), np.uint8)
    return {'label_numbers': found.numbers, 'label_names': names}


def open_splits(
  config: DataConfig, suffixes: Sequence[str], what: str,
  make: Callable[[Sequence[File], DataConfig], Indexed],
) -> tuple[PictureSource, PictureSource]:
  """(train, test) of 'KIND:PATTERN' of files; those of neither split are left out."""
  pattern = config.dataset.partition(':')[2]
  files, root = storage.find(pattern, suffixes, what), storage.root_of(pattern)
  left, sides = Left(), {}
  for file in files:
    sides.setdefault(split_of(file.path, root), []).append(file)
  train, test = (next((name for name in names if name in sides), '') for names in (TRAIN, TEST))
  if train and test:
    parts = {'train': make(sides.pop(train), config), 'test': make(sides.pop(test), config)}
    for others in sides.values():
      left.add(f'files outside of {train} and {test}', others[0].path, len(others))
  else:
    parts = {'train': make(files, config)}
  for entries in parts.values():
    for kind, (count, first) in entries.left.found.items():
      left.add(kind, first, count)
  return train_and_test(parts, config, notes=left.notes(pattern))


def split_of(path: str, root: str) -> str:
  """'train', 'test', 'validation' or another name of a split, by the folders below `root` and the
  first word of the file's name; '' for none."""
  *folders, name = path.removeprefix(root).strip('/').split('/')
  words = (each.lower() for each in (*reversed(folders), *_WORD.findall(name)[:1]))
  return next((word for word in words if word in (*TRAIN, *TEST)), '')
