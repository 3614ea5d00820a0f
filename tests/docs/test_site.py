"""The site is built from docs, README.md, CONTRIBUTING.md and the docstrings, without a warning."""

import ast
import html
import json
import logging
import re

import pytest

from tests.tiny import ROOT

pytest.importorskip('mkdocs')


def _build(folder):
  """Fill it with the site, and with a list of what the build warned of."""
  from mkdocs.commands.build import build
  from mkdocs.config import load_config

  warnings, handler = [], logging.Handler(logging.WARNING)
  handler.emit = lambda record: warnings.append(record.getMessage())
  logging.getLogger('mkdocs').addHandler(handler)
  try:
    build(load_config(str(ROOT / 'mkdocs.yml'), site_dir=str(folder / 'site'), strict=False))
  finally:
    logging.getLogger('mkdocs').removeHandler(handler)
  (folder / 'warnings.json').write_text(json.dumps(warnings))


@pytest.fixture(scope='session')
def site(once):
  """(folder of the built site, warnings)."""
  folder = once('documentation', _build)
  return folder / 'site', json.loads((folder / 'warnings.json').read_text())


def test_it_is_built_without_a_warning_and_asks_no_network(site):
  out, warnings = site
  assert not warnings, warnings[:5]
  for file in out.rglob('*.html'):
    loaded = re.findall(r'<(?:script|link|img|iframe)[^>]*(?:src|href)="((?:https?:)?//[^"]+)"',
                        file.read_text())
    assert not loaded, f'{file.name}: {loaded[:3]}'
  for file in out.rglob('*.css'):
    assert not re.search(r'(?:url\(|@import )["\']?(?:https?:)?//', file.read_text()), file.name


def _documented(node, name):
  """(dotted name, docstring) of a module or class and of what is public in it."""
  if text := ast.get_docstring(node):
    yield name, text
  for inner in node.body:
    if isinstance(inner, ast.ClassDef) and not inner.name.startswith('_'):
      yield from _documented(inner, f'{name}.{inner.name}')
    elif isinstance(inner, ast.FunctionDef) and not inner.name.startswith('_'):
      if text := ast.get_docstring(inner):
        yield f'{name}.{inner.name}', text


def test_every_public_docstring_is_on_a_page_as_it_was_written(site):
  """Its first paragraph as a browser shows it: no markup took a character away, or left one."""
  out, _ = site
  shown = {}
  for file in (out / 'reference').glob('*.html'):
    text = file.read_text().partition('<article')[2].partition('</article>')[0]
    shown[file.stem] = ' '.join(html.unescape(re.sub(r'<[^>]+>', '', text)).split())
  package, missing, count = ROOT / 'diffusion_jax', [], 0
  for path in sorted(package.rglob('*.py')):
    *folders, name = path.relative_to(package).with_suffix('').parts
    module = ast.parse(path.read_bytes())
    if name.startswith('_') or not ast.get_docstring(module):
      continue
    page = shown[folders[0] if folders else 'modules']
    for dotted, text in _documented(module, '.'.join(('diffusion_jax', *folders, name))):
      count += 1
      if ' '.join(text.partition('\n\n')[0].replace('`', '').split()) not in page:
        missing.append(f'{dotted}: {text.splitlines()[0]}')
  assert not missing, missing[:10]
  assert count > 1000
