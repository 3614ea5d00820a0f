"""Emoji that look the same: which image stands for them, and which captions it inherits.

OpenMoji draws some sequences identically (farmer and man farmer, the flags of Norway and of
Svalbard) and ignores some skin tones. Left alone, such twins could sit on both sides of the split,
and captions would promise differences that the pixels do not show.
"""

import re
from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from diffusion_jax.data.datasets.openmoji.glyphs import Glyph

THUMBNAIL = 32
"""Edge in pixels at which images are compared, so that every image size finds the same twins."""

# Root mean square on [0, 1], measured on OpenMoji 17 at 32, 64 and 128 px. Drawings that claim
# the same tones are twins up to .0067 and different from .0150 on. Twins among flags and among
# other tones agree to .0005, and different ones start at .0031.
_ALIKE, _EXACT = 0.011, 0.0012
_GENDERED = re.compile(r'\b(?:wo)?m[ae]n\b')


def twins(glyphs: Sequence[Glyph], thumbnails: np.ndarray) -> dict[int, list[int]]:
  """Groups emoji that look the same.

  Args:
    glyphs: n emoji.
    thumbnails: float32 [n, THUMBNAIL, THUMBNAIL, 3] in [0, 1].

  Returns:
    For every emoji to keep, by index: the others whose captions are true of its image as well.
    An emoji that looks like a kept one but claims other skin tones is in neither place.
  """
  flat = thumbnails.reshape(len(glyphs), -1)
  buckets = defaultdict(list)
  for index in sorted(range(len(glyphs)), key=lambda i: _preference(glyphs[i])):
    buckets['flag' if glyphs[index].is_flag else glyphs[index].concept].append(index)
  kept: dict[int, list[int]] = {}
  for members in buckets.values():
    _group(members, glyphs, flat, kept)
  return dict(sorted(kept.items()))


def _group(members: list[int], glyphs: Sequence[Glyph], flat: np.ndarray, kept: dict) -> None:
  here: list[int] = []
  for index in members:
    distance = np.sqrt(np.mean((flat[here] - flat[index]) ** 2, axis=-1))
    same = [k for k, d in zip(here, distance, strict=True) if _alike(glyphs, k, index, d)]
    if not same:
      here.append(index)
      kept[index] = []
    elif _claimed(glyphs[same[0]]) == _claimed(glyphs[index]):
      kept[same[0]].append(index)


def _alike(glyphs: Sequence[Glyph], a: int, b: int, distance: float) -> bool:
  same_tones = _claimed(glyphs[a]) == _claimed(glyphs[b])
  return distance <= (_ALIKE if same_tones and not glyphs[a].is_flag else _EXACT)


def _claimed(glyph: Glyph) -> tuple[str, ...]:
  """The tones that a caption tells; two people of one tone have one tone."""
  return glyph.tones[:1] if len(set(glyph.tones)) == 1 else glyph.tones


def _preference(glyph: Glyph) -> tuple:
  """Sorts first what names the image best: fewest tones, a gender, few words."""
  no_gender = _GENDERED.search(glyph.name) is None
  return len(glyph.tones), no_gender, len(glyph.name.split()), glyph.hexcode
