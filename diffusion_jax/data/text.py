"""People's text out of files: one way to decode it, one way to tell lines apart."""

import codecs
import re
from collections.abc import Iterator
from pathlib import Path

from diffusion_jax.errors import UserError
from diffusion_jax.files import first_line

MOST_BYTES = 2**26
"""Of a file that is read as a whole: a million prompts."""
LONGEST = 2**16
"""Characters of one text; no text encoder reads a hundredth of it."""
_MARKS = (
  (codecs.BOM_UTF32_LE, 'utf-32'), (codecs.BOM_UTF32_BE, 'utf-32'), (codecs.BOM_UTF8, 'utf-8-sig'),
  (codecs.BOM_UTF16_LE, 'utf-16'), (codecs.BOM_UTF16_BE, 'utf-16'),
)
_LINE_END = re.compile(r'\r\n|\r|\n')
_OPEN_ALREADY = ('/dev/stdin', '/dev/fd/', '/proc/self/fd/')
"""Where a shell hands over what another command writes."""


def read_lines(path: str | Path, what: str = 'text') -> list[str]:
  """The lines of a file that are not blank, without the blanks around them.

  It is UTF-8, whatever the locale, or what its byte order mark says, which is no text itself. Only
  CR, LF and both end a line: others of Unicode's separators may stand within a caption.

  Args:
    what: it is called in errors, such as 'captions'.

  Raises:
    UserError: no regular file, no text, more than MOST_BYTES, or a line of more than LONGEST
      characters.
  """
  path = Path(path)
  try:
    if not path.is_file() and path.exists() and not str(path).startswith(_OPEN_ALREADY):
      raise ValueError('it is no regular file')
    with path.open('rb') as file:
      data = file.read(MOST_BYTES + 1)
    if len(data) > MOST_BYTES:
      raise ValueError(f'it has more than {MOST_BYTES:,} bytes')
    text = _checked(data.decode(encoding_of(data)))
  except (OSError, ValueError) as error:
    raise UserError(
      f'the {what} {path} cannot be read ({first_line(error)}); give UTF-8 text.'
    ) from error
  return lines_of(text, path)


def lines_of(text: str, where: str | Path) -> list[str]:
  """The lines of a text that are not blank, without the blanks around them.

  UserError, which names `where`, for a line of more than LONGEST characters, or half ones.
  """
  check_characters(text, where)
  lines = [line for part in _LINE_END.split(text) if (line := clean(part))]
  for line in lines:
    if len(line) > LONGEST:
      raise UserError(
        f'a line of {where} has {len(line):,} characters; write at most {LONGEST:,}.'
      )
  return lines


def check_characters(text: str, where: str | Path) -> None:
  """UserError for halves of characters, which stand for bytes that are not UTF-8."""
  try:
    text.encode()
  except UnicodeEncodeError as error:
    raise UserError(f'{where} is not UTF-8 ({first_line(error)}); write it as UTF-8.') from error


def clean(text: str) -> str:
  """Without blanks around it, and byte order marks, which remain where files were put together."""
  return text.strip().strip('\ufeff').strip()


def encoding_of(start: bytes) -> str:
  """That of a file by its first bytes."""
  return next((name for mark, name in _MARKS if start.startswith(mark)), 'utf-8')


def stream_lines(path: Path, longest: int = LONGEST) -> Iterator[str]:
  """Decoded lines, their ends kept, of a file that may be larger than memory.

  ValueError for what is no text, or a line of more than `longest` characters.
  """
  with path.open('rb') as file:
    encoding = encoding_of(file.read(4))
  with path.open(encoding=encoding, newline='') as lines:
    while line := lines.readline(longest + 1):
      if len(line) > longest:
        raise ValueError(f'a line has more than {longest:,} characters')
      yield _checked(line)


def _checked(text: str) -> str:
  if '\0' in text:
    raise ValueError('it has null characters, as UTF-16 without its mark has, or what is no text')
  return text
