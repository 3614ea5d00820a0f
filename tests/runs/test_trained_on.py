"""What runs, exports and evaluations say of themselves: figures, captions, what was measured on."""

import json
import shutil
import types

import jax
import numpy as np
import pytest
from PIL import Image
from scipy.stats import binom

from diffusion_jax.config import LoopConfig
from diffusion_jax.evaluation.recognition import answer
from diffusion_jax.evaluation.report import Retrieval, of_features, real_retrieval
from diffusion_jax.formats.networks import resolve
from diffusion_jax.runs.trained_on import DataSplit, read_trained_on, write_trained_on
from diffusion_jax.train.card import model_card
from diffusion_jax.train.tasks.task import Task
from tests import tiny

ASSETS = ('autoencoder', 'classifier', 'clip', 'text-to-image')
TRAIN = DataSplit('openmoji', 'train', 64, 3312, 'aa')


def _captions(run, step=4):
  with Image.open(run / 'samples' / f'step_{step:08d}.png') as grid:
    return grid.text['about'], json.loads(grid.text['captions'])


def test_the_captions_of_clip_s_grid_are_its_answers_beside_the_truth(trained, sources):
  about, captions = _captions(trained('clip'))
  own = [sources[1][i]['captions'][0] for i in range(len(sources[1]))]
  assert 'that CLIP finds nearest, and its own' in about and len(captions) == len(own)
  for caption, true in zip(captions, own, strict=True):
    said = caption.removeprefix('says ').removesuffix(f'; is {true}')
    assert caption == f'right: {true}' or (said in own and caption == answer(said, true))


@pytest.mark.parametrize(('task', 'words'), [
  ('autoencoder', 'beside its reconstruction'), ('diffusion', 'Drawn for these captions'),
])
def test_every_grid_says_what_it_shows(trained, task, words):
  assert words in _captions(trained(task))[0]


def test_retrieval_is_named_by_the_captions_that_there_were(trained):
  scores = json.loads((trained('clip') / 'scores.json').read_text())
  assert {name for name in scores['test'] if 'retrieval' in name} == {
    'retrieval_r1_of_16', 'retrieval_r5_of_16'
  }
  assert 'retrieval_r1_of_8' in tiny.metrics(trained('clip'))[4]  # Of the batch.


@pytest.mark.parametrize('task', ['autoencoder', 'clip', 'diffusion'])
def test_a_model_says_what_it_was_trained_on(trained, sources, task):
  found = read_trained_on(trained(task) / 'model')
  assert (found.dataset, found.split, found.size) == ('openmoji', 'train', tiny.SIZE)
  assert found.records == len(sources[0]) and found.fingerprint
  card = (trained(task) / 'model' / 'README.md').read_text()
  assert f'training split of {len(sources[0])} images' in card
  assert 'On the test split, which was not trained on.' in card and 'At step 4.' in card


@pytest.mark.parametrize('name', ASSETS)
def test_the_models_in_the_package_say_what_they_were_trained_on(name):
  place = resolve(f'asset:{name}-openmoji-64')
  found = read_trained_on(place)
  assert (found.dataset, found.split, found.size, found.records) == ('openmoji', 'train', 64, 3312)
  card = (place / 'README.md').read_text()
  assert 'training split of 3,312 images' in card
  assert 'On the test split, 379 images, which was not trained on.' in card


def test_figures_are_told_beside_what_the_network_knows(tmp_path):
  test = DataSplit('openmoji', 'test', 64, 379, 'bb')
  sets = {'the reference': TRAIN, 'the test images': test}
  told = lambda path, sets=sets: of_features([f'clip:{path}'], sets)[0]
  assert 'is not known, nor whether the reference and the test images are part' in told(tmp_path)
  write_trained_on(tmp_path, TRAIN)
  assert told(tmp_path).endswith(
    'was trained on openmoji (train split, 64 px, 3,312 images): the reference is these images, '
    'which it knows; the test images are not among them.'
  )
  small = {'the reference': DataSplit('openmoji', 'train', 32, 308, 'cc')}
  assert 'the reference is these images' in told(tmp_path, small)  # At another size.
  other = {'the reference': DataSplit('folder:a', 'train', 64, 9, 'dd'), 'the test images': None}
  unknown = 'whether the reference and the test images are among them is not known'
  assert unknown in told(tmp_path, other)
  for text in ('{', '[]', '{"dataset": 3}', '{"dataset": "a", "split": "b", "size": "c"}'):
    (tmp_path / 'trained_on.json').write_text(text)
    assert 'is not known' in told(tmp_path)


def test_folders_are_the_same_by_their_pictures_alone():
  one, other = (DataSplit('folder:a', 'train', 64, 9, print) for print in ('aa', 'bb'))
  assert not one.same(other) and not one.apart(other)
  assert one.same(DataSplit('folder:elsewhere', 'test', 32, 9, 'aa'))


