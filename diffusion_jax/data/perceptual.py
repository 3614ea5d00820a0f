"""Pictures that look the same, found among many: a hash of 64 bits, a small copy, and bands.

The hash is of the signs of the lowest frequencies (pHash, Zauner 2010), which another size, format
or brightness hardly changes. Hashes that differ in few bits agree in some of their bands: only
those that share bands are compared, neighbours in sorted order, so that the time grows with the
number of pictures, not with its square. What is alike in both hash and small copy is reported.
"""

import itertools
from collections.abc import Callable, Iterator

import numpy as np
from jaxtyping import UInt8
from PIL import Image

EDGE = 16
"""Of the small copy, in pixels."""
MOST_BITS = 6
"""In which the hashes of two pictures that look the same may differ."""
MOST_ERROR, MOST_PEAK = 6.0, 40.0
"""Of small copies, of 255: root mean square of the differences, and the largest, as they are
or when the brightness of one is fitted to that of the other, by at most MOST_SCALE."""
MOST_SCALE = 0.15
_BANDS = 8
"""Hashes that differ in at most MOST_BITS agree in two of them: those two are a key."""
_WINDOW = 24
"""Neighbours, in sorted order, that each picture is compared with under a key."""
_CHUNK = 2**18
_SIDE = 2 * EDGE
_WEAK = 0.2
"""Frequencies below that fraction of their root mean square count as none, whatever their sign:
drawings that are symmetric have many of nothing but noise."""


def _waves() -> np.ndarray:
  places, waves = np.arange(_SIDE), np.arange(EDGE)[:, None]
  return np.cos(np.pi * waves * (2 * places + 1) / (2 * _SIDE)).astype(np.float64)


def _lowest() -> tuple[np.ndarray, np.ndarray]:
  order = sorted(np.ndindex(EDGE, EDGE), key=lambda place: (sum(place), place))
  return tuple(np.asarray(order[1:65]).T)  # Without the mean.


_WAVES, _LOWEST = _waves(), _lowest()


def look(pixels: UInt8[np.ndarray, 'h w 3']) -> tuple[int, UInt8[np.ndarray, '16 16 3']]:
  """(hash of 64 bits, small copy) of a picture."""
  small = Image.fromarray(pixels).resize((_SIDE, _SIDE), Image.Resampling.BILINEAR)
  values = np.asarray(small, np.float64)
  frequencies = (_WAVES @ values.mean(axis=-1) @ _WAVES.T)[_LOWEST]
  least = max(_WEAK * np.sqrt(np.mean(frequencies**2)), 1e-6)
  bits = np.packbits(frequencies > least)
  quarters = values.reshape(EDGE, 2, EDGE, 2, 3).mean(axis=(1, 3))
  return int.from_bytes(bits.tobytes(), 'big'), np.rint(quarters).astype(np.uint8)


def pairs_alike(
  hashes: np.ndarray, copies: Callable[[np.ndarray], np.ndarray]
) -> np.ndarray:
  """Pairs of pictures that look the same, int64 [m 2], the lower number first, sorted.

  hashes: uint64 [n]. copies: gives the small copies, uint8 [k 16 16 3], of those numbers.
  """
  keys = {key for found in _near(hashes) for key in found.tolist()}
  if not keys:
    return np.zeros((0, 2), np.int64)
  pairs = np.stack(np.divmod(np.sort(np.fromiter(keys, np.int64)), len(hashes)), axis=1)
  alike = [
    same_look(copies(part[:, 0]), copies(part[:, 1]))
    for part in np.split(pairs, range(_CHUNK, len(pairs), _CHUNK))
  ]
  return pairs[np.concatenate(alike)]


def _near(hashes: np.ndarray) -> Iterator[np.ndarray]:
  """Pairs (lower * n + higher) of hashes within MOST_BITS, some more than once."""
  n, width = len(hashes), 64 // _BANDS
  bands = [np.uint64(((1 << width) - 1) << (width * band)) for band in range(_BANDS)]
  for first, second in itertools.combinations(bands, 2):
    key = hashes & (first | second)
    order = np.lexsort((hashes, key))
    key, found = key[order], hashes[order]
    for step in range(1, min(_WINDOW, n - 1) + 1):
      same = np.flatnonzero(key[step:] == key[:-step])
      if not len(same):
        break
      close = same[np.bitwise_count(found[same] ^ found[same + step]) <= MOST_BITS]
      pair = np.sort(np.stack([order[close], order[close + step]]), axis=0)
      yield pair[0] * n + pair[1]


def same_look(first: np.ndarray, second: np.ndarray) -> np.ndarray:
  """Whether small copies, uint8 [n 16 16 3], are of pictures that look the same, bool [n]."""
  a, b = (each.reshape(len(each), -1).astype(np.float64) for each in (first, second))
  # The dark is kept, the light fitted: a brighter copy is the other times a number.
  scale = (a * b).sum(1) / np.maximum((a * a).sum(1), 1)
  differences = [a - b, np.minimum(a * scale[:, None], 255) - b]
  good = [
    (np.sqrt(np.mean(each**2, axis=1)) <= MOST_ERROR) & (np.abs(each).max(1) <= MOST_PEAK)
    for each in differences
  ]
  return good[0] | (good[1] & (np.abs(scale - 1) <= MOST_SCALE))
