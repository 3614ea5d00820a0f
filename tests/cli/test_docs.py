"""The pages under docs name what exists; docs/diffusion.md shows drawings that draw makes."""

import dataclasses
import importlib
import re

import pytest

from diffusion_jax.cli.main import COMMANDS
from diffusion_jax.config import SafetyConfig
from diffusion_jax.diffusion.losses import WEIGHTINGS
from diffusion_jax.diffusion.parameterization import PREDICTIONS
from diffusion_jax.diffusion.processes import PROCESSES
from diffusion_jax.diffusion.samplers import infos
from diffusion_jax.models.network import ATTENTION, REMAT
from diffusion_jax.parallel.mesh import MeshConfig
from diffusion_jax.runs import keeper
from tests.tiny import ROOT

SAMPLERS = infos()

TEXT = (ROOT / 'docs' / 'diffusion.md').read_text()
PLAIN = {*PREDICTIONS, *WEIGHTINGS, *SAMPLERS}
NAMES = sorted({*re.findall(r'`([^`\n]+)`', re.sub(r'```.*?```', '', TEXT, flags=re.DOTALL))})


def exists(name):
  """A table's key, a path, or module.name below diffusion_jax.diffusion."""
  if name in PLAIN:
    return True
  if '/' in name:
    return (ROOT / name).exists()
  module, _, rest = name.partition('.')
  try:
    found = importlib.import_module(f'diffusion_jax.diffusion.{module}')
    return bool(rest) and hasattr(found, rest)
  except ModuleNotFoundError:
    return False


@pytest.mark.parametrize('name', NAMES)
def test_every_name_in_code_font_exists(name):
  assert exists(name), f'docs/diffusion.md names {name}, which is not in the package'


def test_a_name_that_does_not_exist_is_found():
  assert not exists('samplers.nobody') and not exists('nobody.SAMPLERS') and not exists('nobody')


def test_the_tables_are_complete():
  first = set(re.findall(r'^\| `(\w+)` \|', TEXT, flags=re.MULTILINE))
  assert first == {*PREDICTIONS, *WEIGHTINGS}
  assert {name for name in PROCESSES if f'`processes.{name}`' in TEXT} == set(PROCESSES)


def test_every_drawing_shown_is_there_and_shown_once():
  shown = re.findall(r'(?:\]\(|src=")(\w+\.svg)', TEXT)
  assert sorted(shown) == sorted(path.name for path in (ROOT / 'docs').glob('*.svg'))


def test_the_readme_has_a_row_for_each_command():
  table = re.findall(r'^\| `(\w+) ', (ROOT / 'README.md').read_text(), flags=re.MULTILINE)
  assert set(table) == set(COMMANDS) and '(docs/diffusion.md)' in (
    ROOT / 'README.md'
  ).read_text()


def test_the_page_on_parallelism_names_every_key_and_kind():
  page = (ROOT / 'docs' / 'parallelism.md').read_text()
  keys = {field.name for field in dataclasses.fields(MeshConfig)}
  assert set(re.findall(r'mesh\.(\w+)', page)) - {'py'} == keys
  assert set(re.findall(r'^- `(\w+)`', page, flags=re.MULTILINE)) == set(REMAT)
  for path in re.findall(r'`([\w/]+\.py)', page):
    assert (ROOT / path).exists(), path
  assert '(docs/parallelism.md)' in (ROOT / 'README.md').read_text()


def test_the_page_on_speed_has_a_row_for_each_way_to_compute_attention():
  page = (ROOT / 'docs' / 'speed.md').read_text()
  assert tuple(re.findall(r'^\| `(\w+)` \|', page, flags=re.MULTILINE)) == ATTENTION
  readme = (ROOT / 'README.md').read_text()
  assert all(f'`{name}`' in readme for name in ATTENTION[1:]) and '(docs/speed.md)' in readme


def test_the_page_on_operations_names_every_state_and_key():
  page = (ROOT / 'docs' / 'operations.md').read_text()
  rows = dict(re.findall(r'^\| `safety\.(\w+)` \| ([\d.]+) \|', page, flags=re.MULTILINE))
  defaults = {field.name: field.default for field in dataclasses.fields(SafetyConfig)}
  assert {name: float(value) for name, value in rows.items()} == defaults
  faults = page.partition('## What happens when')[2].partition('## What a resume')[0]
  states = set(re.findall(r'^\|[^|]+\|[^|]+\| (\w+)', faults, flags=re.MULTILINE))
  assert states == {*keeper.FINAL, 'killed', 'training'} - {'finished', 'refused'}
  assert '(docs/operations.md)' in (ROOT / 'README.md').read_text()


def test_evaluation_has_a_row_for_each_kind_of_features_and_metric():
  from diffusion_jax.registry import EXTRACTORS as features
  from diffusion_jax.registry import METRICS

  text = (ROOT / 'docs' / 'evaluation.md').read_text()
  rows = re.findall(r'^\| `([\w/]+)', text, flags=re.MULTILINE)
  assert rows == [*features, *METRICS]
