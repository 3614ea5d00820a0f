"""Captions of an emoji in several forms; the first one is canonical.

The canonical caption is the Unicode name with the skin tone at its end: 'man farmer medium-light
skin tone', 'flag of France', 'red heart'. The others say the same in a sentence, as an emoji, or
with the aliases that people type.
"""

import re
from collections import Counter
from collections.abc import Sequence

from diffusion_jax.data.datasets.openmoji.glyphs import GROUPS_OF_PEOPLE, TONES, Glyph, all_names

_TONE = re.compile(rf' (?:{"|".join(TONES.values())}) skin tone\b')
_PEOPLE = frozenset({'man', 'woman', 'person', 'boy', 'girl', 'child', 'baby', 'adult'})
_LOOK = re.compile(r'^(?:\w+ hair|beard)$')
_OF_PEOPLE = ('couple with heart', 'kiss', 'family')
_SEX = {'man': 'male', 'woman': 'female'}
_MIN_ALIAS_LETTERS = 3


def captions_of(glyph: Glyph) -> list[str]:
  """Captions of one emoji, canonical first, without repeats."""
  body = body_of(glyph)
  sentence = _with_tones(glyph, _phrase(glyph, body))
  forms = [f'{body}{_tones_as_name(glyph.tones)}', sentence]
  role = _role(glyph, body)
  if role:
    forms.append(_with_tones(glyph, role))
  forms += [f'emoji of {sentence}', f'{forms[0]} emoji']
  forms += [f'{alias}{_tones_as_name(glyph.tones)}' for alias in _aliases(glyph, body)]
  return list(dict.fromkeys(forms))


def body_of(glyph: Glyph) -> str:
  """The name without skin tones; 'flag of' put before the name of a country."""
  if glyph.is_flag:
    return f'flag of {glyph.name}'
  return _TONE.sub('', glyph.name) if glyph.tones else glyph.name


def make_unique(captions: Sequence[Sequence[str]]) -> list[list[str]]:
  """Drops every caption that two images would share.

  Args:
    captions: per image, canonical first.

  Returns:
    The same, in the same order. A canonical caption stays with its image; any other form that is
    some other image's caption too (ignoring case) is dropped from both.

  Raises:
    ValueError: two images have the same canonical caption.
  """
  canonical = Counter(forms[0].casefold() for forms in captions)
  twice = [text for text, times in canonical.items() if times > 1]
  if twice:
    raise ValueError(f'canonical captions are not unique: {twice[:5]}')
  times = Counter(text for forms in captions for text in {form.casefold() for form in forms})
  return [
    [forms[0], *(form for form in forms[1:] if times[form.casefold()] == 1)] for forms in captions
  ]


def _tones_as_name(tones: tuple[str, ...]) -> str:
  return ''.join(f' {tone} skin tone' for tone in tones[: len(set(tones))])


def _with_tones(glyph: Glyph, phrase: str) -> str:
  """Adds ' with light and dark skin tones', or ' and ...' where the phrase has a 'with'."""
  tones = dict.fromkeys(glyph.tones)
  if not tones:
    return phrase
  joint = 'and' if ' with ' in phrase and glyph.concept not in GROUPS_OF_PEOPLE else 'with'
  return f'{phrase} {joint} {" and ".join(tones)} skin tone{"s" if len(tones) > 1 else ""}'


def _phrase(glyph: Glyph, body: str) -> str:
  """The body as English would put it: 'a man farmer', 'kiss of a woman and a man'."""
  for head in _OF_PEOPLE:
    people = body.removeprefix(f'{head} ').split()
    if body.startswith(f'{head} ') and set(people) <= _PEOPLE:
      *others, last = (f'{_article(word)} {word}' for word in people)
      return f'{head} of {", ".join(others)}{" and " if others else ""}{last}'
  if glyph.is_flag:
    return f'the {body}'
  if not _is_one_person(glyph, body):
    return body
  person, _, look = body.partition(' ')
  if look == 'bald':
    return f'a bald {person}'
  body = f'{person} with {look}' if _LOOK.search(look) else body
  return f'{_article(body)} {body}'


def _is_one_person(glyph: Glyph, body: str) -> bool:
  if glyph.concept in GROUPS_OF_PEOPLE or body[0].isupper():
    return False
  return bool(glyph.gender) or body.split()[0] in _PEOPLE or f'man {body}' in all_names()


def _article(word: str) -> str:
  return 'an' if word[0].lower() in 'aeio' else 'a'


def _role(glyph: Glyph, body: str) -> str:
  """'woman police officer' -> 'a female police officer'; '' where there is no such role."""
  first, _, rest = body.partition(' ')
  return f'a {_SEX[first]} {rest}' if first in _SEX and rest in all_names() else ''


def _aliases(glyph: Glyph, body: str) -> list[str]:
  """Aliases that are words and say something that the name does not."""
  known = {_letters(body), _letters(glyph.name)}
  kept = []
  for alias in glyph.aliases:
    letters = _letters(alias)
    is_word = len(letters) >= _MIN_ALIAS_LETTERS and not any(map(str.isdigit, alias))
    if is_word and letters not in known and not glyph.is_flag:
      known.add(letters)
      kept.append(alias)
  return kept


def _letters(text: str) -> str:
  return re.sub(r'[^a-z]', '', text.lower())
