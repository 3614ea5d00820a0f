"""README.md, CONTRIBUTING.md and the pages under docs: links, names and tables are in force."""

import ast
import dataclasses
import importlib.util
import re

import pytest

from diffusion_jax import registry
from diffusion_jax.cli.main import COMMANDS, make_parser
from diffusion_jax.config import parse, untyped
from diffusion_jax.mixture import PartConfig
from diffusion_jax.recipe import load_config, recipes
from diffusion_jax.registry import TRANSFORMS
from tests.docs.pages import PAGES, blocks
from tests.tiny import ROOT

each_page = pytest.mark.parametrize('name', PAGES)


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
def test_snippets_import_what_is_there(name):
  for block in blocks(PAGES[name].read_text(), 'python'):
    for node in ast.walk(ast.parse(block)):
      if isinstance(node, ast.ImportFrom) and node.module.startswith('diffusion_jax'):
        module = importlib.import_module(node.module)
        for alias in node.names:
          assert hasattr(module, alias.name) or importlib.import_module(
            f'{node.module}.{alias.name}'
          ), alias.name


def test_every_page_is_linked_from_the_readme():
  text = PAGES['README.md'].read_text()
  beside = ('README.md', 'CONTRIBUTING.md')
  assert all(f'({name}' in text for name in beside[1:])
  assert all(f'(docs/{name}' in text for name in PAGES if name not in beside)
  assert {command for command in COMMANDS if f'| `{command} ' in text} == set(COMMANDS)


def test_the_page_of_recipes_is_the_one_in_force():
  spec = importlib.util.spec_from_file_location('recipes', ROOT / 'docs' / 'recipes.py')
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  assert PAGES['recipes.md'].read_text() == module.text(), 'run python docs/recipes.py'


def test_the_guide_has_every_kind_of_part_where_it_is():
  """A row for each table of the registry, whose rows lie in the folders that the guide names."""
  rows = re.findall(r'^\| .+ \| `([A-Z]+)` \| (?:`(.+?)`)? ?\| (.+) \|$',
                    PAGES['CONTRIBUTING.md'].read_text(), flags=re.MULTILINE)
  tables = {name: one for name, one in vars(registry).items() if isinstance(one, registry.Table)}
  assert sorted(name for name, _, _ in rows) == sorted(tables)
  parts = ROOT / 'tests' / 'extension' / 'parts'
  assert {ROOT / part for _, part, _ in rows if part} == set(parts.glob('*.py'))
  for name, _, places in rows:
    folders = re.findall(r'`(.+?/)`', places)
    assert folders and all((ROOT / folder).is_dir() for folder in folders)
    for target in tables[name].values():
      file = target.partition(':')[0].replace('.', '/')
      assert file.startswith(tuple(folders)), f'{name} has {target}; the guide says {places}'


def _keys(value, prefix=''):
  """Every dotted key of a config, sections and empty ones, too."""
  for key, inner in value.items():
    yield f'{prefix}{key}'
    if isinstance(inner, dict):
      yield from _keys(inner, f'{prefix}{key}.')


@pytest.fixture(scope='module')
def keys():
  parts = {'mixture': {'cats': dict.fromkeys(
    field.name for field in dataclasses.fields(PartConfig)
  )}}
  values = [untyped(parse(load_config(name))) for name in ('finetune/lora', 'openmoji/quickstart')]
  return {key for one in [*values, {'data': parts}] for key in _keys(one)}


def test_what_the_page_from_elsewhere_calls_ours_is_ours(keys):
  """Of its second column each span is a key, with a value that a config takes, an option of a
  command, a recipe, a command or a transform."""
  lines = PAGES['from_elsewhere.md'].read_text().splitlines()
  rows = [[cell.strip() for cell in line.split('|')[1:-1]] for line in lines if line[:1] == '|']
  options = {
    name: {text for action in sub._actions for text in action.option_strings}
    for action in make_parser()._actions if isinstance(action.choices, dict)
    for name, sub in action.choices.items()
  }
  checked = 0
  for theirs, ours, *notes in rows:
    found = re.findall(r'`([^`]+)`', ours)
    # Of a note only what is written as a key and its value; the rest may be theirs.
    found += [span for span in re.findall(r'`([^`]+)`', ' '.join(notes))
              if span.partition('=')[0] in keys and '.' in span]
    recipe = next((span for span in found if span in recipes()), 'finetune/sd15')
    commands = [span for span in found if span in options]
    given = [span for span in found if '=' in span and not span.startswith('--')]
    for span in found:
      checked += 1
      if span.startswith('--'):
        known = any(span in options[command] for command in commands)
      else:
        known = span in keys or span in given or span in {*recipes(), *COMMANDS, *TRANSFORMS}
      assert known, f'{theirs}: {span}'
    # Of one row, values of one key are alternatives, and those of several belong together.
    alternatives = len({span.partition('=')[0] for span in given}) < len(given)
    for one in [[span] for span in given] if alternatives else [given]:
      parse(load_config(recipe, [f'--config.{span}' for span in one]))
  assert checked > 150
