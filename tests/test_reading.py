"""Reading of files from outside: JSON within bounds, and one sentence for whatever is raised."""

import json
import os

import pytest

from diffusion_jax.errors import UserError
from diffusion_jax.reading import MOST_DEPTH, bounded_bytes, parse_json, read_object, reading

DEEP = b'[' * MOST_DEPTH + b']' * MOST_DEPTH


@pytest.mark.parametrize(('data', 'value'), [
  (b'{"a": [1, -2.5, true, null, "\xc3\xa9"]}', {'a': [1, -2.5, True, None, 'é']}),
  (b'\xef\xbb\xbf{"a": 1}', {'a': 1}),
  ('{"é": 1}'.encode('utf-16'), {'é': 1}),
  (rb'["\ud83e\udd8a", "\\ud800"]', ['🦊', '\\ud800']),
  (b'[18446744073709551615, -9223372036854775808]', [2**64 - 1, -2**63]),
  (b'[1000000000000000019884624838656]', [1000000000000000019884624838656]),
  (b'[-Infinity, 1e999]', [-float('inf'), float('inf')]),
  (DEEP, json.loads(DEEP)),
])
def test_sound_json_is_read_as_everybody_reads_it(data, value):
  assert parse_json(data) == value


@pytest.mark.parametrize(('data', 'words'), [
  (b'[' * 10**5, 'nested more than 100 deep'),
  (b'[' + DEEP + b']', 'nested more than 100 deep'),
  (b'{"a":' * 5000 + b'1' + b'}' * 5000, 'nested more than 100 deep'),
  (b'1' * 10**6, 'a whole number of 1,000,000 digits'),
  (b'{"a": 1, "b": {"c": 1, "c": 2}}', "the key 'c' stands twice"),
  (rb'{"a": ["\ud800"]}', 'half a character'),
  (rb'{"\udfff": 1}', 'half a character'),
  (b'"\xed\xa0\x80"', "can't decode"),
  (b'[' + b'[],' * 4_000_000 + b'0]', 'more than 4,000,000 values'),
  (b'{"a": 1', 'delimiter'),
  (b'', 'Expecting value'),
])
def test_json_that_could_do_harm_is_a_sentence(tmp_path, data, words):
  with pytest.raises(ValueError, match=words):
    parse_json(data)
  path = tmp_path / 'x.json'
  path.write_bytes(data)
  with pytest.raises(UserError, match=r'x\.json is not readable JSON \(.*; write or fetch'):
    read_object(path)


def test_only_regular_files_of_a_size_are_read(tmp_path):
  os.mkfifo(tmp_path / 'fifo')
  big = tmp_path / 'big'
  with big.open('wb') as file:
    file.truncate(2**40)
  for path, words in (
    (tmp_path / 'fifo', 'is not a file'), (tmp_path, 'is not a file'), (big, 'more than 67,108'),
    (tmp_path / 'none', 'There is no file'),
  ):
    with pytest.raises(UserError, match=words):
      read_object(path)
  big.write_bytes(b'[1]')
  assert bounded_bytes(big, 3) == b'[1]'
  with pytest.raises(UserError, match='must hold a JSON object'):
    read_object(big)


class PanicException(BaseException):
  """As parsers in Rust raise it."""


@pytest.mark.parametrize('error', [
  RecursionError(), MemoryError(), KeyError('a'), AssertionError(), StopIteration(),
  OverflowError('int too large'), PanicException('called unwrap\non nothing'), OSError(5, 'I/O'),
  UnicodeEncodeError('utf-8', '\ud800', 0, 1, 'surrogates'),
])
def test_whatever_a_parser_raises_is_one_line_that_names_the_file(error):
  sentence = r'^a\.bin cannot be read \(.+\); fetch it again\.$'
  with pytest.raises(UserError, match=sentence) as caught:
    with reading('a.bin', remedy='fetch it again'):
      raise error
  assert str(caught.value).isprintable()


def test_names_from_files_neither_break_the_line_nor_command_the_terminal():
  name = 'a\nb\x1b[2J\u2028\udcff'
  assert str(UserError(f'{name} é 🦊 is missing.')) == (
    r'a\nb\x1b[2J\u2028\udcff é 🦊 is missing.'
  )
  long = str(UserError('start ' + 'x' * 10**6 + ' end.'))
  assert len(long) < 5000 and long.startswith('start ') and long.endswith(' end.')


def test_what_is_no_fault_of_the_file_passes():
  for error in (KeyboardInterrupt(), SystemExit(3), UserError('as it is.')):
    with pytest.raises(type(error)) as caught, reading('a.bin'):
      raise error
    assert caught.value is error
