"""Prompts as people write them: weights, BREAK and long texts in chunks.

The convention is that of the Stable Diffusion web UI: (word) counts 1.1 times, [word] 1/1.1 times,
(word:1.3) 1.3 times, brackets nest and may stay open, a backslash takes a bracket's meaning away,
and BREAK begins a new chunk. A text encoder reads each chunk by itself.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

MORE = 1.1
"""What a pair of brackets multiplies by, or divides."""
COMMA_REACH = 20
"""A chunk that is full ends after its last comma, where that is at most so many tokens back."""
_PARTS = re.compile(r'\\[()\[\]\\]?|[(\[)\]]|:\s*(?P<weight>[+-]?[.\d]+)\s*\)|[^\\()\[\]:]+|:')
_BREAK = re.compile(r'\s*\bBREAK\b\s*')


class Piece(NamedTuple):
  """A text and what its tokens' hidden states are multiplied by."""

  text: str
  weight: float = 1.0


@dataclasses.dataclass
class _Weighted:
  """Pieces so far, None for a BREAK, and where brackets were opened."""

  pieces: list[list | None] = dataclasses.field(default_factory=list)
  opened: dict[str, list[int]] = dataclasses.field(default_factory=lambda: {'(': [], '[': []})

  def multiply(self, start: int, factor: float) -> None:
    for piece in self.pieces[start:]:
      if piece is not None:
        piece[1] *= factor

  def close(self, bracket: str, factor: float) -> bool:
    """Whether there was such a bracket to close."""
    if not self.opened[bracket]:
      return False
    self.multiply(self.opened[bracket].pop(), factor)
    return True

  def write(self, text: str) -> None:
    for number, part in enumerate(_BREAK.split(text)):
      self.pieces += [None] * (number > 0) + [[part, 1.0]]


def parse(prompt: str) -> list[list[Piece]]:
  """A prompt -> its sections, which BREAK divides, each in pieces of one weight.

  Every text has a meaning: brackets that close nothing and weights that are none are text.
  """
  found = _Weighted()
  for match in _PARTS.finditer(prompt):
    text, weight = match[0], _number(match['weight'])
    if text.startswith('\\'):
      found.pieces.append([text[1:], 1.0])
    elif text in found.opened:
      found.opened[text].append(len(found.pieces))
    elif not (
      (text == ')' and found.close('(', MORE)) or (text == ']' and found.close('[', 1 / MORE))
      or (weight is not None and found.close('(', weight))
    ):
      found.write(text)
  for bracket, factor in (('(', MORE), ('[', 1 / MORE)):
    while found.close(bracket, factor):
      pass
  return _merged(found.pieces)


def _number(text: str | None) -> float | None:
  try:
    value = float(text or 'nan')
  except ValueError:
    return None
  return value if math.isfinite(value) else None


def _merged(pieces: Sequence[list | None]) -> list[list[Piece]]:
  sections: list[list[Piece]] = [[]]
  for piece in pieces:
    if piece is None:
      sections.append([])
    elif piece[0]:
      section = sections[-1]
      if section and section[-1].weight == piece[1]:
        section[-1] = Piece(section[-1].text + piece[0], piece[1])
      else:
        section.append(Piece(*piece))
  return sections


class Token(NamedTuple):
  """A token's id and weight."""

  id: int
  weight: float = 1.0


def chunks(
  sections: Sequence[Sequence[Piece]], tokenize: Callable[[str], Sequence[int]], room: int,
  comma: int | None = None,
) -> list[list[Token]]:
  """Sections -> chunks of at most `room` tokens, at least one; a section begins a new one.

  tokenize: a text -> its ids, without the frame. comma: the id of ',', after which a chunk that is
  full ends, see COMMA_REACH.
  """
  out = []
  for section in sections:
    tokens = [Token(id, weight) for text, weight in section for id in tokenize(text)]
    out += list(_filled(tokens, room, comma)) or [[]]
  return out


def _filled(tokens: Sequence[Token], room: int, comma: int | None) -> Iterator[list[Token]]:
  while len(tokens) > room:
    end = room
    # A comma that comes next closes a full chunk as the last one does not.
    if tokens[room].id != comma:
      commas = [i for i in range(max(room - COMMA_REACH, 0), room) if tokens[i].id == comma]
      end = commas[-1] + 1 if commas else room
    yield list(tokens[:end])
    tokens = tokens[end:]
  if tokens:
    yield list(tokens)
