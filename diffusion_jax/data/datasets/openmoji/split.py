"""Which emoji are held out for test: unseen combinations and unseen concepts.

Two questions are asked of a text-to-image model. Can it combine what it has seen apart: a
profession it has seen in four skin tones, and a fifth tone it has seen on everyone else? And what
does it draw for a concept it has never seen? Both depend on content alone, never on order, size or
chance, so the split is the same on every machine.
"""

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Sequence

from diffusion_jax.data.datasets.openmoji.glyphs import GROUPS_OF_PEOPLE, PLAIN, TONES, Glyph

UNSEEN_CONCEPTS = 0.045
"""Fraction of concepts held out wholly, with all their variants."""


def assign(glyphs: Sequence[Glyph]) -> list[str]:
  """Split of each emoji: 'train' or 'test'."""
  pairs = held_out_pairs(glyphs)
  return ['test' if _is_test(glyph, pairs) else 'train' for glyph in glyphs]


def is_unseen_concept(concept: str) -> bool:
  """Whether a concept is held out with all its variants."""
  return _hash(f'concept {concept}') / 2**64 < UNSEEN_CONCEPTS


def held_out_pairs(glyphs: Iterable[Glyph]) -> dict[str, str]:
  """For each profession or activity, the one skin tone that training never shows with it.

  Professions and activities are the concepts that show one person doing or wearing something, in
  several genders and in all five tones. The pair is held out for every gender and direction.
  """
  seen = defaultdict(set)
  for glyph in glyphs:
    if len(glyph.tones) == 1:
      seen[glyph.concept].add((glyph.gender, glyph.tones[0]))
  tones = tuple(TONES.values())
  return {
    concept: tones[_hash(f'tone {concept}') % len(tones)]
    for concept, variants in seen.items()
    if _is_activity(concept, variants) and not is_unseen_concept(concept)
  }


def _is_activity(concept: str, variants: set[tuple[str, str]]) -> bool:
  genders, tones = ({variant[i] for variant in variants} for i in (0, 1))
  people = concept not in GROUPS_OF_PEOPLE and concept not in PLAIN
  return people and len(genders) > 1 and len(tones) == len(TONES)


def _is_test(glyph: Glyph, pairs: dict[str, str]) -> bool:
  unseen_pair = glyph.tones[:1] == (pairs.get(glyph.concept),)
  return unseen_pair or is_unseen_concept(glyph.concept)


def _hash(text: str) -> int:
  return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8])
