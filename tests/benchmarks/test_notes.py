"""The table of systems: made of what was measured, and of recipes that there are."""

import json
import os
import subprocess

import pytest

from benchmarks import notes
from diffusion_jax.recipe import load_config

ENTRY = {
  'commands': [], 'steps': 8, 'train_seconds': 600.0, 'parameters': 2_500_000,
  'generated': {'fd_clip': 20.19, 'clip_score': 49.34, 'retrieval_r1': 0.216},
  'untrained': {'fd_clip': 270.8},
}


def test_the_readme_has_the_table_of_what_was_measured():
  text = notes.README.read_text(encoding='utf-8')
  assert notes.replaced(text) == text


@pytest.mark.parametrize('name', notes.ALL)
def test_each_system_has_a_recipe_and_comes_after_what_it_takes(name):
  system, order = notes.ALL[name], list(notes.ALL)
  assert (notes.ROOT / 'configs' / system.recipe).is_file()
  taken = (*system.before, *system.parts)
  assert all(order.index(before) < order.index(name) for before in taken)
  recipe = load_config(str(notes.ROOT / 'configs' / system.recipe)).settings.to_dict()
  runs = {value.split('/')[2] for value in recipe.values() if str(value).startswith('runs/notes/')}
  assert system.weights or runs <= set(taken)


def test_a_cascade_is_put_together_before_it_is_scored():
  found = notes.commands('imagen')
  assert list(found) == ['train', 'cascade', 'scores']
  joined = ' '.join(found['cascade'])
  order = ('imagen_base', 'imagen_32', 'imagen')
  places = [joined.index(f'runs/notes/{name}/model') for name in order]
  assert places == sorted(places) and joined.endswith('runs/notes/imagen/cascade --layout cascade')
  assert '--model runs/notes/imagen/cascade' in ' '.join(found['scores'])


def test_a_cascade_is_put_together_again_when_a_part_is_newer(tmp_path, monkeypatch):
  """Else the scores would be those of networks that are there no more."""
  monkeypatch.setattr(notes, 'ROOT', tmp_path)
  done = []

  def run(command, **_):
    done.append(command[3])
    if command[3] == 'convert':
      cascade = tmp_path / 'runs/notes/imagen/cascade'
      cascade.mkdir()  # As the command does, for which the folder must not be there.
      (cascade / 'model_index.json').touch()
    return subprocess.CompletedProcess(command, 0)

  monkeypatch.setattr(notes.subprocess, 'run', run)
  for count, name in enumerate(('imagen_base', 'imagen_32', 'imagen'), 1):
    folder = tmp_path / 'runs/notes' / name
    (folder / 'model').mkdir(parents=True)
    (folder / 'model/weights').touch()
    os.utime(folder / 'model/weights', (1, 1))
    status = {'step': 8, 'goodput': {'step': 2.0, 'compile': 1.0}}
    (folder / 'status.json').write_text(json.dumps(status))
    (folder / 'step.json').write_text(json.dumps({'parameters': count}))
  (tmp_path / 'runs/notes/imagen/table.json').write_text('{}')
  entry = notes.measure('imagen')
  assert (entry['train_seconds'], entry['parameters']) == (9.0, 6)
  assert done == ['train', 'convert', 'evaluate']
  notes.measure('imagen')
  assert done[3:] == ['train', 'evaluate']
  os.utime(tmp_path / 'runs/notes/imagen_base/model/weights', (2**33, 2**33))
  notes.measure('imagen')
  assert done[5:] == ['train', 'convert', 'evaluate']


def test_weights_of_another_system_are_scored_with_other_options():
  found = notes.commands('ddim')
  assert list(found) == ['scores']
  words = ' '.join(found['scores'])
  assert words.startswith('evaluate model --workdir runs/notes/ddpm --sampler ddim --eta 0')
  assert words.endswith('--out runs/notes/ddim/table.json')
  words = ' '.join(notes.commands('ddim_10')['scores'])
  start = 'evaluate sweep steps=10 --workdir runs/notes/ddpm --sampler ddim --eta 0'
  assert words.startswith(start)
  assert '--steps' not in words and '/ddim_10/' in words
  assert '--model asset:text-to-image' in ' '.join(notes.commands('unet_50')['scores'])


