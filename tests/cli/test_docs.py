"""README.md and the pages under docs: links lead somewhere, commands parse, snippets import."""

import ast
import importlib
import re
import shlex

import pytest

from diffusion_jax.cli.main import COMMANDS, make_parser
from tests.tiny import ROOT

PAGES = {path.name: path for path in (ROOT / 'README.md', *sorted((ROOT / 'docs').glob('*.md')))}
each_page = pytest.mark.parametrize('name', PAGES)


def _blocks(text, *languages):
  found = re.findall(r'^```(\w*)\n(.*?)^```', text, flags=re.DOTALL | re.MULTILINE)
  return [block for language, block in found if language in languages]


def _commands(text):
  """Arguments of each `python -m diffusion_jax`, with lines that go on joined."""
  lines = '\n'.join(_blocks(text, 'sh', 'bash')).replace('\\\n', ' ').splitlines()
  found = (re.search(r'(?:python -m diffusion_jax|diffusion-jax) (.+)', x) for x in lines)
  return [shlex.split(match[1], comments=True) for match in found if match]


@each_page
def test_links_and_paths_lead_somewhere(name):
  path = PAGES[name]
  text = path.read_text()
  for link in re.findall(r'(?:\]\(|src=")([^)"\s#]+)', text):
    if not re.match(r'\w+:', link):
      assert (path.parent / link).exists(), link
  for file in re.findall(r'`((?:[\w.-]+/)+[\w.-]+\.(?:py|md|json|sh|toml))`', text):
    places = (ROOT / file, ROOT / 'diffusion_jax' / file, ROOT / 'configs' / file)
    assert any(place.exists() for place in places) or 'WORKDIR' in file, file


@each_page
def test_commands_parse(name):
  for arguments in _commands(PAGES[name].read_text()):
    known, rest = make_parser().parse_known_args(arguments)
    assert known.command in COMMANDS
    assert all(argument.startswith('--config.') for argument in rest), (arguments, rest)
    config = getattr(known, 'config', None)
    if config and config.startswith('configs/'):
      assert (ROOT / config).exists(), config


@each_page
def test_snippets_import_what_is_there(name):
  for block in _blocks(PAGES[name].read_text(), 'python'):
    for node in ast.walk(ast.parse(block)):
      if isinstance(node, ast.ImportFrom) and node.module.startswith('diffusion_jax'):
        module = importlib.import_module(node.module)
        for alias in node.names:
          assert hasattr(module, alias.name) or importlib.import_module(
            f'{node.module}.{alias.name}'
          ), alias.name


def test_every_page_is_linked_from_the_readme():
  text = PAGES['README.md'].read_text()
  assert all(f'(docs/{name}' in text for name in PAGES if name != 'README.md')
  assert {command for command in COMMANDS if f'| `{command} ' in text} == set(COMMANDS)
