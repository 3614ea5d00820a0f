"""Whether data are still those that a run began with: hashes of names, sizes, texts and a sample.

Not of dates, which a copy changes.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from diffusion_jax.data.finding import key_of
from diffusion_jax.data.splits import content_hashes, size_of

FILES = 256
"""Of which a part of the content is read, spread over all."""
RECORDS, IMAGES = 4096, 64
"""Records of prepared data whose texts are read, and images that are decoded."""


def fingerprint(source: Any) -> dict[str, str]:
  """What of a source -> its hash; empty for one that is made rather than read."""
  return source.fingerprint() if hasattr(source, 'fingerprint') else {}


def of_records(records: Sequence[dict[str, Any]]) -> dict[str, str]:
  """Of captions of records that are in memory, and of pixels of some."""
  return {
    'captions': of_texts([record['captions'] for record in records]),
    'pictures': of_images([records[i]['image'] for i in spread(len(records), IMAGES)]),
  }


def of_files(files: Sequence[Path], folder: Path) -> str:
  """Of their names below the folder and sizes, and of the content of some."""
  found = hashlib.sha256()
  for path in files:
    name = key_of(path.relative_to(folder).as_posix())
    found.update(f'{name}\n{size_of(path)}\n'.encode(errors='surrogateescape'))
  for each in content_hashes([files[i] for i in spread(len(files), FILES)]):
    found.update(each)
  return found.hexdigest()[:32]


def of_texts(texts: Sequence[Any]) -> str:
  """Of what JSON can tell."""
  found = hashlib.sha256()
  for each in texts:
    found.update(json.dumps(each).encode() + b'\n')
  return found.hexdigest()[:32]


def of_images(images: Sequence[np.ndarray]) -> str:
  """Of pixels and shapes."""
  found = hashlib.sha256()
  for image in images:
    found.update(repr(image.shape).encode() + np.ascontiguousarray(image).tobytes())
  return found.hexdigest()[:32]


def spread(count: int, most: int) -> list[int]:
  """Numbers below `count`, at most so many, evenly spaced, the first and the last among them."""
  return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(int)).tolist()
