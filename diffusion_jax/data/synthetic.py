"""Records of random numbers, to measure speed where there is no data set."""

from collections.abc import Sequence
from typing import SupportsIndex

import numpy as np

LABELS = 10
PICTURES = 8
"""So many different pictures: making one takes longer than reading it."""


class SyntheticImages(Sequence):
  """Records as of a folder of pictures: image uint8 [size size 3], two captions, label, sizes."""

  def __init__(self, size: int, count: int):
    rng = np.random.default_rng(0)
    self._images = rng.integers(0, 256, (PICTURES, size, size, 3), np.uint8)
    letters = rng.integers(ord('a'), ord('z') + 1, (count, 2, 4, 5))
    self._captions = [
      [' '.join(''.join(map(chr, word)) for word in caption) for caption in record]
      for record in letters
    ]
    self._sizes = np.asarray([size, size, 0, 0, size, size], np.float32)

  def __len__(self) -> int:
    return len(self._captions)

  @property
  def labels(self) -> list[str]:
    """Of every record."""
    return [f'class {index % LABELS}' for index in range(len(self))]

  def __getitem__(self, index: SupportsIndex) -> dict:
    index = range(len(self))[index]
    return {
      'image': self._images[index % PICTURES], 'captions': self._captions[index],
      'id': str(index), 'label': f'class {index % LABELS}', 'sizes': self._sizes,
    }
