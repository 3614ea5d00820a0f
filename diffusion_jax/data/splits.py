"""The split of records into train and test, and fingerprints of data.

A picture's side follows from the bytes of its file: it stays when files are renamed, copied or
added, and is never both. Fingerprints are of names, sizes, texts and a sample of the content, not
of dates, which a copy changes.
"""

import concurrent.futures
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from diffusion_jax.data.finding import key_of

FEWEST = 20
"""Pictures of which some are left to the test; fewer are all trained on."""
_ENDS = 2**15
"""Bytes at the start and at the end of a file that are read: pictures that are alike there and as
long would only be on one side together."""
_READERS = 8


class Measured(NamedTuple):
  """A sentence on the records that scores are measured on; trained_on: whether they are."""

  sentence: str
  trained_on: bool = False


APART = Measured('On the test split, which was not trained on.')


class Parts(NamedTuple):
  """The record numbers of both sides, in order."""

  train: list[int]
  test: list[int]
  measured: Measured


def measured_on(test: Sequence) -> Measured:
  """The test split's own description, or one of the test as held apart."""
  return getattr(test, 'measured', APART)


def by_content(files: Sequence[Path], fraction: float, labels: Sequence[str] = ()) -> Parts:
  """Split pictures by content; if too few, both sides are all of them.

  fraction: expected of the test, in [0, 1). labels: any with test pictures has training ones too.
  """
  every, count = list(range(len(files))), len(files)
  if not fraction:
    return Parts(every, every, Measured(
      f'On the {count:,} pictures that are trained on: data.test_fraction is 0.', True
    ))
  side = _sides(content_hashes(files), fraction, labels) if count >= FEWEST else [False] * count
  parts = [[i for i in every if side[i] == test] for test in (False, True)]
  if not parts[1]:
    return Parts(every, every, Measured(
      f'On the {count:,} pictures that are trained on: they are too few for a test part.', True
    ))
  return Parts(*parts, Measured(
    f'On {len(parts[1]):,} of {count:,} pictures, chosen by their content, which are not trained '
    'on.'
  ))


def of_own_folders(train: Sequence[Path], test: Sequence[Path]) -> Measured:
  """Say what scores are measured on where people have split: pictures may be on both sides."""
  sizes = set(map(size_of, train)) & set(map(size_of, test))
  known = set(content_hashes([path for path in train if size_of(path) in sizes]))
  same = content_hashes([path for path in test if size_of(path) in sizes])
  if not (count := sum(each in known for each in same)):
    return APART
  return Measured(
    f'On the test split, of whose {len(test):,} pictures {count:,} are trained on, too.'
  )


def content_hashes(files: Sequence[Path]) -> list[bytes]:
  """Hash the length, start and end of each file, or the name of one that cannot be read."""
  with concurrent.futures.ThreadPoolExecutor(_READERS) as pool:
    return list(pool.map(_content_hash, files))


def size_of(path: Path) -> int:
  """Return the size in bytes; -1 of a file that is gone."""
  try:
    return path.stat().st_size
  except OSError:
    return -1


def _content_hash(path: Path) -> bytes:
  try:
    with path.open('rb') as file:
      size = file.seek(0, 2)
      file.seek(0)
      data = file.read(_ENDS)
      file.seek(max(len(data), size - _ENDS))
      data += file.read(_ENDS)
  except OSError:  # An error names it when the picture is read.
    size, data = -1, os.fsencode(path.name)
  return hashlib.sha256(b'%d:' % size + data).digest()


def _sides(hashes: Sequence[bytes], fraction: float, labels: Sequence[str]) -> list[bool]:
  tested = {each for each in hashes if int.from_bytes(each[:8]) < fraction * 2**64}
  by_label: Mapping[str, set[bytes]] = {}
  for each, label in zip(hashes, labels or [''] * len(hashes), strict=True):
    by_label.setdefault(label, set()).add(each)
  for own in by_label.values():
    if own <= tested:  # Nothing would be left to learn it from.
      tested -= own
  return [each in tested for each in hashes]


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
  found = hashlib.sha256()
  for path in files:
    name = key_of(path.relative_to(folder).as_posix())
    found.update(f'{name}\n{size_of(path)}\n'.encode(errors='surrogateescape'))
  for each in content_hashes([files[i] for i in spread(len(files), FILES)]):
    found.update(each)
  return found.hexdigest()[:32]


def of_texts(texts: Sequence[Any]) -> str:
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
