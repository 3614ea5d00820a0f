"""cli, what a notebook or a page asks for -> run -> build -> train, evaluation, pipelines ->
formats, data, viz -> diffusion, models -> backend, parallel.
"""

import ast

import pytest

from tests.tiny import ROOT

LAYERS = (
  ('cli', '__main__', 'session', 'notebook', 'demo'), ('run', 'planning'), ('build',),
  ('train', 'evaluation', 'pipelines', 'viz'),
  ('formats', 'data', 'checkpoint', 'runs'), ('diffusion', 'models'),
  ('backend', 'parallel'),
)
SHARED = {
  'types', 'errors', 'config', 'configs',
  'files', 'pixels', 'registry', 'limits', 'mixture', 'recipe', 'sizes', '__init__',
}
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}
PACKAGE = ROOT / 'diffusion_jax'
FILES = sorted(PACKAGE.rglob('*.py'))


def _own(path):
  return path.relative_to(PACKAGE).with_suffix('').parts[0]


def _imported(path):
  """Parts of the package that a file imports, wherever in the file."""
  for node in ast.walk(ast.parse(path.read_text())):
    names = []
    if isinstance(node, ast.ImportFrom):
      assert node.level == 0, f'{path} imports relatively'
      names = [f'{node.module}.{alias.name}' for alias in node.names]
    elif isinstance(node, ast.Import):
      names = [alias.name for alias in node.names]
    for name in names:
      parts = name.split('.')
      if parts[0] == 'diffusion_jax' and len(parts) > 1 and not parts[1].startswith('__version'):
        yield parts[1]


@pytest.mark.parametrize('path', FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_one_way(path):
  own = _own(path)
  assert own in RANK or own in SHARED, f'{own} has no layer; add it to LAYERS'
  for part in _imported(path):
    if own in SHARED:
      assert part in SHARED, f'{own} imports {part}'
    elif part not in SHARED:
      assert RANK[part] >= RANK[own], f'{own} imports {part}'
      assert {own, part} != {'models', 'diffusion'}, f'{own} imports {part}'


def test_only_recipe_knows_a_config_dict():
  readers = {
    str(path.relative_to(PACKAGE)) for path in FILES if 'ml_collections' in path.read_text()
  }
  assert readers == {'recipe.py'}


def test_every_layer_exists():
  assert set(RANK) | SHARED >= {_own(path) for path in FILES} >= set(RANK)
