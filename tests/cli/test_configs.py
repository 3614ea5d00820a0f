"""configs: every recipe is listed, copied to be edited, and found by nearly its name."""

import ast

import pytest

from diffusion_jax.cli.configs import copy, listed
from diffusion_jax.recipe import load_config, recipes

RECIPES = recipes()


def test_every_recipe_is_listed_under_its_folder_with_its_first_sentence(command, capsys):
  assert command('configs') == 0
  lines = capsys.readouterr().out.splitlines()
  assert lines == listed()
  folder, seen = '', {}
  for line in filter(None, lines):
    if line.startswith('  '):
      name, said = line.split(maxsplit=1)
      assert name.startswith(f'{folder}/') and said.endswith('.'), line
      seen[name] = said
    else:
      folder = line
  assert list(seen) == list(RECIPES)
  for name, said in seen.items():
    text = ast.get_docstring(ast.parse(RECIPES[name].read_text()))
    assert ' '.join(text.split()).startswith(said), name
  assert len(set(seen.values())) == len(seen)


@pytest.mark.parametrize('name', RECIPES)
def test_a_copy_runs_from_where_it_lies(name, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  file = copy(name, tmp_path)
  assert file == tmp_path / RECIPES[name].name
  assert load_config(str(file)).to_dict() == load_config(name).to_dict()


def test_a_copy_may_be_changed_and_replaces_nothing(command, fails, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  assert command('configs', '--copy', 'configs/toy/edm.py', '--to', 'new/mine.py') == 0
  mine = tmp_path / 'new' / 'mine.py'
  change = 'config.dtype = "own"\n  return config'
  mine.write_text(mine.read_text().replace('return config', change))
  assert load_config(str(mine)).dtype == 'own'
  before = mine.read_text()
  assert 'is there already' in fails('configs', '--copy', 'toy/edm', '--to', mine)
  assert mine.read_text() == before
  assert 'call it mine.txt.py' in fails('configs', '--copy', 'toy/edm', '--to', 'mine.txt')
  assert 'give --copy' in fails('configs', '--to', 'mine.py')
  assert 'cannot be written' in fails('configs', '--copy', 'toy/edm', '--to', '/proc/own/mine.py')
  assert command('configs', '--copy', 'toy/edm') == 0 and (tmp_path / 'edm.py').is_file()


@pytest.mark.parametrize(('name', 'near'), [
  ('openmoji/quikstart', 'openmoji/quickstart'), ('quickstart', 'openmoji/quickstart'),
  ('configs/openmoji/QuickStart.py', 'openmoji/quickstart'),
  ('openclipart/mmdit', 'openmoji/mmdit'), ('finetune/sd1.5', 'finetune/sd15'),
])
def test_an_unknown_name_leads_to_the_nearest_and_to_the_list(fails, tmp_path, name, near):
  for line in (
    fails('train', '--config', name, '--workdir', tmp_path / 'run'),
    fails('configs', '--copy', name, '--to', tmp_path / 'copy.py'),
  ):
    assert f'there is no config {name!r}; did you mean {near}' in line
    assert 'python -m diffusion_jax configs' in line


def test_a_name_like_no_other_leads_to_the_list_alone(fails, tmp_path):
  line = fails('train', '--config', 'zzzz', '--workdir', tmp_path / 'run')
  assert 'did you mean' not in line and 'python -m diffusion_jax configs' in line
