"""Pictures in folders by class: PATH/cat/1.png, PATH/dog/1.png.

With folders train/ and test/ inside, each is a split that holds one folder for each class.
Otherwise the pictures are split by their content.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import SupportsIndex

from diffusion_jax.data.folder import FOLDER, SUFFIXES, pictures
from diffusion_jax.data.images import read_image
from diffusion_jax.data.splits import APART, TEST_FRACTION, Measured, by_content
from diffusion_jax.errors import UserError


def open_labelled(
  dataset: str, size: int, test_fraction: float = TEST_FRACTION
) -> tuple['LabelledFolder', 'LabelledFolder']:
  """(train, test) of 'folder:PATH', pictures of size x size pixels.

  Args:
    test_fraction: share of the pictures that is for the test, where no folders say which.

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
  files = [file for files in _by_class(folder) for file in files]
  parts = by_content(files, test_fraction, [file.parent.name for file in files])
  return tuple(
    LabelledFolder([files[i] for i in part], size, parts.measured)
    for part in (parts.train, parts.test)
  )


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

  def __init__(self, files: Sequence[Path], size: int, measured: Measured = APART):
    self.files, self.size, self.measured = list(files), size, measured

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
