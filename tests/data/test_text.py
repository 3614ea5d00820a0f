"""Text that people wrote: how it is decoded, what ends a line, what is refused."""

import ast
import os
import subprocess
import sys

import pytest

from diffusion_jax.data.captions import LONGEST, MOST_BYTES, lines_of, read_lines
from diffusion_jax.errors import UserError
from tests.tiny import ROOT

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
