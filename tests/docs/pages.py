"""README.md, CONTRIBUTING.md and the pages under docs, with their blocks, spans and commands."""

import re
import shlex
from typing import NamedTuple

from tests.tiny import ROOT

PAGES = {path.name: path for path in (
  ROOT / 'README.md', ROOT / 'CONTRIBUTING.md', *sorted((ROOT / 'docs').glob('*.md'))
)}
SHELLS = ('sh', 'bash', 'console')
_FENCE = re.compile(r'^ *```(\w*)\n(.*?)^ *```', flags=re.DOTALL | re.MULTILINE)


class Command(NamedTuple):
  """A page, and the words of a command on it."""

  page: str
  words: tuple[str, ...]

  def __str__(self):
    return f'{self.page}: {shlex.join(self.words)}'


def blocks(text, *languages):
  """The fenced blocks in these languages."""
  return [block for language, block in _FENCE.findall(text) if language in languages]


def spans(text):
  """What stands between single backticks, outside of fenced blocks; tables' bars are unescaped."""
  found = re.findall(r'(?<!`)`([^`]+)`(?!`)', _FENCE.sub('', text))
  return [span.replace('\\|', '|').replace('\n', ' ') for span in found]


def simple_commands(script):
  """The words of each command of a script: lines that go on are joined, chains taken apart."""
  found = []
  for line in script.replace('\\\n', ' ').splitlines():
    lexer = shlex.shlex(line, posix=True, punctuation_chars='&|;')
    lexer.whitespace_split = True
    words = []
    for word in [*lexer, ';']:
      if set(word) <= set('&|;'):
        found += [tuple(words)] if words else []
        words = []
      else:
        words.append(word)
  return found


def commands():
  """Every command in a fenced block of a shell, of every page."""
  return [
    Command(name, words) for name, path in PAGES.items()
    for block in blocks(path.read_text(), *SHELLS) for words in simple_commands(block)
  ]
