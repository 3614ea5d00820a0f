"""Image files, and others beside them, in a folder and in the folders in it."""

import os
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path

from diffusion_jax.errors import UserError

SUFFIXES = ('.png', '.jpg', '.jpeg', '.webp', '.bmp', '.gif', '.tif', '.tiff')
"""Suffixes of image files."""
_UNPACKED_BY_MACS = '__MACOSX'


class Left:
  """Things that are left out of a data set, by kind: how many, and the first of each."""

  def __init__(self):
    self._kinds: dict[str, tuple[int, str]] = {}

  @classmethod
  def of(cls, found: dict[str, Sequence]) -> 'Left':
    """Those of `found`, as it was kept."""
    left = cls()
    left._kinds = {kind: (count, first) for kind, (count, first) in found.items()}
    return left

  @property
  def found(self) -> dict[str, tuple[int, str]]:
    """How many there are by kind, and the first of each."""
    return dict(self._kinds)

  def add(self, kind: str, example: str | Path = '', count: int = 1) -> None:
    """Count one more of a kind, such as 'rows without a picture', or so many."""
    before, first = self._kinds.get(kind, (0, ''))
    self._kinds[kind] = before + count, first or str(example)

  def counts(self) -> dict[str, int]:
    """Return how many there are by kind."""
    return {kind: count for kind, (count, _) in self._kinds.items()}

  def sentences(self) -> list[str]:
    """Return 'rows without a picture: 3, such as gone.png' for each kind."""
    return [
      f'{kind}: {count:,}' + (f', such as {first}' if first else '')
      for kind, (count, first) in self._kinds.items()
    ]

  def notes(self, root: Path | str) -> tuple[str, ...]:
    """Return a sentence for people, where anything of a folder was left out."""
    found = '; '.join(self.sentences())
    return (f'of {root} not everything is used: {found}.',) if found else ()


def key_of(name: str) -> str:
  """Return a path in one spelling: Macs write other accents, Windows other bars."""
  return unicodedata.normalize('NFC', name.replace('\\', '/'))


def find_files(root: str | Path, left: Left) -> list[Path]:
  """The regular files below `root`, sorted, as paths relative to it; or UserError.

  Links are followed; a folder with several paths is read once, without links where possible. Hidden
  files and broken links are left out.
  """
  root = Path(root)
  if not root.is_dir():
    raise UserError(f'there is no folder {root}; give one of pictures.')
  files: list[Path] = []
  top = os.path.realpath(root)
  folders, links, seen = [root], [], {top}
  while folders or links:
    folder = folders.pop() if folders else links.pop(0)
    if folder.is_symlink() and folder != root:
      real = os.path.realpath(folder)
      if real in seen or Path(real) in Path(top).parents:
        left.add('links to folders that are read already, or above', folder.relative_to(root))
        continue
      seen.add(real)
    for entry in _entries(folder, root, left):
      path = Path(entry.path)
      if entry.is_dir():
        if entry.is_symlink():
          links.append(path)
        elif (real := os.path.realpath(path)) not in seen:
          seen.add(real)
          folders.append(path)
      else:
        files.append(path)
  return sorted(files)


def _entries(folder: Path, root: Path, left: Left) -> Iterator[os.DirEntry]:
  """Folders and regular files that are not hidden, by name."""
  try:
    with os.scandir(folder) as found:
      entries = sorted(found, key=lambda entry: entry.name)
  except OSError:
    left.add('folders that cannot be read', folder.relative_to(root))
    return
  for entry in entries:
    try:
      is_dir, is_file = entry.is_dir(), entry.is_file()
      leads = is_dir or is_file or os.path.exists(entry.path)
    except OSError:  # Such as links in a circle.
      is_dir = is_file = leads = False
    if entry.name.startswith('.') or entry.name == _UNPACKED_BY_MACS:
      kind = 'hidden folders' if is_dir else 'hidden files'
    elif not leads:
      kind = 'links that lead nowhere'
    elif not is_dir and not is_file:
      kind = 'pipes, sockets and devices'
    else:
      yield entry
      continue
    left.add(kind, Path(entry.path).relative_to(root))


def with_suffixes(files: Sequence[Path], suffixes: Sequence[str] = SUFFIXES) -> list[Path]:
  """Return those whose names end so, in capitals or not."""
  return [file for file in files if file.suffix.lower() in suffixes]


TRAIN = ('train', 'training')
TEST = ('test', 'testing', 'validation', 'valid', 'val', 'eval', 'dev')
"""Names of folders that are splits; of several the first in this order is the test."""


def own_splits(pictures: Sequence[Path], root: Path) -> tuple[Path, Path | None]:
  """(training folder, test folder or None) where folders are named so, else (root, None)."""
  tops = {name.parts[0] for name in (path.relative_to(root) for path in pictures)
          if len(name.parts) > 1}
  named = lambda names: next(
    (root / top for name in names for top in sorted(tops) if top.lower() == name), None
  )
  train, test = named(TRAIN), named(TEST)
  if train and test:
    return train, test
  if train and all(path.is_relative_to(train) for path in pictures):
    return train, None
  return root, None
