"""Rules that captions are rewritten by before they are kept."""

import re
from collections.abc import Sequence
from typing import NamedTuple

from diffusion_jax.data.fields import LONGEST, clean
from diffusion_jax.data.sources.entries import Entry
from diffusion_jax.errors import Unreadable, UserError


class Rule(NamedTuple):
  """What matches `pattern` becomes `text`, in which \\1 is the pattern's first group."""

  pattern: re.Pattern
  text: str

  @classmethod
  def parse(cls, given: str) -> 'Rule':
    """The rule 'PATTERN=TEXT', divided at the last equals sign. UserError: it is none."""
    pattern, sign, text = given.rpartition('=')
    try:
      if not sign or not pattern:
        raise ValueError('it has no pattern and equals sign')
      found = cls(re.compile(pattern), text)
      re.sub(f'{pattern}\n|', text, '')  # Matches at once, so that groups in the text are checked.
    except (ValueError, IndexError, re.error) as error:
      raise UserError(
        f'--replace {given!r:.100} is no rule ({error}); give PATTERN=TEXT, a regular expression '
        'and what takes the place of what it finds.'
      ) from error
    return found

  def __call__(self, caption: str) -> str:
    return self.pattern.sub(self.text, caption)


def rewritten(entry: Entry, rules: Sequence[Rule]) -> Entry:
  """An entry with its captions by these rules, one after another; those left empty are dropped.

  Unreadable: none remains, or one becomes longer than captions may be.
  """
  if not rules or not entry.captions:
    return entry
  texts, weights = [], []
  for number, text in enumerate(entry.captions):
    for rule in rules:
      text = rule(text)
      if len(text) > LONGEST:
        raise Unreadable(f'the caption of {entry.where} becomes too long by --replace.', 'bad text')
    if text := clean(text):
      texts.append(text)
      weights += entry.weights[number : number + 1]
  if not texts:
    raise Unreadable(f'no caption of {entry.where} is left by --replace.', 'no caption')
  return entry._replace(captions=texts, weights=tuple(weights))
