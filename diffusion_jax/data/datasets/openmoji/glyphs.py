"""Which emoji there are: their names, skin tones, genders and the concept each one draws.

A hexcode such as '1F468-1F3FC-200D-1F33E' is a sequence of code points (Unicode TR 51): a man, a
skin tone, a joiner, an ear of rice. The concept is what is left when skin tone, gender and
direction are taken away; every variant of one concept shares it, so the split can keep variants
together.
"""

import dataclasses
import functools

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

  Attributes:
    hexcode: code points as in OpenMoji's file names, such as '1F468-1F3FC-200D-1F33E'.
    name: English name from the `emoji` package, spaces for underscores.
    aliases: further names of this emoji without its skin tone.
    tones: skin tones in the order of the people drawn, such as ('light', 'dark').
    gender: 'man', 'woman' or '' where the sequence does not say.
    concept: what is drawn apart from skin tone, gender and direction.
    takes_tone: whether Unicode lets this emoji have a skin tone.
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
    """Whether this is the flag of a country, a region or an organisation."""
    first = self.hexcode.split('-')
    return '1F1E6' <= first[0] <= '1F1FF' or (first[0] == '1F3F4' and 'E007F' in first)


def concept_of(hexcode: str) -> str:
  """What a sequence draws, apart from skin tone, gender, direction and variation selectors."""
  first, *rest = [code for code in hexcode.split('-') if code not in TONES]
  dropped = _SIGNS | {_JOINER, _VARIATION}
  codes = [first, *(code for code in rest if code not in dropped)]
  kept = [_NEUTRAL.get(code, code) for code in codes]
  if len(kept) > 1 and set(kept) <= _FAMILY:
    return 'family'
  joined = '-'.join(kept)
  return _CONCEPT_OF.get(joined, joined)


def gender_of(hexcode: str) -> str:
  """'man', 'woman', or '' where the sequence names no gender or both."""
  first, *rest = hexcode.split('-')
  codes = set(rest) | ({first} - _SIGNS)
  male, female = bool(codes & _MALE), bool(codes & _FEMALE)
  return '' if male == female else 'man' if male else 'woman'


def glyph(hexcode: str) -> Glyph | None:
  """The emoji with this hexcode; None where the `emoji` package has no name for it."""
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
  """Every English name that the `emoji` package knows."""
  return frozenset(_words(entry['en']) for entry in _named().values())


def _text(codes: list[str]) -> str:
  return ''.join(chr(int(code, 16)) for code in codes if code != _VARIATION)


def _words(name: str) -> str:
  """':St._Kitts_&_Nevis:' -> 'St. Kitts and Nevis'."""
  plain = name.strip(':').replace('_', ' ').replace('’', "'").replace('&', 'and')
  return ' '.join(plain.replace('(', '').replace(')', '').split())
