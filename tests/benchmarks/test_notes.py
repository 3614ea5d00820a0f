"""The table of systems: made of what was measured, and of recipes that there are."""

import json

import pytest

from benchmarks import notes

ENTRY = {
  'commands': [], 'steps': 8, 'train_seconds': 600.0, 'parameters': 2_500_000,
  'generated': {'fd_clip': 20.19, 'clip_score': 49.34, 'retrieval_r1': 0.216},
  'untrained': {'fd_clip': 270.8},
}


def test_the_readme_has_the_table_of_what_was_measured():
  text = notes.README.read_text(encoding='utf-8')
  assert notes.replaced(text) == text


@pytest.mark.parametrize('name', notes.SYSTEMS)
def test_each_system_has_a_recipe_and_comes_after_what_it_takes(name):
  system, order = notes.SYSTEMS[name], list(notes.SYSTEMS)
  assert (notes.ROOT / 'configs' / system.recipe).is_file()
  assert all(order.index(before) < order.index(name) for before in system.before)


def test_a_cascade_is_put_together_before_it_is_scored():
  found = notes.commands('imagen')
  assert list(found) == ['train', 'cascade', 'scores']
  joined = ' '.join(found['cascade'])
  order = ('imagen_base', 'imagen_32', 'imagen')
  places = [joined.index(f'runs/notes/{name}/model') for name in order]
  assert places == sorted(places) and joined.endswith('runs/notes/imagen/cascade --layout cascade')
  assert '--model runs/notes/imagen/cascade' in ' '.join(found['scores'])


def test_entries_are_kept_in_the_order_of_the_systems(tmp_path, monkeypatch):
  """An entry replaces its own; a row has its figures, and none that were not measured."""
  monkeypatch.setattr(notes, 'FIGURES', tmp_path / 'notes.json')
  other = notes.SYSTEMS['latent_diffusion']._replace(title='Other')
  systems = {'latent_diffusion': notes.SYSTEMS['latent_diffusion'], 'other': other}
  monkeypatch.setattr(notes, 'SYSTEMS', systems)
  notes.add('other', {key: ENTRY[key] for key in ('train_seconds', 'parameters')})
  notes.add('latent_diffusion', ENTRY | {'steps': 4})
  notes.add('latent_diffusion', ENTRY)
  assert next(iter(json.loads(notes.FIGURES.read_text()).values())) == ENTRY
  _, _, first, second = notes.table().splitlines()
  assert '| 10 min | 2.5 M | 20.2 (271) | 49.3 | 0.22 |  |' in first
  assert second.startswith('| 5. Other | `configs/openmoji/dit_flow.py` | 10 min | 2.5 M |  |  |')