def test_a_model_that_was_trained_on_may_know_more(tmp_path):
  write_trained_on(tmp_path, DataSplit('openmoji', 'train', 64, 9, 'aa', begun='models/x'))
  told = of_features([f'clip:{tmp_path}'], {
    'the reference': TRAIN, 'the test images': DataSplit('openmoji', 'test', 64, 379, 'bb'),
  })[0]
  assert 'beginning with models/x: the reference is these images' in told
  assert 'whether the test images are among them is not known' in told


def test_captions_that_are_the_same_do_not_count_against_a_clip():
  records = [{'image': np.full((4, 4, 3), i, np.uint8), 'captions': [text]}
             for i, text in enumerate(('a', 'b', 'a', 'c', 'a'))]
  clip = types.SimpleNamespace(
    images=lambda images: np.eye(3)[[(0, 1, 0, 2, 0)[i] for i in images[:, 0, 0, 0]]],
    texts=lambda texts: np.eye(3)[['abc'.index(text) for text in texts]],
  )
  found = real_retrieval(clip, records)
  assert (found.hits, found.count, found.candidates) == (3, 3, 3)


def test_a_card_tells_what_pictures_go_through(tmp_path):
  training = types.SimpleNamespace(
    task=types.SimpleNamespace(title='KL autoencoder', described=Task.described),
    config=tiny.autoencoder_config() | {'data': {
      'dataset': 'openmoji', 'size': 32, 'transforms': [
        ['resize', {'size': 64}], 'random_flip', {'name': 'random_crop', 'size': 32},
      ],
    }}, loop=LoopConfig(), mesh=types.SimpleNamespace(devices=np.array(jax.devices()[:2])),
    trained_on=TRAIN, provenance=(), data_credit='', mixture=None,
  )
  card = model_card(training, {'kernel': np.zeros((2, 3))}, steps=1, seconds=75.0, scores={})
  assert '- Transforms: resize (size 64), random_flip, random_crop 32' in card
  assert '- Time: 1 min 15 s until this was written, on 2 x cpu' in card
  assert 'training split of 3,312 images' in card
  assert '- Trained parameters: 6' in card and '| kernel | (2, 3) | float64 | 6    |' in card


def test_chance_is_judged_by_the_binomial_tail():
  for candidates, count in ((100, 256), (16, 16), (21, 21), (2, 2)):
    for hits in range(count + 1):
      tail = binom.sf(hits - 1, count, min(1.0, 2 / candidates))
      assert Retrieval(hits, count, candidates).near_chance == (tail > 0.01), (hits, count)
  assert 'too few to know' in Retrieval(2, 2, 2).sentence('clip/x')
  told = Retrieval(3, 256, 100).sentence('clip/x')
  assert '1.2% of them, where chance is 1.0%: it is near chance' in told
  assert 'near chance' not in Retrieval(60, 256, 100).sentence('clip/x')


def test_a_clip_near_chance_is_warned_of_where_it_scores(finished):
  """The CLIP of the run has random weights."""
  scores = json.loads((finished / 'scores.json').read_text())
  assert any('it is near chance' in text for text in scores['warnings'])
  assert any('was trained on is not known' in text for text in scores['measured'])
  assert any('Of 16 images, each sampled for a test caption' in text for text in scores['measured'])
  for name in ('README.md', 'report.html'):
    assert 'it is near chance' in (finished / name).read_text()


def test_an_evaluation_says_what_its_features_know(command, finished, trained, tmp_path, capsys):
  clip = shutil.copytree(trained('clip') / 'model', tmp_path / 'own')
  out = tmp_path / 'scores.json'
  assert command(
    'evaluate', 'model', '--workdir', finished, '--samples', 16, '--metrics', 'fd', '--features',
    f'clip:{clip}', '--out', out,
  ) == 0
  scores = json.loads(out.read_text())
  known = [text for text in scores['measured'] if str(clip) in text]
  assert len(known) == 1 and 'the reference is these images' in known[0]
  assert 'On the test split, which was not trained on.' in scores['measured']
  page = out.with_suffix('.html').read_text()
  assert 'What they were measured on' in page and 'the reference is these images' in page
  warned = [text for text in scores['warnings'] if 'near chance' in text]
  assert len(warned) == 1 and warned[0] in capsys.readouterr().out


def test_a_clip_that_knows_captions_is_not_warned_of(command, small_data, tmp_path):
  rng = np.random.default_rng(0)
  (tmp_path / 'pictures').mkdir()
  for i in range(4):
    pixels = rng.integers(0, 256, (32, 32, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / 'pictures' / f'{i}.png')
  out = tmp_path / 'scores.json'
  assert command(
    'evaluate', 'images', tmp_path / 'pictures', '--reference', 'test', '--size', tiny.SIZE,
    '--metrics', 'kid', '--out', out,
  ) == 0
  scores = json.loads(out.read_text())
  assert not any('near chance' in text for text in scores['warnings'])
  assert any('first of 21 for' in text and 'chance is 4.8%' in text for text in scores['measured'])
  assert any('asset:clip-openmoji-64 was trained on openmoji (train split, 64 px' in text
             and 'the reference is not among them' in text for text in scores['measured'])
