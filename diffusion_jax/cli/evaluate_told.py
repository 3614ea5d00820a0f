"""What figures were measured on and with, for people: beside the figures, in JSON and on the page.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
  from diffusion_jax.evaluation.comparison import Comparison
  from diffusion_jax.evaluation.images import ImageSet, Split


def told(
  comparison: Comparison, images: int, about: Sequence[str], tested: Split | None
) -> tuple[list[str], list[str]]:
  """(sentences on what figures were measured on, what to beware of).

  Args:
    images: that were scored. about: what these are.
    tested: the test split, where they are of it: real pictures with captions.
  """
  from diffusion_jax.evaluation.report import REFERENCE, TESTED, of_features

  reference = comparison.reference
  sets = {REFERENCE: _pictures(reference.images)} if reference.count else {}
  sets |= {TESTED: tested.pictures} if tested else {}
  against = f', against {reference.name}' if reference.count else ''
  count = f' ({reference.count:,} images)' if reference.count else ''
  measured, warnings = [f'Of {images:,} images{against}{count}.', *about], []
  measured += of_features(comparison.named, sets)
  measured += [
    f'{one.name} sees them at {one.size} px, enlarged from {tested.pictures.size}.'
    for one in comparison.extraction.extractors if tested and one.size > tested.pictures.size
  ]
  if comparison.checked is None:
    comparison.checked = _checked(comparison, tested or reference.images)
  for text, beware in comparison.checked:
    (warnings if beware else measured).append(text)
  return measured, warnings


def _pictures(images: ImageSet | None):
  while hasattr(images, 'images'):  # Some of a set.
    images = images.images
  return getattr(images, 'pictures', None)


def _checked(comparison: Comparison, real: ImageSet | None) -> list[tuple[str, bool]]:
  """What each CLIP makes of real pictures and their captions: (sentence, whether to beware)."""
  from diffusion_jax.evaluation.extractors.clip import text_towers
  from diffusion_jax.evaluation.generated import shuffled
  from diffusion_jax.evaluation.report import PAIRS, real_retrieval

  clips = text_towers(
    comparison.named, comparison.extraction.extractors, comparison.extraction.mesh
  )
  records = getattr(real, 'records', None)
  if not records:
    return [(
      f'Whether {clip.extractor.name} knows captions of such pictures was not tried: there are no '
      'real ones with captions.', False,
    ) for clip in clips.values()]
  chosen = shuffled(records, min(PAIRS, len(records)))
  found = {clip.extractor.name: real_retrieval(clip, chosen) for clip in clips.values()}
  return [(one.told(name), one.near_chance) for name, one in found.items()]
