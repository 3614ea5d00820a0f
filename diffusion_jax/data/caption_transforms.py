"""Transforms of the caption that was chosen, or of all captions of a record.

Captions that are tags are texts with a separator between them. The null caption of classifier-free
guidance is `settings.caption_dropout`, which a cache knows, too.
"""

import dataclasses
from collections.abc import Callable
from typing import ClassVar

import numpy as np

from diffusion_jax.data.transforms import Transform
from diffusion_jax.errors import UserError

SEPARATOR = ','


@dataclasses.dataclass(frozen=True)
class WrapCaption(Transform):
  """Put `prefix` before each caption, and `suffix` after it."""

  prefix: str = ''
  suffix: str = ''

  def __call__(self, record: dict) -> dict:
    return _changed(record, lambda text: f'{self.prefix}{text}{self.suffix}')


@dataclasses.dataclass(frozen=True)
class ShuffleTags(Transform):
  """Put tags in random order, after the first `keep` of them, with this probability."""

  keep: int = 0
  probability: float = 1.0
  separator: str = SEPARATOR
  random: ClassVar[bool] = True

  def __post_init__(self):
    _check(self, 'shuffle_tags', self.probability)

  def __call__(self, record: dict, rng: np.random.Generator) -> dict:
    def shuffled(text: str) -> str:
      tags = _tags(text, self.separator)
      order = rng.permutation(max(len(tags) - self.keep, 0))
      if rng.random() >= self.probability:
        return text
      return _joined(tags[: self.keep] + [tags[self.keep + i] for i in order], self.separator)

    return _changed(record, shuffled)


@dataclasses.dataclass(frozen=True)
class DropTags(Transform):
  """Leave out each tag after the first `keep` with probability `rate`; one remains at least."""

  rate: float
  keep: int = 0
  separator: str = SEPARATOR
  random: ClassVar[bool] = True

  def __post_init__(self):
    _check(self, 'drop_tags', self.rate)

  def __call__(self, record: dict, rng: np.random.Generator) -> dict:
    def dropped(text: str) -> str:
      tags = _tags(text, self.separator)
      draws = rng.random(len(tags))
      draws[: self.keep] = 1
      kept = [tag for tag, draw in zip(tags, draws, strict=True) if draw >= self.rate]
      return _joined(kept or [tags[int(draws.argmax())]], self.separator)

    return _changed(record, dropped)


def _check(transform: ShuffleTags | DropTags, name: str, fraction: float) -> None:
  if transform.keep < 0 or not 0 <= fraction <= 1 or not transform.separator.strip():
    raise UserError(
      f'data.transforms have {name} with keep={transform.keep}, fraction {fraction} and separator '
      f'{transform.separator!r}; give 0 or more tags, 0 to 1, and a sign between tags.'
    )


def _tags(text: str, separator: str) -> list[str]:
  return [tag for each in text.split(separator.strip()) if (tag := each.strip())] or [text]


def _joined(tags: list[str], separator: str) -> str:
  return f'{separator.strip()} '.join(tags)


def _changed(record: dict, change: Callable[[str], str]) -> dict:
  """The record with its caption changed, or, before one is chosen, all of them."""
  if 'caption' in record:
    return record | {'caption': change(record['caption'])}
  if 'captions' not in record:
    raise UserError(
      f'Record {record.get("id", "?")} has no captions: put transforms of captions before tokenize.'
    )
  return record | {'captions': [change(text) for text in record['captions']]}
