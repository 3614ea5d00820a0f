"""Sources of English text, without images: WordNet's dictionary, and text files."""

import hashlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import SupportsIndex

from diffusion_jax.config import DataConfig
from diffusion_jax.data.captions import read_lines
from diffusion_jax.data.sources import without_effect
from diffusion_jax.data.splits import APART, Measured, of_texts
from diffusion_jax.errors import UserError

WORDNET = '/usr/share/wordnet'
"""Where Debian's wordnet-base puts its files."""
_FILES = ('data.noun', 'data.verb', 'data.adj', 'data.adv')
_MARKER = re.compile(r'\((?:a|p|ip)\)')  # Where an adjective may stand.


class Texts(Sequence):
  """Records {'captions': [text], 'id': number}; the same text stands there once."""

  def __init__(self, texts: Sequence[str], credit: str = '', measured: Measured = APART):
    self._texts, self.credit, self.measured = list(texts), credit, measured

  def __len__(self) -> int:
    return len(self._texts)

  def __getitem__(self, index: SupportsIndex) -> dict:
    index = range(len(self))[index]
    return {'captions': [self._texts[index]], 'id': str(index)}

  def fingerprint(self) -> dict[str, str]:
    """Hash of all texts."""
    return {'captions': of_texts(self._texts)}


def wordnet(config: DataConfig) -> tuple[Texts, Texts]:
  """Return (train, test): WordNet's 117,659 entries as 'words: gloss; "examples"', one text each.

  `dataset` is 'wordnet', or 'wordnet:FOLDER' with the files of WordNet 3.0 (Fellbaum 1998).

  Raises:
    UserError: the folder lacks the files, or they are not WordNet's.
  """
  folder = Path(config.dataset.partition(':')[2] or WORDNET)
  found = [text for name in _FILES for text in _entries(folder / name)]
  return _split(config, found, 'WordNet 3.0, Copyright 2006 by Princeton University.')


def _entries(path: Path) -> Iterator[str]:
  if not path.is_file():
    raise UserError(
      f'there is no {path}; install WordNet (Debian: apt-get install wordnet-base), or give its '
      'folder as data.dataset=wordnet:FOLDER.'
    )
  for line in read_lines(path, 'dictionary'):
    if re.match(r'\d{1,2}( |$)', line):  # The licence comes first, with short numbers of lines.
      continue
    head, bar, gloss = line.partition(' | ')
    fields = head.split(' ')
    try:
      words = fields[4 : 4 + 2 * int(fields[3], 16) : 2]
    except (IndexError, ValueError):
      bar = ''
    if not bar:
      raise UserError(f'{path} is no file of WordNet: it has the line {line[:60]!r}.')
    words = ', '.join(_MARKER.sub('', word).replace('_', ' ') for word in words)
    yield f'{words}: {gloss.strip()}'


def text_files(config: DataConfig) -> tuple[Texts, Texts]:
  """Return (train, test) of the lines of a text file, or of all *.txt in a folder: 'text:PATH'.

  UserError where there is none.
  """
  place = Path(config.dataset.partition(':')[2])
  files = sorted(place.rglob('*.txt')) if place.is_dir() else [place]
  if not files or not all(file.is_file() for file in files):
    raise UserError(f'data.dataset={config.dataset}: {place} is no text file and has none.')
  lines = (line for file in files for line in read_lines(file))
  return _split(config, list(lines))


def _split(config: DataConfig, texts: Sequence[str], credit: str = '') -> tuple[Texts, Texts]:
  """The side of a text follows from its hash alone; equal ones are kept once."""
  without_effect(config, 'texts', 'caption', 'caption_column')
  texts = list(dict.fromkeys(texts))
  at_test = [_place(text) < config.test_fraction for text in texts]
  parts = [[t for t, test in zip(texts, at_test, strict=True) if test is side]
           for side in (False, True)]
  if not all(parts):
    same = Measured(f'On the {len(texts):,} texts that are trained on.', True)
    return Texts(texts, credit, same), Texts(texts, credit, same)
  measured = Measured(
    f'On {len(parts[1]):,} of {len(texts):,} texts, chosen by their content, which are not '
    'trained on.'
  )
  return Texts(parts[0], credit), Texts(parts[1], credit, measured)


def _place(text: str) -> float:
  """In [0, 1)."""
  return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], 'big') / 2**48
