"""Pictures in folders by class: PATH/cat/1.png, PATH/dog/1.png.

With folders train/ and test/ inside, each is a split that holds one folder for each class.
Otherwise every tenth picture of each class, by name, is left to the test split.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import SupportsIndex

from diffusion_jax.data.folder import FOLDER, SUFFIXES, pictures
from diffusion_jax.data.images import read_image
from diffusion_jax.errors import UserError

EVERY = 10
"""One in so many pictures of a class is for the test, where there are no folders that say it."""


def open_labelled(dataset: str, size: int) -> tuple['LabelledFolder', 'LabelledFolder']:
  """(train, test) of 'folder:PATH', pictures of size x size pixels.

  Raises:
    UserError: no such folder, or a split without pictures in folders of classes.
  """
  folder = Path(dataset.removeprefix(FOLDER))
  if not folder.is_dir():
    raise UserError(f'there is no folder {folder}; give data.dataset=folder:PATH of pictures.')
  split = [folder / name for name in ('train', 'test')]
  if all(place.is_dir() for place in split):
    return tuple(
      LabelledFolder([file for files in _by_class(place) for file in files], size)
      for place in split
    )
  classes = _by_class(folder)
  tested = lambda number: number % EVERY == EVERY - 1
  parts = [
    [file for files in classes for i, file in enumerate(files) if tested(i) == test]
    for test in (False, True)
  ]
  if not parts[1]:
    raise UserError(
      f'no class of {folder} has {EVERY} pictures, of which one would be for the test; add some, '
      'or make folders train and test in it.'
    )
  return tuple(LabelledFolder(part, size) for part in parts)


def _by_class(folder: Path) -> list[list[Path]]:
  """The pictures of each folder of a folder, in order."""
  places = sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith('.'))
  found = [files for place in places if (files := pictures(place))]
  if not found:
    raise UserError(
      f'the folder {folder} has no folders of pictures ({", ".join(SUFFIXES)}); make one for each '
      'class, by its name.'
    )
  return found


class LabelledFolder:
  """Records of pictures whose label is their folder's name; image uint8 [size size 3], the central
  square."""

  def __init__(self, files: Sequence[Path], size: int):
    self.files, self.size = list(files), size

  def __len__(self) -> int:
    return len(self.files)

  @property
  def labels(self) -> list[str]:
    """Of every record, without reading a picture."""
    return [file.parent.name for file in self.files]

  def __getitem__(self, index: SupportsIndex) -> dict:
    """Record `index`. UserError where the picture cannot be read."""
    file = self.files[range(len(self.files))[index]]
    label = file.parent.name
    return {
      'image': read_image(file, self.size), 'captions': [label], 'id': f'{label}/{file.stem}',
      'label': label,
    }
