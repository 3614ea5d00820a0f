"""Captions of a folder: lists of all kinds, folders within folders, and what is left out.

Text that people wrote: how it is decoded, what ends a line, what is refused.
"""

import ast
import json
import os
import random
import subprocess
import sys
import unicodedata
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from diffusion_jax.data.captions import LONGEST, MOST_BYTES, lines_of, read_lines
from diffusion_jax.data.transforms import build_transforms
from diffusion_jax.errors import UserError
from tests.tiny import ROOT, folder_sources


def pictures(folder, *names):
  for name in names:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(path)


def rows(*values, **options):
  return ''.join(json.dumps(value, **options) + '\n' for value in values)


def row(name, text):
  return {'file_name': name, 'text': text}


def opened(folder, caption='', **options):
  """(captions by id, notes)."""
  source, _ = folder_sources(folder, 4, caption, **options)
  return {source[i]['id']: source[i]['captions'] for i in range(len(source))}, ''.join(source.notes)


def listed(folder, text, name='metadata.jsonl'):
  (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
  return opened(folder)


@pytest.mark.parametrize(('value', 'captions'), [
  ({'text': 'a cat'}, ['a cat']),
  ({'text': ' a cat\u2028on a mat\n'}, ['a cat\u2028on a mat']),
  ({'text': ['a cat', 'a kitten', 'a cat']}, ['a cat', 'a kitten']),
  ({'captions': ['a cat', 'a kitten']}, ['a cat', 'a kitten']),
  ({'text': 'a cat', 'captions': ['a kitten', 'a cat'], 'other': [1]}, ['a cat', 'a kitten']),
  ({'Caption': 'a cat', 'score': float('nan')}, ['a cat']),
  ({'text': None, 'caption': 'a cat'}, ['a cat']),
])
def test_what_a_row_says(tmp_path, value, captions):
  pictures(tmp_path, 'a.png')
  for ascii in (True, False):
    found, _ = listed(tmp_path, rows({'file_name': 'a.png', **value}, ensure_ascii=ascii))
    assert found == {'a': captions}


@pytest.mark.parametrize(('value', 'kind'), [
  (None, 'null'), (5, 'a number'), (float('nan'), 'a number'), (True, 'a number'),
  ({'en': 'a cat'}, 'an object'), ([None], 'null'), ([['a cat']], 'a list'), (' ', 'empty'),
  ('a' * 70_000, 'more than 65,536 characters'),
])
def test_what_is_no_caption_is_counted_not_turned_into_words(tmp_path, value, kind):
  pictures(tmp_path, 'a.png', 'b.png')
  (tmp_path / 'b.txt').write_text('a dog')
  with pytest.raises(UserError, match=r'a\.png has no caption') as error:
    listed(tmp_path, rows(row('a.png', value)))
  assert f'{kind}: 1, such as line 1 of metadata.jsonl' in str(error.value)
  found, notes = opened(tmp_path, 'a thing')
  assert found == {'a': ['a thing'], 'b': ['a dog']}
  assert f'{kind}: 1, such as line 1' in notes
  assert 'pictures without a caption of their own, which have data.caption: 1' in notes


def test_names_in_every_spelling(tmp_path):
  nfc, nfd = (unicodedata.normalize(form, 'é.png') for form in ('NFC', 'NFD'))
  pictures(tmp_path, 'a.png', 'dogs/b.png', 'dogs/c.png', 'd.png', nfd)
  found, notes = listed(tmp_path, rows(
    row('./a.png', 'one'), row('dogs\\b.png', 'two'), row('x/../dogs//c.png', 'three'),
    row(str(tmp_path / 'd.png'), 'four'), row(nfc, 'five'),
  ))
  assert found == {
    'a': ['one'], 'dogs/b': ['two'], 'dogs/c': ['three'], 'd': ['four'], nfc[:-4]: ['five'],
  }
  assert notes == ''


@pytest.mark.parametrize('name', ['../a.png', '/etc/a.png', 'x/../../a.png', '..', 'C:\\a.png'])
def test_names_that_lead_out_are_refused(tmp_path, name):
  pictures(tmp_path, 'in/a.png')
  with pytest.raises(UserError, match=r'metadata\.jsonl names .* which is not in .*/in;'):
    listed(tmp_path / 'in', rows(row('a.png', 'x'), row(name, 'y')))


def test_rows_and_texts_without_a_picture_are_counted(tmp_path):
  pictures(tmp_path, 'a.png')
  (tmp_path / 'b.txt').write_text('a dog')
  (tmp_path / 'c.heic').write_bytes(b'x')
  found, notes = listed(tmp_path, rows(
    row('gone.png', 'x'), row('a.png', 'a cat'), row('dogs/gone.png', 'y'), {'text': 'z'}
  ))
  assert found == {'a': ['a cat']}
  assert notes == (
    f'of {tmp_path} not everything is used: rows without file_name: 1, such as line 4 of '
    'metadata.jsonl; rows without a picture: 2, such as dogs/gone.png; texts beside no picture: 1, '
    'such as b.txt; files of another kind (.heic): 1, such as c.heic.'
  )


CSV = 'file_name,text\na.png,"a cat,\n""Tom"", on a mat"\nb.png,a dog\nb.png,a puppy\nb.png,a dog\n'


@pytest.mark.parametrize(('name', 'text'), [
  ('metadata.csv', CSV), ('metadata.csv', '\ufeff' + CSV),
  ('metadata.tsv', CSV.replace('g,', 'g\t').replace('e,', 'e\t')),
  ('metadata.csv', CSV.replace('g,', 'g;').replace('e,', 'e;')),
  ('METADATA.CSV', CSV.replace('file_name,text', 'Image, Caption ') + '\n,\n'),
])
def test_csv(tmp_path, name, text):
  pictures(tmp_path, 'a.png', 'b.png')
  found, notes = listed(tmp_path, text, name)
  assert found == {'a': ['a cat,\n"Tom", on a mat'], 'b': ['a dog', 'a puppy']}
  assert notes == ''


@pytest.mark.parametrize(('name', 'text', 'reason'), [
  ('metadata.csv', 'file_name,text\na.png,a cat, on a mat\n', 'line 2: 3 values for 2 columns'),
  ('metadata.csv', 'file_name,text\na.png,"a cat\n', 'line 2: unexpected end of data'),
  ('metadata.csv', 'file_name,text\na.png,caf\xe9\n'.encode('latin-1'), "'utf-8' codec"),
  ('metadata.csv', 'file_name,text\na.png,a\0cat\n', 'line 1: it has null characters'),
  ('metadata.csv', f'file_name,text\na.png,{"a" * 200_000}\n', 'line 2: field larger than'),
  ('metadata.jsonl', rows(row('a.png', 'x')) + '{"file_name": "a', 'line 2: '),
  ('metadata.jsonl', '[1]\n', 'line 1: it is no object, but a list'),
  ('metadata.jsonl', '[' * 100_000, 'line 1: it is nested'),
  ('metadata.jsonl', r'{"file_name": "a.png", "text": "\ud800"}', 'line 1: it holds half a char'),
  ('metadata.jsonl', '{"text": "' + 'a' * 3_000_000 + '"}', 'a line has more than'),
])
def test_damaged_lists_are_refused_by_line(tmp_path, name, text, reason):
  pictures(tmp_path, 'a.png')
  with pytest.raises(UserError) as error:
    listed(tmp_path, text, name)
  assert f'{tmp_path / name} cannot be read ({reason}' in str(error.value)


def test_which_source_counts(tmp_path):
  pictures(tmp_path, 'a.png', 'b.png', 'in/c.png', 'in/d.png', 'e.png')
  (tmp_path / 'a.txt').write_text('beside\n')
  (tmp_path / 'a.caption').write_text('other\n')
  (tmp_path / 'e.txt').write_text('\n')
  (tmp_path / 'metadata.csv').write_text('file_name,text\nb.png,from csv\nin/d.png,far csv\n')
  (tmp_path / 'in').joinpath('metadata.jsonl').write_text(rows(row('c.png', 'near')))
  found, notes = listed(tmp_path, rows(
    row('a.png', 'list'), row('b.png', 'from jsonl'), row('in/c.png', 'far'), row('e.png', 'e'),
  ))
  assert found == {
    'a': ['beside'], 'b': ['from jsonl'], 'e': ['e'], 'in/c': ['near'], 'in/d': ['far csv'],
  }
  for part in ('rows of pictures that have a text beside them: 1, such as a.png',
               'rows of pictures that another list names first: 2, such as in/c.png',
               'texts beside pictures that have another: 1, such as a.caption'):
    assert part in notes


def test_one_column_may_be_chosen(tmp_path):
  pictures(tmp_path, 'a.png')
  text = rows({'file_name': 'a.png', 'text': 'raw', 'Blip': 'a cat'})
  assert listed(tmp_path, text)[0] == {'a': ['raw']}
  assert opened(tmp_path, caption_column='Blip')[0] == {'a': ['a cat']}
  with pytest.raises(UserError, match=r'lists without a column none: 1, such as metadata.jsonl'):
    opened(tmp_path, caption_column='none')


def test_splits_with_a_list_above_them(tmp_path):
  pictures(tmp_path, 'train/a.png', 'test/b.png', 'validation/c.png', 'd.png')
  (tmp_path / 'metadata.jsonl').write_text(rows(
    row('train/a.png', 'a cat'), row('test/b.png', 'a dog'), row('d.png', 'x')
  ))
  train, test = folder_sources(tmp_path, 4)
  assert (train[0]['id'], train[0]['captions']) == ('a', ['a cat'])
  assert (test[0]['id'], test[0]['captions']) == ('b', ['a dog'])
  assert 'pictures outside of train and test: 2, such as d.png' in train.notes[0]


@pytest.mark.parametrize('name', ['validation', 'Test', 'val'])
def test_splits_by_other_names(tmp_path, name):
  pictures(tmp_path, 'Train/a.png', f'{name}/b.png')
  assert [len(source) for source in folder_sources(tmp_path, 4, 'x')] == [1, 1]


def test_a_folder_train_alone_is_split_by_content(tmp_path):
  pictures(tmp_path, 'train/a.png', 'train/in/b.png')
  (tmp_path / 'test').mkdir()
  train, test = folder_sources(tmp_path, 4, 'x')
  assert [train[i]['id'] for i in range(2)] == ['a', 'in/b'] and test.measured.trained_on


def test_what_is_hidden_or_no_file_is_counted(tmp_path):
  pictures(tmp_path, 'a.png', '._a.png', '__MACOSX/a.png', '.git/x.png')
  os.mkfifo(tmp_path / 'pipe.png')
  (tmp_path / 'gone.png').symlink_to('nowhere.png')
  (tmp_path / 'round.png').symlink_to('round.png')
  found, notes = opened(tmp_path, 'x')
  assert found == {'a': ['x']}
  for part in ('hidden files: 1, such as ._a.png', 'hidden folders: 2, such as .git',
               'pipes, sockets and devices: 1, such as pipe.png',
               'links that lead nowhere: 2, such as gone.png'):
    assert part in notes


def test_links_to_folders_are_followed_once(tmp_path):
  root = tmp_path / 'data'
  pictures(root, 'z/a.png')
  pictures(tmp_path, 'elsewhere/b.png', 'elsewhere/in/c.png')
  (root / 'again').symlink_to('z')
  (root / 'link').symlink_to(tmp_path / 'elsewhere')
  (tmp_path / 'elsewhere' / 'back').symlink_to(root)
  (root / 'up').symlink_to('..')
  (root / 'linked.png').symlink_to(tmp_path / 'elsewhere' / 'b.png')
  found, notes = opened(root, 'x')
  assert sorted(found) == ['link/b', 'link/in/c', 'linked', 'z/a']
  assert 'links to folders that are read already, or above: 3, such as again' in notes


SEEDS = {
  'metadata.jsonl': rows(row('a.png', ['x', 'y']), {'file_name': 'b.png', 'caption': None}),
  'metadata.csv': 'file_name,text\n"a.png","x, ""y"""\nb.png,z\n',
  'metadata.tsv': 'file_name\ttext\na.png\tx\n', 'a.txt': 'café\nx\n',
}
PIECES = [
  b'"', b',', b'\n', b'\r', b'\0', b'\xff\xfe', b'\xef\xbb\xbf', b'[', b'{', b'NaN', b'1e999',
  b'\\ud800', b'null', b'../', b'/', b'\\', b'C:', b'\t', b';', b'9' * 30, b'\x85', b'\xe2\x80\xa8',
]


def test_mutants_are_read_or_refused_in_one_sentence(tmp_path):
  rng = random.Random(0)
  pictures(tmp_path, 'a.png', 'b.png')
  read = 0
  for _ in range(500):
    name = rng.choice([*SEEDS])
    data = bytearray(SEEDS[name].encode(rng.choice(['utf-8'] * 4 + ['utf-16', 'utf-16-le'])))
    for _ in range(rng.randint(1, 5)):
      place = rng.randrange(len(data))
      data[place : place + rng.randrange(4)] = rng.choice([*PIECES, bytes([rng.randrange(256)])])
    (tmp_path / name).write_bytes(data)
    try:
      source = folder_sources(tmp_path, 4, 'a thing')[0]
      texts = [record['captions'] for record in source]
      assert all(text.strip() for each in texts for text in each) and all(texts)
      read += 1
    except UserError as error:
      assert '\n' not in str(error)
    (tmp_path / name).unlink()
  assert 50 < read < 450


WORDS = 'a café\nκόκκινο μήλο'


@pytest.mark.parametrize('data', [
  WORDS.encode(), WORDS.encode('utf-8-sig'), '\ufeff'.encode() + WORDS.encode('utf-8-sig'),
  WORDS.encode('utf-16'), '\ufeff'.encode('utf-16-be') + WORDS.encode('utf-16-be'),
  '\ufeff'.encode('utf-16-le') + WORDS.encode('utf-16-le'), WORDS.encode('utf-32'),
  WORDS.replace('\n', '\r\n').encode(), WORDS.replace('\n', '\r').encode(),
  WORDS.replace('\n', '\n\n \r\n\t').encode() + b'\n',
  WORDS.replace('\n', ' \n\ufeff').encode(),  # Two files that were put together.
])
def test_marks_and_ends_of_lines_are_no_text(tmp_path, data):
  (tmp_path / 'a.txt').write_bytes(data)
  assert read_lines(tmp_path / 'a.txt') == WORDS.split('\n')


@pytest.mark.parametrize('mark', [*'\v\f\x1c\x1d\x1e\x85\u2028\u2029'])
def test_other_separators_stay_within_a_line(mark):
  assert lines_of(f'a cat{mark}on a mat\nx', 'it') == [f'a cat{mark}on a mat', 'x']


def test_the_locale_does_not_matter(tmp_path):
  """Under one of ASCII Python would decode, and fail at, other text than under one of UTF-8."""
  (tmp_path / 'prompts.txt').write_bytes(WORDS.encode())
  code = ('import sys, pathlib; from diffusion_jax.data.captions import read_lines; '
          'print(ascii(read_lines(sys.argv[1])))')
  done = subprocess.run(
    [sys.executable, '-c', code, tmp_path / 'prompts.txt'], cwd=ROOT, capture_output=True,
    text=True, env={**os.environ, 'LC_ALL': 'C', 'PYTHONUTF8': '0', 'PYTHONCOERCECLOCALE': '0'},
    check=False,
  )
  assert done.stdout.strip() == ascii(WORDS.split('\n')), done.stderr


@pytest.mark.parametrize(('data', 'reason'), [
  (b'caf\xe9', 'invalid continuation byte|unexpected end of data'),
  ('a cat'.encode('utf-16-le'), 'null characters'),
  (b'\xff\xfea', 'truncated data'),
  (b'a' * (LONGEST + 1), f'has {LONGEST + 1:,} characters'),
  (b'a\n' * (MOST_BYTES // 2 + 1), f'more than {MOST_BYTES:,} bytes'),
])
def test_what_is_no_text_is_one_sentence(tmp_path, data, reason):
  (tmp_path / 'a.txt').write_bytes(data)
  with pytest.raises(UserError, match=reason) as error:
    read_lines(tmp_path / 'a.txt', 'captions')
  assert 'a.txt' in str(error.value) and '\n' not in str(error.value)


def test_half_characters_are_refused():
  """As Python makes them of arguments that are not UTF-8."""
  with pytest.raises(UserError, match=r'data\.caption is not UTF-8'):
    lines_of(os.fsdecode(b'caf\xe9'), 'data.caption')


def test_pipes_folders_and_nothing(tmp_path):
  os.mkfifo(tmp_path / 'pipe.txt')  # To open it would wait for ever.
  for name, reason in (('pipe.txt', 'no regular file'), ('.', 'no regular file'),
                       ('none.txt', 'No such file')):
    with pytest.raises(UserError, match=reason):
      read_lines(tmp_path / name)


def test_every_command_reads_prompts_captions_and_labels_so(finished, command, fails, tmp_path):
  """Of `sample --prompts` the names of the pictures tell what was read."""
  prompts = tmp_path / 'prompts.txt'
  prompts.write_bytes('\ufeffred\u2028apple\r\n\r\ncat face\r\n'.encode())
  out = tmp_path / 'pictures'
  arguments = ('sample', '--workdir', finished, '--prompts', prompts, '--steps', 1, '--out', out)
  assert command(*arguments) == 0
  assert sorted(path.name for path in out.iterdir()) == [
    '0000_red_apple.png', '0001_cat_face.png', 'grid.png'
  ]
  prompts.write_bytes(b'caf\xe9')
  assert 'the prompts file' in fails(*arguments)
  bad = ('--out', tmp_path / 'scores.json', '--captions', prompts)
  assert 'the captions' in fails('evaluate', 'model', '--workdir', finished, *bad)
  good = tmp_path / 'captions.txt'
  good.write_text('cat\n', encoding='utf-8')
  assert 'the labels' in fails(
    'evaluate', 'model', '--workdir', finished, '--out', tmp_path / 'scores.json', '--captions',
    good, '--labels', prompts,
  )


def _opens_text_as_the_locale_says(node):
  """A call of open, read_text or write_text without encoding, of a file that is not binary."""
  if not isinstance(node, ast.Call) or any(k.arg == 'encoding' for k in node.keywords):
    return False
  if isinstance(node.func, ast.Name):
    mode = ast.unparse(node.args[1]) if len(node.args) > 1 else 'r'
    return node.func.id == 'open' and 'b' not in mode
  name = getattr(node.func, 'attr', '')
  if name in ('read_text', 'write_text'):
    # `RunDirectory` has a method of that name.
    return not ast.unparse(node.func.value).endswith(('directory', 'self'))
  modes = [a.value for a in node.args if isinstance(a, ast.Constant)]
  return name == 'open' and bool({*modes} & {'r', 'w', 'a', 'x', 'r+', 'w+', 'a+', 'rt', 'wt'})


def test_no_file_is_decoded_as_the_locale_says():
  found = [
    f'{path.relative_to(ROOT)}:{node.lineno}'
    for path in sorted((ROOT / 'diffusion_jax').rglob('*.py'))
    for node in ast.walk(ast.parse(path.read_text(encoding='utf-8')))
    if _opens_text_as_the_locale_says(node)
  ]
  assert found == []


def test_several_weighted_captions_and_tags(tmp_path):
  """In lists, in JSON beside a picture, and in tables; each is chosen as often as its weight says.
  """
  import pyarrow
  import pyarrow.parquet

  pictures(tmp_path, 'a.png', 'b.png', 'c.png', 'd.png', 'e/f.png')
  (tmp_path / 'metadata.jsonl').write_text(rows(
    {'file_name': 'a.png', 'captions': [['a cat', 3], 'a kitten', {'text': 'puss', 'weight': 0.5},
                                        ['bad', -1], ['bad', True]], 'tags': ['no']},
    {'file_name': 'b.png', 'tags': ['red', ' round ', '']},
  ))
  (tmp_path / 'c.json').write_text(json.dumps({'caption': ['x', 'y'], 'weights': [1, 2]}))
  (tmp_path / 'd.json').write_text(json.dumps({'url': 'none'}))
  (tmp_path / 'other.json').write_text('no JSON')
  pyarrow.parquet.write_table(
    pyarrow.table({'file_name': ['f.png', 'gone.png'], 'text': ['from a table', 'x']}),
    tmp_path / 'e' / 'metadata.parquet',
  )
  source, _ = folder_sources(tmp_path, 4, '{name} in {folder}\n{name}')
  found = {record['id']: (record['captions'], record.get('caption_weights')) for record in source}
  assert found == {
    'a': (['a cat', 'a kitten', 'puss'], [3, 1, 0.5]), 'b': (['red, round'], None),
    'c': (['x', 'y'], [1, 2]), 'd': (['d'], None), 'e/f': (['from a table'], None),
  }
  notes = ''.join(source.notes)
  for part in ('captions whose weight is no number above 0: 1', 'captions that are a list: 1',
               'JSON beside pictures without text: 1, such as d.json', '(.json): 1, such as other',
               'rows without a picture: 1, such as e/gone.png'):
    assert part in notes
  choose, rng = build_transforms(['choose_caption'])[0], np.random.default_rng(0)
  chosen = Counter(choose(source[0], rng)['caption'] for _ in range(900))
  for text, share in (('a cat', 3), ('a kitten', 1), ('puss', 0.5)):
    assert abs(chosen[text] - 200 * share) < 60
  before = source.fingerprint()['captions']
  (tmp_path / 'c.json').write_text(json.dumps({'caption': ['x', 'y'], 'weights': [1, 3]}))
  after, _ = folder_sources(tmp_path, 4, '{name} in {folder}\n{name}')
  assert after.fingerprint()['captions'] != before
  (tmp_path / 'c.json').write_text('{"caption": "x"')
  with pytest.raises(UserError, match=r'c\.json is not readable JSON'):
    folder_sources(tmp_path, 4, 'x')


def test_words_of_a_path_are_a_caption(tmp_path):
  pictures(tmp_path, 'wild animals/Red_fox-02.png', '07.png')
  with pytest.raises(UserError, match=r'07\.png has no caption'):
    opened(tmp_path, '{folder}: {name}')
  found, _ = opened(tmp_path, '{folder}: {name}\n{name}\na {thing}')
  assert found == {
    'wild animals/Red_fox-02': ['wild animals: Red fox', 'Red fox', 'a {thing}'],
    '07': ['a {thing}'],
  }