def test_a_row_by_steps_is_the_column_of_its_sweep(tmp_path, monkeypatch):
  monkeypatch.setattr(notes, 'ROOT', tmp_path)
  for folder, file, found in (
    ('ddpm', 'status.json', {'step': 8, 'goodput': {'step': 2.0, 'compile': 1.0}}),
    ('ddpm', 'step.json', {'parameters': 3}),
    ('ddim_10', 'table.json', {'steps=10': {'fd_clip': 3.0}, 'real': {'fd_clip': 1.0}, 'best': 0}),
  ):
    (tmp_path / 'runs/notes' / folder).mkdir(parents=True, exist_ok=True)
    (tmp_path / 'runs/notes' / folder / file).write_text(json.dumps(found))
  done = lambda command, **_: subprocess.CompletedProcess(command, 0)
  monkeypatch.setattr(notes.subprocess, 'run', done)
  entry = notes.measure('ddim_10')
  assert entry['generated'] == {'fd_clip': 3.0} and entry['real'] == {'fd_clip': 1.0}
  assert entry['parameters'] == 3 and 'untrained' not in entry


def test_fewer_steps_are_held_to_those_of_the_teacher(tmp_path, monkeypatch):
  """A row without a measured teacher is not shown, nor are compared rows in the first table."""
  monkeypatch.setattr(notes, 'FIGURES', tmp_path / 'notes.json')
  at = lambda distance: ENTRY | {'generated': ENTRY['generated'] | {'fd_clip': distance}}
  for name, distance in {'lcm': 30.0, 'unet_50': 20.0, 'lcm_2': 19.5, 'mean_flow': 50.0}.items():
    notes.add(name, at(distance))
  first, second = notes.table().split('\n\n')
  assert len(first.splitlines()) == 4
  assert [line.split(' | ')[1:4] for line in second.splitlines()[2:]] == [
    ['50', '20.0', ''], ['4', '30.0', '+10.0'], ['2', '19.5', '-0.5'],
  ]


def test_entries_are_kept_in_the_order_of_the_systems(tmp_path, monkeypatch):
  """An entry replaces its own; a row has its figures, and none that were not measured."""
  monkeypatch.setattr(notes, 'FIGURES', tmp_path / 'notes.json')
  other = notes.SYSTEMS['latent_diffusion']._replace(title='Other')
  systems = {'latent_diffusion': notes.SYSTEMS['latent_diffusion'], 'other': other}
  monkeypatch.setattr(notes, 'SYSTEMS', systems)
  monkeypatch.setattr(notes, 'ALL', systems)
  notes.add('other', {key: ENTRY[key] for key in ('train_seconds', 'parameters')})
  notes.add('latent_diffusion', ENTRY | {'steps': 4})
  entry = ENTRY | {'seconds_a_picture': 0.05}
  notes.add('latent_diffusion', entry)
  assert next(iter(json.loads(notes.FIGURES.read_text()).values())) == entry
  _, _, first, second = notes.table().splitlines()
  assert '| 10 min | 2.5 M | 20.2 (271) | 49.3 | 0.22 |  | 0.05 |' in first
  own = '| 5. Other | `run other` | `configs/openmoji/dit_flow.py` | 10 min | 2.5 M |  |  |'
  assert second.startswith(own)


@pytest.mark.parametrize(('bits', 'told'), [
  ({'bits_per_dim_bound': 2.946, 'bits_per_dim_prior': 0.1, 'bits_per_dim_flow': 2.596},
   '2.95 bits/dim (2.60 by the ODE)'),
  ({'latent_bits_per_dim_discrete': 1.5, 'latent_bits_per_dim_flow': 1.2}, '1.50 bits/dim'),
  ({'kl_bits_per_dim': 0.1, 'elbo_bits_per_dim': 4.0}, '4.00 bits/dim'),
])
def test_the_likelihood_of_every_kind_is_told(bits, told):
  assert notes._more({'likelihood': {'model': bits}}) == told


def test_drawing_is_timed_with_the_options_of_the_system(finished, monkeypatch):
  system = notes.SYSTEMS['ddim']._replace(weights=str(finished / 'model'), prompts=('red heart',))
  few, many = (system._replace(options=('--steps', steps)) for steps in ('1', '40'))
  monkeypatch.setattr(notes, 'ALL', {'few': few, 'many': many})
  assert 0 < 4 * notes.seconds_a_picture('few') < notes.seconds_a_picture('many')
