"""Emoji: their names and captions, and the held-out test.

A hexcode such as '1F468-1F3FC-200D-1F33E' is a sequence of code points (Unicode TR 51): a man, a
skin tone, a joiner, an ear of rice. Without skin tone, gender and direction it is a concept, common
to its variants, which the split keeps together.

The canonical caption is the Unicode name with the skin tone at its end: 'man farmer medium-light
skin tone', 'flag of France', 'red heart'. Others say it in a sentence, as an emoji, or by aliases.

The test holds out new combinations (a profession seen in four skin tones, with a fifth seen on
everyone else) and new concepts. Both depend on content alone, so every machine has the same split.
"""

import dataclasses
import functools
import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

TONES = {
  '1F3FB': 'light',
  '1F3FC': 'medium-light',
  '1F3FD': 'medium',
  '1F3FE': 'medium-dark',
  '1F3FF': 'dark',
}
_JOINER, _VARIATION, _RIGHTWARDS = '200D', 'FE0F', '27A1'
_PERSON = '1F9D1'
_MALE = frozenset('1F468 2642 1F385 1F934 1F57A 1FAC3 1F466 1F474 1F46C'.split())
_FEMALE = frozenset('1F469 2640 1F936 1F478 1F483 1F930 1F467 1F475 1F46D'.split())
_SIGNS = frozenset({'2640', '2642', _RIGHTWARDS})  # Say gender or direction, but not in front.
_NEUTRAL = {'1F468': _PERSON, '1F469': _PERSON}
_FAMILY = frozenset({_PERSON, '1F466', '1F467', '1F9D2'})
# Variants that Unicode spells with unrelated code points, because they are older than joiners.
_SAME = {
  # Light skin is drawn with blond hair anyway, so a blond person is no concept of its own.
  'person': ('1F9D1', '1F471'),
  'child': ('1F466', '1F467', '1F9D2'),
  'older person': ('1F474', '1F475', '1F9D3'),
  'holding hands': ('1F46B', '1F46C', '1F46D', '1F9D1-1F91D-1F9D1'),
  'kiss': ('1F48F', '1F9D1-2764-1F48B-1F9D1'),
  'couple with heart': ('1F491', '1F9D1-2764-1F9D1'),
  'bunny ears': ('1F46F', '1F9D1-1F430-1F9D1'),
  'wrestling': ('1F93C', '1F9D1-1FAEF-1F9D1'),
  'family': ('1F46A',),
  'handshake': ('1F91D', '1FAF1-1FAF2'),
  'claus': ('1F385', '1F936', '1F9D1-1F384'),
  'royalty': ('1F934', '1F478', '1FAC5'),
  'dancing': ('1F57A', '1F483'),
  'flag of Norway': ('1F1F3-1F1F4', '1F1E7-1F1FB', '1F1F8-1F1EF'),  # Bouvet Island, Svalbard.
  'pregnant': ('1F930', '1FAC3', '1FAC4'),
}
_CONCEPT_OF = {codes: name for name, sequences in _SAME.items() for codes in sequences}
PLAIN = frozenset({'person', 'child', 'older person'})
GROUPS_OF_PEOPLE = frozenset(
  {'holding hands', 'kiss', 'couple with heart', 'bunny ears', 'wrestling', 'family', 'handshake'}
)


@dataclasses.dataclass(frozen=True)
class Glyph:
  """One emoji.

  hexcode: code points as in OpenMoji's file names. name: English name from the `emoji` package.
  aliases: further names without skin tone. tones: in the order of the people drawn, such as
  ('light', 'dark'). gender: 'man', 'woman' or ''. concept: of `concept_of`. takes_tone: by Unicode.
  """

  hexcode: str
  name: str
  aliases: tuple[str, ...]
  tones: tuple[str, ...]
  gender: str
  concept: str
  takes_tone: bool

  @property
  def is_flag(self) -> bool:
    """True for the flag of a country, a region or an organisation."""
    first = self.hexcode.split('-')
    return '1F1E6' <= first[0] <= '1F1FF' or (first[0] == '1F3F4' and 'E007F' in first)


def concept_of(hexcode: str) -> str:
  """The sequence without skin tone, gender, direction and variation."""
  first, *rest = [code for code in hexcode.split('-') if code not in TONES]
  dropped = _SIGNS | {_JOINER, _VARIATION}
  codes = [first, *(code for code in rest if code not in dropped)]
  kept = [_NEUTRAL.get(code, code) for code in codes]
  if len(kept) > 1 and set(kept) <= _FAMILY:
    return 'family'
  joined = '-'.join(kept)
  return _CONCEPT_OF.get(joined, joined)


