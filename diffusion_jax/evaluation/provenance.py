"""What figures are measured on and with, in sentences: which images, and what the networks that
score were themselves trained on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from diffusion_jax.errors import UserError
from diffusion_jax.formats.networks import resolve
from diffusion_jax.runs.trained_on import Pictures, read_trained_on

REFERENCE, TESTED = 'the reference', 'the test images'

Sets = Mapping[str, Pictures | None]
"""What sets of images are, by what people call them here; None where that is not known."""


def of_features(named: Sequence[str], sets: Sets) -> list[str]:
  """A sentence for each KIND:PATH on what that network was trained on, seen from these sets."""
  return [_of_network(text, _trained_on(text.partition(':')[2]), sets) for text in named]


def of_model(name: str, path: str, sets: Sets) -> str:
  """The same for a model, or for what a training began with."""
  return _of_network(name, _trained_on(path), sets)


def _trained_on(path: str) -> Pictures | None:
  try:
    place = Path(resolve(path))
  except UserError:
    return None
  return read_trained_on(place) if place.is_dir() else None


def _of_network(name: str, trained: Pictures | None, sets: Sets) -> str:
  if trained is None:
    more = f', nor whether {_are(sets)} part of that' if sets else ''
    return f'What {name} was trained on is not known{more}.'
  same = [what for what, pictures in sets.items() if pictures and trained.same(pictures)]
  apart = [what for what, pictures in sets.items() if pictures and trained.apart(pictures)]
  rest = [what for what in sets if what not in (*same, *apart)]
  parts = [f'{_are(same)} these images, which it knows'] if same else []
  parts += [f'{_are(apart)} not among them'] if apart else []
  parts += [f'whether {_are(rest)} among them is not known'] if rest else []
  return f'{name} was trained on {trained.told}' + (f': {"; ".join(parts)}.' if parts else '.')


def _are(sets: Sequence[str] | Mapping) -> str:
  """Their names with a verb."""
  return f'{" and ".join(sets)} {"is" if list(sets) == [REFERENCE] else "are"}'
