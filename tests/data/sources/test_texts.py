"""Texts without images: WordNet's files and lines of text files."""

import pytest

from diffusion_jax.config import DataConfig
from diffusion_jax.data.sources.texts import text_files, wordnet
from diffusion_jax.errors import UserError

LICENCE = '  1 This software and database is provided.\n  2 \n'
NOUN = (
  '00001740 03 n 01 entity 0 003 ~ 00001930 n 0000 ~ 00002137 n 0000 | that which is perceived; '
  '"an example"  \n'
  '00002137 03 n 02 abstraction 0 abstract_entity 0 001 @ 00001740 n 0000 | a general concept  \n'
)
ADJECTIVE = '00001740 00 a 01 able(p) 0 001 = 05200169 n 0000 | having the skills  \n'


@pytest.fixture
def dictionary(tmp_path):
  for name, entries in {'noun': NOUN, 'verb': '', 'adj': ADJECTIVE, 'adv': ''}.items():
    (tmp_path / f'data.{name}').write_text(LICENCE + entries)
  return tmp_path


def texts(source):
  return [record['captions'][0] for record in source]


def test_entries_of_a_dictionary(dictionary):
  train, test = wordnet(DataConfig(f'wordnet:{dictionary}', 64, test_fraction=0.0))
  assert texts(train) == [
    'entity: that which is perceived; "an example"',
    'abstraction, abstract entity: a general concept', 'able: having the skills',
  ]
  assert test.measured.trained_on and 'WordNet' in train.credit


def test_what_is_no_dictionary_is_refused(dictionary):
  (dictionary / 'data.adj').write_text('hello\n')
  with pytest.raises(UserError, match='no file of WordNet'):
    wordnet(DataConfig(f'wordnet:{dictionary}', 64))
  (dictionary / 'data.adj').unlink()
  with pytest.raises(UserError, match='wordnet-base'):
    wordnet(DataConfig(f'wordnet:{dictionary}', 64))


def test_lines_are_split_by_content_once_each(tmp_path):
  lines = [f'line {number}' for number in range(2000)]
  (tmp_path / 'a.txt').write_text('\n'.join(lines[:1500]))
  (tmp_path / 'b.txt').write_text('\r\n'.join(lines[1000:]) + '\n\n')
  train, test = text_files(DataConfig(f'text:{tmp_path}', 64, test_fraction=0.1))
  assert sorted(texts(train) + texts(test)) == sorted(lines)
  assert 150 < len(test) < 250 and not test.measured.trained_on
  again = text_files(DataConfig(f'text:{tmp_path / "a.txt"}', 64, test_fraction=0.1))
  assert set(texts(again[1])) <= set(texts(test))
  assert train.fingerprint() != again[0].fingerprint()


def test_no_text_is_refused(tmp_path):
  with pytest.raises(UserError, match='no text file'):
    text_files(DataConfig(f'text:{tmp_path}', 64))
