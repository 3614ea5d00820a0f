"""Training data of a network or a run, as JSON files.

trained_on.json with weights names the data in scores; data.json in a workdir detects changed data
on resume.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from diffusion_jax.config import typed
from diffusion_jax.errors import UserError
from diffusion_jax.files import read_object, say, set_aside_damaged
from diffusion_jax.formats.tensors import write_json
from diffusion_jax.runs.directory import RunDirectory

TRAINED_ON, DATA = 'trained_on.json', 'data.json'
MADE = ('folder:', 'mixture:')
"""Beginnings of names of data sets that are places: the same name may be other images."""
Found = dict[str, dict[str, str]]
"""Split -> part of it, such as captions -> its hash."""


@dataclasses.dataclass(frozen=True)
class DataSplit:
  """One split of a data set.

  size: longer edge in pixels. records: how many. fingerprint: of the images, '' where there is
  none. begun: the model that training began with, which may know others; '' for none.
  """

  dataset: str
  split: str
  size: int
  records: int
  fingerprint: str = ''
  begun: str = ''

  @property
  def described(self) -> str:
    """A phrase for people."""
    after = f', beginning with {self.begun}' if self.begun else ''
    return f'{self.dataset} ({self.split} split, {self.size} px, {self.records:,} images){after}'

  def same(self, other: DataSplit) -> bool:
    """Say whether these are the same images, perhaps at another size."""
    if self.fingerprint and self.fingerprint == other.fingerprint:
      return True
    named = (self.dataset, self.split) == (other.dataset, other.split)
    return named and not self.dataset.startswith(MADE)

  def apart(self, other: DataSplit) -> bool:
    """Say whether they are known to be another split of one data set, and all that is known."""
    if self.begun or self.dataset.startswith(MADE):
      return False
    return self.dataset == other.dataset and self.split != other.split


def split_of(
  dataset: str, split: str, size: int, records: int, fingerprint: Mapping[str, str]
) -> DataSplit:
  """Return a split. fingerprint: of its source, by part."""
  return DataSplit(dataset, split, size, records, fingerprint.get('pictures', ''))


def write_trained_on(directory: Path, pictures: DataSplit) -> None:
  """Write the file into the directory of a network or model."""
  write_json(directory / TRAINED_ON, dataclasses.asdict(pictures))


def read_trained_on(directory: Path) -> DataSplit | None:
  """Return the data of the network in a directory; None where nothing sound names them."""
  file = directory / TRAINED_ON
  if not file.is_file():
    return None
  try:
    values, names = read_object(file), [field.name for field in dataclasses.fields(DataSplit)]
    return typed(DataSplit, {name: values[name] for name in names if name in values})
  except UserError:
    return None


def check_data(directory: RunDirectory, found: Found) -> None:
  """Raise UserError where a run that has saved was trained on other data than these."""
  saved = any(path.name.isdecimal() for path in directory.checkpoints.glob('*'))
  if not saved or not (directory.path / DATA).exists():
    return
  try:
    before = read_object(directory.path / DATA)
  except UserError as error:
    say(f'whether the data are still the same cannot be told, as {error}', 'note: ')
    return
  for split, parts in found.items():
    known = before.get(split)
    for part, value in parts.items():
      if isinstance(known, dict) and known.get(part, value) != value:
        raise UserError(
          f'the {part} of the {split} data are not those that {directory.path} was trained on; '
          'restore them, or begin another run from its weights with '
          f'--config.weights_from={directory.path}.'
        )


def write_data(directory: RunDirectory, found: Found) -> None:
  """Write what a run is trained on, unless it is known. OSError where it cannot be written."""
  if not any(found.values()):
    return
  try:
    if directory.read_json(DATA) == found:
      return
  except UserError:  # None yet, or damaged.
    set_aside_damaged(directory.path / DATA, lambda text: say(text, 'note: '))
  directory.write_json(DATA, found)
