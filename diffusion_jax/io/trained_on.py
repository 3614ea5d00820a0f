"""What a network was trained on, in a small file beside its weights, so that scores can say it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusion_jax.errors import UserError
from diffusion_jax.formats.tensors import write_json
from diffusion_jax.reading import read_object

NAME = 'trained_on.json'
MADE = 'folder:'
"""What names of data sets begin with that are places: the same name may be other pictures."""


@dataclasses.dataclass(frozen=True)
class Pictures:
  """One split of a data set.

  size: edge in pixels. records: how many. fingerprint: of the pictures, by
  `data.fingerprint`; '' where there is none. begun: the model that was trained on with them, which
  may know others; '' for one that was trained on these alone.
  """

  dataset: str
  split: str
  size: int
  records: int
  fingerprint: str = ''
  begun: str = ''

  @property
  def told(self) -> str:
    """For people."""
    after = f', beginning with {self.begun}' if self.begun else ''
    return f'{self.dataset} ({self.split} split, {self.size} px, {self.records:,} images){after}'

  def same(self, other: Pictures) -> bool:
    """Whether these are the same pictures, perhaps at another size."""
    if self.fingerprint and self.fingerprint == other.fingerprint:
      return True
    named = (self.dataset, self.split) == (other.dataset, other.split)
    return named and not self.dataset.startswith(MADE)

  def apart(self, other: Pictures) -> bool:
    """Whether they are known to be another split of the same data set, and all that is known."""
    if self.begun or self.dataset.startswith(MADE):
      return False
    return self.dataset == other.dataset and self.split != other.split


def pictures_of(
  dataset: str, split: str, size: int, records: int, fingerprint: Mapping[str, str]
) -> Pictures:
  """A split, by what `data.fingerprint.fingerprint` says of its source."""
  return Pictures(dataset, split, size, records, fingerprint.get('pictures', ''))


def write_trained_on(directory: Path, pictures: Pictures) -> None:
  """Writes the file into the directory of a network or model."""
  write_json(directory / NAME, dataclasses.asdict(pictures))


def read_trained_on(directory: Path) -> Pictures | None:
  """What the network in a directory was trained on; None where nothing, or nothing sound, says it.
  """
  file = directory / NAME
  if not file.is_file():
    return None
  try:
    values = read_object(file)
  except UserError:
    return None
  fields = {field.name: field.type for field in dataclasses.fields(Pictures)}
  known = {name: values.get(name) for name in fields if name in values}
  return Pictures(**known) if _sound(known, fields) else None


def _sound(known: Mapping[str, Any], fields: Mapping[str, str]) -> bool:
  kinds = {'str': str, 'int': int}
  whole = known.keys() | {'fingerprint', 'begun'} >= fields.keys()
  return whole and all(type(value) is kinds[fields[name]] for name, value in known.items())
