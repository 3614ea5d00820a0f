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

# Measured on OpenMoji 17, as root mean square on [0, 1]: with the same tones, twins differ by at
# most .0020 and others by .0053 or more; with other tones, twins by nothing and others by .0031.
_SAME_TONES, _OTHER_TONES = 0.0035, 0.0012
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
    elif glyphs[same[0]].tones == glyphs[index].tones:
      kept[same[0]].append(index)


def _alike(glyphs: Sequence[Glyph], a: int, b: int, distance: float) -> bool:
  same_tones = glyphs[a].tones == glyphs[b].tones
  return distance <= (_SAME_TONES if same_tones else _OTHER_TONES)


def _preference(glyph: Glyph) -> tuple:
  """Sorts first what names the image best: fewest tones, a gender, few words."""
  no_gender = _GENDERED.search(glyph.name) is None
  return len(glyph.tones), no_gender, len(glyph.name.split()), glyph.hexcode