def gender_of(hexcode: str) -> str:
  """Return 'man', 'woman', or '' where the sequence names no gender or both."""
  first, *rest = hexcode.split('-')
  codes = set(rest) | ({first} - _SIGNS)
  male, female = bool(codes & _MALE), bool(codes & _FEMALE)
  return '' if male == female else 'man' if male else 'woman'


def glyph(hexcode: str) -> Glyph | None:
  """Return the emoji with this hexcode; None where the `emoji` package has no name for it."""
  codes = hexcode.split('-')
  entry = _named().get(_text(codes))
  if entry is None:
    return None
  base = _named().get(_text([code for code in codes if code not in TONES]), entry)
  return Glyph(
    hexcode=hexcode,
    name=_words(entry['en']),
    aliases=tuple(_words(alias) for alias in base.get('alias', ())),
    tones=tuple(TONES[code] for code in codes if code in TONES),
    gender=gender_of(hexcode),
    concept=concept_of(hexcode),
    takes_tone=_text([codes[0], next(iter(TONES))]) in _named(),
  )


@functools.cache
def _named() -> dict[str, dict]:
  """The `emoji` package's entries by text without variation selectors, components left out."""
  import emoji

  qualified = emoji.STATUS['fully_qualified']
  entries = emoji.EMOJI_DATA.items()
  return {
    text.replace('\ufe0f', ''): entry for text, entry in entries if entry['status'] == qualified
  }


@functools.cache
def all_names() -> frozenset[str]:
  """Return every English name that the `emoji` package knows."""
  return frozenset(_words(entry['en']) for entry in _named().values())


def _text(codes: list[str]) -> str:
  return ''.join(chr(int(code, 16)) for code in codes if code != _VARIATION)


def _words(name: str) -> str:
  """':St._Kitts_&_Nevis:' -> 'St. Kitts and Nevis'."""
  plain = name.strip(':').replace('_', ' ').replace('’', "'").replace('&', 'and')
  return ' '.join(plain.replace('(', '').replace(')', '').split())


_TONE = re.compile(rf' (?:{"|".join(TONES.values())}) skin tone\b')
_PEOPLE = frozenset({'man', 'woman', 'person', 'boy', 'girl', 'child', 'baby', 'adult'})
_LOOK = re.compile(r'^(?:\w+ hair|beard)$')
_OF_PEOPLE = ('couple with heart', 'kiss', 'family')
_SEX = {'man': 'male', 'woman': 'female'}
_MIN_ALIAS_LETTERS = 3


def captions_of(glyph: Glyph) -> list[str]:
  """Return the captions of an emoji, canonical first, without repeats."""
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
  """Return the name without skin tones, with 'flag of' before the name of a country."""
  if glyph.is_flag:
    return f'flag of {glyph.name}'
  return _TONE.sub('', glyph.name) if glyph.tones else glyph.name


def make_unique(captions: Sequence[Sequence[str]]) -> list[list[str]]:
  """Drop captions of several images, ignoring case; ValueError: two equal canonical ones."""
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
  """Add ' with light and dark skin tones', or ' and ...' where the phrase has a 'with'."""
  tones = dict.fromkeys(glyph.tones)
  if not tones:
    return phrase
  joint = 'and' if ' with ' in phrase and glyph.concept not in GROUPS_OF_PEOPLE else 'with'
  return f'{phrase} {joint} {" and ".join(tones)} skin tone{"s" if len(tones) > 1 else ""}'


def _phrase(glyph: Glyph, body: str) -> str:
  """The body in an English phrase: 'a man farmer', 'kiss of a woman and a man'."""
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
    is_inversion = len(letters) >= _MIN_ALIAS_LETTERS and not any(map(str.isdigit, alias))
    if is_inversion and letters not in known and not glyph.is_flag:
      known.add(letters)
      kept.append(alias)
  return kept


def _letters(text: str) -> str:
  return re.sub(r'[^a-z]', '', text.lower())


UNSEEN_CONCEPTS = 0.045
"""Fraction of concepts held out wholly, with all their variants."""


def assign(glyphs: Sequence[Glyph]) -> list[str]:
  """Return the split of each emoji, 'train' or 'test'."""
  pairs = held_out_pairs(glyphs)
  return ['test' if _is_test(glyph, pairs) else 'train' for glyph in glyphs]


def is_unseen_concept(concept: str) -> bool:
  """Return whether a concept is held out with all its variants."""
  return _hash(f'concept {concept}') / 2**64 < UNSEEN_CONCEPTS


def held_out_pairs(glyphs: Iterable[Glyph]) -> dict[str, str]:
  """The one skin tone that training never shows with a profession or activity, by concept.

  These are concepts of one person doing or wearing something, in several genders and all five
  tones. The pair is held out for every gender and direction.
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
