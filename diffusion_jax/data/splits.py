"""The split of records into train and test, and fingerprints of data.

A picture's side follows from the bytes of its file: it stays when files are renamed, copied or
added, and is never both. Fingerprints are of names, sizes, texts and a sample of the content, not
of dates, which a copy changes.
"""

import concurrent.futures
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from diffusion_jax.data.finding import key_of

FEWEST = 20
"""Pictures of which some are left to the test; fewer are all trained on."""
_ENDS = 2**15
"""Bytes at the start and at the end of a file that are read: pictures that are alike there and as
long would only be on one side together."""
READERS = 8
"""Threads that read files at once."""


class Measured(NamedTuple):
  """A sentence on the records that scores are measured on; trained_on: whether they are."""

  sentence: str
  trained_on: bool = False


APART = Measured('On the test split, which was not trained on.')


class Parts(NamedTuple):
  """The record numbers of both sides, int64 [n] each, in order."""

  train: np.ndarray
  test: np.ndarray
  measured: Measured


def measured_on(test: Sequence) -> Measured:
  """The test split's own description, or one of the test as held apart."""
  return getattr(test, 'measured', APART)


def by_content(
  count: int, hashes: Callable[[], np.ndarray], fraction: float, labels: Sequence[str] = ()
) -> Parts:
  """Split pictures by content; if too few, both sides are all of them.

  hashes: gives those of all, uint8 [n 8 or more], where they are needed. fraction: expected of the
  test, in [0, 1). labels: any with test pictures has training ones too.
  """
  every = np.arange(count)
  if not fraction:
    return Parts(every, every, Measured(
      f'On the {count:,} pictures that are trained on: data.test_fraction is 0.', True
    ))
  tested = _tested(hashes(), fraction, labels) if count >= FEWEST else np.zeros(count, bool)
  if not tested.any():
    return Parts(every, every, Measured(
      f'On the {count:,} pictures that are trained on: they are too few for a test part.', True
    ))
  return Parts(every[~tested], every[tested], of_chosen(int(tested.sum()), count))


def of_chosen(tested: int, count: int) -> Measured:
  """Say what scores are measured on where pictures were split by content."""
  return Measured(
    f'On {tested:,} of {count:,} pictures, chosen by their content, which are not trained on.'
  )


def of_own_splits(tested: int, both: int | None) -> Measured:
  """Say what scores are measured on where people have split.

  both: how many of the `tested` pictures are trained on, too; None if that is not known.
  """
  if both is None:
    return Measured(
      f'On the test split. Whether some of its {tested:,} pictures are trained on, too, would take '
      'too long to find out at a start; prepare --source does.'
    )
  return Measured(
    f'On the test split, of whose {tested:,} pictures {both:,} are trained on, too.'
  ) if both else APART


def content_hashes(files: Sequence[Path]) -> list[bytes]:
  """Hash the length, start and end of each file, or the name of one that cannot be read."""
  with concurrent.futures.ThreadPoolExecutor(READERS) as pool:
    return list(pool.map(file_hash, files))


def size_of(path: Path) -> int:
  """Return the size in bytes; -1 of a file that is gone."""
  try:
    return path.stat().st_size
  except OSError:
    return -1


def file_hash(path: Path) -> bytes:
  """The `content_hash` of a file, or one of its name if it cannot be read."""
  try:
    with path.open('rb') as file:
      return content_hash(file)
  except OSError:  # An error names it when the picture is read.
    return name_hash(os.fsencode(path.name))


def content_hash(file: BinaryIO) -> bytes:
  """The digest of the length, start and end of an open file, [32]."""
  size = file.seek(0, 2)
  file.seek(0)
  data = file.read(_ENDS)
  file.seek(max(len(data), size - _ENDS))
  return hashlib.sha256(b'%d:' % size + data + file.read(_ENDS)).digest()


def name_hash(name: bytes) -> bytes:
  """The digest that stands for content that cannot be read, [32]."""
  return hashlib.sha256(b'-1:' + name).digest()


def _tested(hashes: np.ndarray, fraction: float, labels: Sequence[str]) -> np.ndarray:
  """Whether each record is of the test, bool [n]."""
  first = np.ascontiguousarray(hashes[:, :8]).view('>u8')[:, 0]
  tested = first < np.uint64(math.ceil(fraction * 2**64))
  if not len(labels):
    return tested
  numbers: dict[str, int] = {}
  classes = np.fromiter((numbers.setdefault(each, len(numbers)) for each in labels), int)
  trained = np.bincount(classes[~tested], minlength=len(numbers))
  for number in np.flatnonzero(trained == 0):
    own = classes == number
    if tested[own].all():  # Nothing would be left to learn it from.
      tested &= ~np.isin(first, first[own])
  return tested


FILES = 256
"""Number of files whose content is sampled, spread over all."""
RECORDS, IMAGES = 4096, 64
"""Records of prepared data whose texts are read, and images that are decoded."""


def fingerprint(source: Any) -> dict[str, str]:
  """Return hashes by what they are of; none for a source that is made rather than read."""
  return source.fingerprint() if hasattr(source, 'fingerprint') else {}


def of_records(records: Sequence[dict[str, Any]]) -> dict[str, str]:
  """Return hashes of the captions of records in memory, and of the pixels of some."""
  return {
    'captions': of_texts([record['captions'] for record in records]),
    'pictures': of_images([records[i]['image'] for i in spread(len(records), IMAGES)]),
  }


def of_files(files: Sequence[Path], folder: Path) -> str:
  """Hash the names below the folder and the sizes of files, and the content of some."""
  names = (f'{key_of(path.relative_to(folder).as_posix())}\n{size_of(path)}' for path in files)
  return of_names(names, content_hashes([files[i] for i in spread(len(files), FILES)]))


def of_names(names: Iterable[str], hashes: Iterable[bytes]) -> str:
  """Hash names, one a line, and digests of content."""
  found = hashlib.sha256()
  for name in names:
    found.update(f'{name}\n'.encode(errors='surrogateescape'))
  for each in hashes:
    found.update(each)
  return found.hexdigest()[:32]


def of_texts(texts: Iterable[Any]) -> str:
  """A hash of JSON-ready values."""
  found = hashlib.sha256()
  for each in texts:
    found.update(json.dumps(each).encode() + b'\n')
  return found.hexdigest()[:32]


def of_images(images: Sequence[np.ndarray]) -> str:
  """Hash pixels and shapes."""
  found = hashlib.sha256()
  for image in images:
    found.update(repr(image.shape).encode() + np.ascontiguousarray(image).tobytes())
  return found.hexdigest()[:32]


def spread(count: int, most: int) -> list[int]:
  """Return at most so many numbers below `count`, evenly spaced from the first to the last."""
  return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(int)).tolist()
