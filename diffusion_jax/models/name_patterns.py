"""Patterns of the names of layers, as in PEFT's configs, matched in bounded time."""

import functools
import re
from collections.abc import Iterable, Mapping
from typing import Any

from diffusion_jax.errors import UserError, require

LONGEST = 2000
"""Characters of all patterns of one file that are more than names."""
DEEPEST = 5
"""Choices within one another."""

_NAME = re.compile(r'(\^?)((?:[\w-]|\\?\.)+)\$?')
_ONE = re.compile(r'(\\[dDwWsS]|\\[^\w\s]|\[\^?[\w.\\-]+\]|[^\\\[\](){}|*+?^$])([*+?]?)\??')


class NamePatterns:
  r"""Values by patterns of layer names, as in PEFT's configs, matched in bounded time.

  The first pattern that matches a name's end, from a dot on, gives its value, as PEFT's
  re.match(rf'(.*\.)?({pattern})$', name). A backtracking matcher may never end; here all places in
  the pattern advance together along a name. Known are characters, classes such as [a-z], . \d \w, *
  + ? on one of these, ^ and $, and choices as in (to_q|to_k)(_proj)?.
  """

  def __init__(self, patterns: Mapping[str, Any], where: str):
    """`where` names the source in the UserError for a pattern that is not known here."""
    self._names: dict[str, tuple[int, bool, Any]] = {}
    self._patterns: list[tuple[int, list, Any]] = []
    length = 0
    for number, (text, value) in enumerate(patterns.items()):
      if name := _NAME.fullmatch(text):  # A dot is taken for a dot, as whoever wrote it meant it.
        key = name[2].replace('\\.', '.')
        self._names.setdefault(key, (number, bool(name[1]), value))
        continue
      length += len(text)
      require(
        length <= LONGEST, f'{where}: the patterns have over {LONGEST} characters; write names.'
      )
      self._patterns.append((number, _parse(text, where), value))

  def find(self, names: Iterable[str], default: Any) -> Any:
    """Return the value of the first pattern that matches one of the names."""
    found = [hit for name in names for hit in self._hits(name)]
    return min(found, key=lambda hit: hit[0])[1] if found else default

  def _hits(self, name: str) -> Iterable[tuple[int, Any]]:
    parts = name.split('.')
    for start in range(len(parts)):
      number, anchored, value = self._names.get('.'.join(parts[start:]), (0, True, None))
      if value is not None and not (anchored and start):
        yield number, value
    for number, choices, value in self._patterns:
      if _matches(choices, name):
        yield number, value


def _parse(text: str, where: str) -> list:
  """Choices, which are lists of steps: (^, $, a character's test or choices, how many times)."""
  shown = text if len(text) <= 60 else f'{text[:60]}...'
  unknown = UserError(
    f'{where}: the pattern {shown!r} is more than names, classes, *, +, ? and choices; write the '
    'names of the layers.'
  )

  def choices(place: int, depth: int) -> tuple[list, int]:
    if depth > DEEPEST:
      raise unknown
    found: list[list] = [[]]
    while place < len(text) and text[place] != ')':
      if text[place] == '|':
        found.append([])
        place += 1
      elif text[place] in '^$':
        found[-1].append((text[place], ''))
        place += 1
      elif text[place] == '(':
        inner, place = choices(place + 1, depth + 1)
        if text[place : place + 1] != ')':
          raise unknown
        optional = text[place + 1 : place + 2] == '?'
        found[-1].append((inner, '?' if optional else ''))
        place += 1 + optional
      elif one := _ONE.match(text, place):
        found[-1].append((_test(one[1]), one[2]))
        place = one.end()
      else:
        raise unknown
    return found, place

  try:
    found, end = choices(0, 0)
  except re.error:  # A class such as [z-a].
    raise unknown from None
  if end < len(text):
    raise unknown
  return found


@functools.lru_cache(maxsize=256)
def _test(text: str) -> re.Pattern:
  return re.compile(text)


def _matches(choices: list, name: str) -> bool:
  """Sets of places in the name are bits of whole numbers; bit n is after n characters."""
  starts = 1 | sum(2 << i for i, character in enumerate(name) if character == '.')
  bits: dict[re.Pattern, int] = {}

  def here(test: re.Pattern) -> int:
    if test not in bits:
      bits[test] = sum(1 << i for i, character in enumerate(name) if test.match(character))
    return bits[test]

  def run(choices: list, places: int) -> int:
    ends = 0
    for steps in choices:
      at = places
      for step, times in steps:
        at = after(step, times, at)
      ends |= at
    return ends

  def after(step: Any, times: str, places: int) -> int:
    if step == '^':
      return places & 1
    if step == '$':
      return places & 1 << len(name)
    if isinstance(step, list):
      return run(step, places) | (places if times else 0)
    fits = here(step)
    once = (places & fits) << 1
    if times in ('', '?'):
      return once | places if times else once
    places = once if times == '+' else places
    # A carry runs through each run of characters that fit, from every place on.
    return ((places & fits) + fits ^ fits) | places

  return bool(run(choices, starts) >> len(name) & 1)
