"""Pictures in folders by class: PATH/cat/1.png, PATH/dog/1.png.

A class has the pictures of its folder and of the folders in it. With folders train/ and test/
inside, each is a split that holds one folder for each class. Otherwise the pictures are split by
their content.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import SupportsIndex

from diffusion_jax.data.finding import SUFFIXES, Left, key_of, own_splits, with_suffixes
from diffusion_jax.data.fingerprint import of_files
from diffusion_jax.data.folder import FOLDER, files_of, id_of, within
from diffusion_jax.data.images import read_image
from diffusion_jax.data.splits import APART, TEST_FRACTION, Measured, by_content, of_own_folders
from diffusion_jax.data.text import check_characters
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
  root, left = Path(dataset.removeprefix(FOLDER)), Left()
  files = files_of(root, left)
  for path in files:
    if path.suffix.lower() not in SUFFIXES:
      left.add(f'files of another kind ({path.suffix or "no suffix"})', path.relative_to(root))
  pictures = with_suffixes(files)
  places = own_splits(pictures, root)
  chosen = [
    _in_classes(part, place, left)
    for part, place in zip(within(pictures, *places, left), places, strict=True) if place
  ]
  notes = left.notes(root)
  train = LabelledFolder(places[0], chosen[0], size, notes=notes)
  if len(chosen) == 2:
    return train, LabelledFolder(places[1], chosen[1], size, of_own_folders(*chosen))
  parts = by_content(train.files, test_fraction, train.labels)
  return tuple(
    LabelledFolder(places[0], [train.files[i] for i in part], size, parts.measured, notes)
    for part in (parts.train, parts.test)
  )


def _in_classes(pictures: Sequence[Path], folder: Path, left: Left) -> list[Path]:
  """Those that are in a folder of `folder`."""
  found = []
  for path in pictures:
    if len(path.relative_to(folder).parts) > 1:
      check_characters(path.relative_to(folder).parts[0], f'a folder of a class in {folder}')
      found.append(path)
    else:
      left.add('pictures outside of the folders of classes', path.name)
  if not found:
    raise UserError(
      f'the folder {folder} has no folders of pictures ({", ".join(SUFFIXES)}); make one for each '
      'class, by its name.'
    )
  return found


class LabelledFolder:
  """Records of pictures whose label is their folder's name; image uint8 [size size 3], the central
  square.

  notes: what of the folder is not used, for people. measured: what scores on it are measured on.
  """

  def __init__(
    self, folder: Path, files: Sequence[Path], size: int, measured: Measured = APART,
    notes: tuple[str, ...] = (),
  ):
    self.folder, self.files, self.size = folder, list(files), size
    self.measured, self.notes = measured, notes

  def __len__(self) -> int:
    return len(self.files)

  @property
  def labels(self) -> list[str]:
    """Of every record, without reading a picture."""
    return [self._label(file) for file in self.files]

  def _label(self, file: Path) -> str:
    return key_of(file.relative_to(self.folder).parts[0])

  def fingerprint(self) -> dict[str, str]:
    """Changes with the pictures, or with their classes."""
    return {'pictures': of_files(self.files, self.folder)}

  def __getitem__(self, index: SupportsIndex) -> dict:
    """Record `index`. UserError where the picture cannot be read."""
    file = self.files[range(len(self.files))[index]]
    label = self._label(file)
    return {
      'image': read_image(file, self.size), 'captions': [label], 'id': id_of(file, self.folder),
      'label': label,
    }
