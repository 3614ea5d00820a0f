"""Docstrings as Markdown means them: shapes in brackets are no links, powers no emphasis.

An extension of Griffe, by which mkdocstrings reads the package (mkdocs.yml).
"""

import re

import griffe

_SPECIAL = re.compile(r'(`[^`]+`)|([\\\[\]>*_])|<')
_NAMED = re.compile(r'( +(?:[\w*]+(?:, )?)+: )?(.*)')
SECTIONS = ('Args:', 'Returns:', 'Yields:', 'Raises:')


def to_markdown(text: str) -> str:
  """Escape what is no markup, outside of code; a paragraph that is indented is shown as it stands.

  Names of arguments, and the indentation by which they are found, are left alone.
  """
  return '\n\n'.join(map(_paragraph, text.split('\n\n')))


def _paragraph(text: str) -> str:
  first, *rest = lines = text.splitlines() or ['']
  if first in SECTIONS:
    return '\n'.join([first, *map(_argument, rest)])
  if all(line.startswith('  ') for line in lines):
    return '\n'.join(f'    {line}' for line in lines)
  return _escaped(text)


def _argument(line: str) -> str:
  name, text = _NAMED.fullmatch(line).groups()
  return (name or '') + _escaped(text)


def _escaped(text: str) -> str:
  # Markdown knows no backslash before this one.
  return _SPECIAL.sub(lambda found: found[1] or (f'\\{found[2]}' if found[2] else '&lt;'), text)


class Escaped(griffe.Extension):
  """Changes each docstring before it is parsed."""

  def on_instance(self, *, obj: griffe.Object, **kwargs) -> None:
    if obj.docstring and not obj.is_alias:
      obj.docstring.value = to_markdown(obj.docstring.value)
