"""Whether a CLIP can tell pictures apart at all, measured on real pictures and their captions."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.special import bdtrc

from diffusion_jax.evaluation.features import CLIPFeatures
from diffusion_jax.evaluation.metrics.text import retrieval_hits
from diffusion_jax.types import Record

PAIRS, CANDIDATES = 256, 100
NEAR = 2
"""Times chance: a CLIP that is not clearly above that is near chance."""
DOUBT = 0.01
"""Probability with which one that is just so good would be taken for better."""


class Retrieval(NamedTuple):
  """Own captions of real pictures that are ranked first: hits of so many pictures, each time among
  so many candidates."""

  hits: int
  count: int
  candidates: int

  @property
  def near_chance(self) -> bool:
    """Whether so many hits come, or more, by more than DOUBT from one of NEAR times chance.

    The hits of the pictures are taken for independent, so that their number is binomial.
    """
    return self._tail(self.hits) > DOUBT

  @property
  def too_few(self) -> bool:
    """Whether not even a perfect CLIP could be told from one near chance."""
    return self._tail(self.count) > DOUBT

  def _tail(self, hits: int) -> float:
    p = min(NEAR / self.candidates, 1.0)
    return 1.0 if hits == 0 or p == 1 else float(bdtrc(hits - 1, self.count, p))

  def told(self, name: str) -> str:
    """A sentence; a warning where it is near chance."""
    found = (
      f'{name} ranks the own caption of {self.count} real pictures first of {self.candidates} for '
      f'{self.hits / self.count:.1%} of them, where chance is {1 / self.candidates:.1%}'
    )
    if self.too_few:
      return f'{found}: these are too few to tell whether figures in its features say anything.'
    if not self.near_chance:
      return f'{found}.'
    return f'{found}: it is near chance, so that figures in its features say next to nothing.'


def real_retrieval(clip: CLIPFeatures, records: Sequence[Record], seed: int = 0) -> Retrieval:
  """Of records, each with its image [h w 3] of one size and its first caption; one at least.

  Of several with one caption, which nothing could tell apart, the first.
  """
  records = list({record['captions'][0]: record for record in records[PAIRS - 1 :: -1]}.values())
  images = clip.images(np.stack([record['image'] for record in records]))
  texts = clip.texts([record['captions'][0] for record in records])
  hits = retrieval_hits(images, texts, k=1, candidates=CANDIDATES, seed=seed)
  return Retrieval(int(hits.sum()), len(records), min(CANDIDATES, len(records)))
