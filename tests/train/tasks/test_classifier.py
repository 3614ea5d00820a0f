"""The classifier: its loss, a run on folders by class, and its features."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from diffusion_jax.config import typed
from diffusion_jax.errors import UserError
from diffusion_jax.evaluation.extractors.images import (
  ClassifierExtractor,
  load_classifier_extractor,
)
from diffusion_jax.formats.networks import load_params
from diffusion_jax.models.network import Network
from diffusion_jax.models.vision.classifier import Classifier, ClassifierConfig
from diffusion_jax.run import TrainedRun
from diffusion_jax.train.tasks.classifier import (
  ClassifierTask,
  ClassifierTaskConfig,
  cross_entropy,
  with_classes,
)
from tests import tiny

SIZE = 16
SMALL = {'block_out_channels': [4, 8], 'norm_num_groups': 2, 'image_size': SIZE, 'patch_size': 2}
CLASSES = ('across', 'down', 'plain')
CONFIG = ClassifierConfig(**SMALL, class_names=CLASSES)


def test_the_loss_is_the_known_one():
  logits = jnp.log(jnp.asarray([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]])) + 7.0
  labels = jnp.asarray([0, 1])
  found = cross_entropy(logits, labels)
  np.testing.assert_allclose(found, [math.log(2), math.log(10)], rtol=1e-5)
  smooth = 0.3
  wanted = 0.7 * math.log(2) + 0.3 * (math.log(2) + 2 * math.log(4)) / 3
  np.testing.assert_allclose(cross_entropy(logits, labels, smooth)[0], wanted, rtol=1e-5)


def _params(shapes):
  """Random values, without compiling an initialiser."""
  rng = np.random.default_rng(0)
  draw = lambda shape: jnp.asarray(rng.normal(0, 0.3, shape), jnp.float32)
  return {name: draw(leaf.shape) + name.endswith('scale') for name, leaf in shapes.items()}


def _batch(rows=4):
  rng = np.random.default_rng(0)
  return {
    'image': rng.uniform(-1, 1, (rows, SIZE, SIZE, 3)).astype(np.float32),
    'label': np.arange(rows, dtype=np.int32) % len(CLASSES),
  }


def test_gradient_reaches_every_parameter_and_remat_changes_nothing():
  found = []
  for remat in ('none', 'block'):
    task = ClassifierTask(ClassifierTaskConfig(CONFIG), None, remat=remat)
    params = _params(task.network.shapes)
    gradient = jax.jit(jax.grad(task.loss, has_aux=True))
    found.append(gradient(params, {}, {}, _batch(), None, 0))
  (plain, (metrics, _)), (again, _) = found
  assert [name for name, g in plain.items() if not np.abs(g).max() > 1e-9] == []
  for name, g in plain.items():
    np.testing.assert_allclose(again[name], g, rtol=1e-3, atol=1e-6)
  assert metrics['accuracy'].count == 4 and 0 <= metrics['accuracy'].total <= 4


def test_classes_come_from_the_labels_or_from_the_config():
  config = ClassifierTaskConfig(ClassifierConfig(**SMALL))
  names = lambda *labels: with_classes(config, *labels).classifier.class_names
  assert names(['b', 'a', 'b'], ['a']) == ('a', 'b')
  given = ClassifierTaskConfig(CONFIG)
  assert with_classes(given, ['plain', 'down'], []).classifier.class_names == CLASSES
  with pytest.raises(UserError, match="the test split has the label 'c', which is no class"):
    names(['a', 'b'], ['a', 'c'])
  with pytest.raises(UserError, match="the training split has the label 'c'"):
    with_classes(given, ['across', 'c'], [])
  with pytest.raises(UserError, match='there is one class, a; give'):
    names(['a'], ['a'])
  with pytest.raises(UserError, match='label_smoothing is 1'):
    typed(ClassifierTaskConfig, {'label_smoothing': 1.0})
  with pytest.raises(UserError, match='must name a class once'):
    ClassifierConfig(**SMALL, class_names=('a', 'b', 'a'))


def draw_classes(folder, count=20):
  """Stripes across, stripes down, and none, in any two colours."""
  rng = np.random.default_rng(0)
  stripes = np.arange(SIZE) // 2 % 2 == 0
  for name, mask in (
    ('across', np.repeat(stripes[:, None], SIZE, 1)), ('down', np.repeat(stripes[None], SIZE, 0)),
    ('plain', np.zeros((SIZE, SIZE), bool)),
  ):
    (folder / name).mkdir(parents=True)
    for i in range(count):
      dark, light = rng.integers(0, 90, 3), rng.integers(165, 256, 3)
      pixels = np.where(mask[..., None], dark, light).astype(np.uint8)
      Image.fromarray(pixels).save(folder / name / f'{i:03d}.png')


def classifier_config(folder, **settings):
  values = {
    'task': 'classifier', 'dtype': 'float32',
    'settings': {'classifier': SMALL, 'export_dtype': 'float32', **settings},
    'data': {'dataset': f'folder:{folder}', 'size': SIZE, 'transforms': ['label', 'normalize'],
             'test_fraction': 0.3},
    'optimizer': {'learning_rate': 2e-2, 'schedule': 'constant', 'warmup_steps': 2},
    'loop': {'total_steps': 40, 'batch_size': 16, 'ema_halflife_images': 40.0,
             'log_every_steps': 1, 'checkpoint_every_steps': 20, 'sample_every_steps': 0,
             'evaluate_samples': 100},
  }
  return values


@pytest.fixture(scope='module')
def run(once, command):
  """Folder with pictures/ and run/, a finished run on them."""

  def make(folder):
    draw_classes(folder / 'pictures')
    config = tiny.write_config(folder / 'recipe.py', classifier_config(folder / 'pictures'))
    assert command('train', '--config', config, '--workdir', folder / 'run', '--quiet') == 0

  return once('trained_classifier', make)


def test_a_run_learns_to_tell_classes_apart(run):
  scores = json.loads((run / 'run' / 'scores.json').read_text())
  assert scores['test']['accuracy'] == scores['test']['accuracy_per_class'] == 1
  labels = tiny.labelled_sources(run / 'pictures', SIZE, test_fraction=0.3)[1].labels
  assert scores['test']['images'] == len(labels) > 2 and scores['test']['loss'] < 0.5
  shares = np.array([labels.count(name) for name in CLASSES]) / len(labels)
  always = scores['commonest']
  assert always['accuracy'] == pytest.approx(shares.max())
  some = shares[shares > 0]
  assert always['loss'] == pytest.approx(-(some * np.log(some)).sum(), rel=1e-5)
  card = (run / 'run' / 'README.md').read_text()
  assert f'On {len(labels)} of 60 pictures, chosen by their content, which are not tr' in card
  lines = tiny.metrics(run / 'run')
  first, last = lines[1], lines[40]
  assert last['loss'] < 0.5 * first['loss'] and last['accuracy'] > 0.9
  with Image.open(run / 'run' / 'samples' / 'step_00000040.png') as grid:
    captions = json.loads(grid.text['captions'])
  assert captions == [f'right: {name}' for name in labels]


def test_what_is_exported_tells_them_apart_by_name(run):
  config, params = load_params('classifier', run / 'run' / 'model')
  assert config == CONFIG and config.class_names == CLASSES
  extractor = load_classifier_extractor(run / 'run' / 'model')
  assert extractor.name == 'classifier/run/clean'
  assert extractor.widths == {'penultimate': 8, 'logits': 3}
  images = np.stack([
    np.asarray(Image.open(run / 'pictures' / name / '009.png')) for name in CLASSES
  ])
  found = jax.jit(extractor.apply)(extractor.params, images)
  assert {name: x.shape[1] for name, x in found.items()} == extractor.widths
  assert all(x.dtype == np.float32 for x in found.values())
  assert [config.class_names[i] for i in found['logits'].argmax(axis=1)] == list(CLASSES)
  last = np.asarray(found['penultimate']) @ params['head.kernel'] + params['head.bias']
  np.testing.assert_allclose(found['logits'], last, rtol=1e-4, atol=1e-5)


def test_images_of_other_sizes_are_resized_as_for_training():
  network = Network.of(Classifier, dataclasses.replace(CONFIG, block_out_channels=(4,)))
  params = _params(network.shapes)
  apply = jax.jit(ClassifierExtractor(network, params, 'x').apply)
  large = np.random.default_rng(0).integers(0, 256, (2, 40, 44, 3), np.uint8)
  large[1, :, 20:] = 255
  small = np.stack([
    np.asarray(Image.fromarray(x).resize((SIZE, SIZE), Image.Resampling.BICUBIC)) for x in large
  ])
  for name, wanted in apply(params, small).items():
    np.testing.assert_allclose(apply(params, large)[name], wanted, atol=5e-3)  # Rounded or not.
    assert np.abs(wanted[0] - wanted[1]).max() > 0.05


@pytest.fixture(scope='module')
def noised_run(run, once, command):
  """Folder of a run on the same pictures under the noise of a flow."""
  settings = {'noised': {'space': {'type': 'pixels'}, 'schedule': {'process': 'flow'}}}

  def make(folder):
    values = classifier_config(run / 'pictures', **settings)
    config = tiny.write_config(folder / 'recipe.py', values)
    assert command('train', '--config', config, '--workdir', folder / 'run', '--quiet') == 0

  return once('trained_noised_classifier', make) / 'run'


def test_one_of_noised_pictures_knows_less_the_more_noise_there_is(noised_run):
  scores = json.loads((noised_run / 'scores.json').read_text())
  assert scores['test']['accuracy'] > 0.9 and scores['noise_0.5']['accuracy'] > 0.8
  losses = [scores[name]['loss'] for name in ('test', 'noise_0.5', 'noise_1', 'noise_4')]
  assert losses == sorted(losses) and scores['noise_4']['loss'] < 1.6 * math.log(3)
  lines = tiny.metrics(noised_run)
  assert lines[40]['loss'] < 0.8 * lines[1]['loss']


def test_one_of_noised_pictures_is_told_how_much_noise_there_is(noised_run):
  """What is exported is read again as it was, and guides, but has no features to compare."""
  config, params = load_params('classifier', noised_run / 'model')
  assert (config.noised, config.in_channels, config.class_names) == ('pixels', 3, CLASSES)
  network = Network.of(Classifier, config).bind(params)
  x = _batch()['image']
  low, high = (network(x, jnp.full(len(x), t))[1] for t in (100.0, 600.0))
  assert np.abs(low - high).max() > 0.1
  trained = TrainedRun(str(noised_run)).params()
  assert trained.keys() == params.keys()
  for name, value in params.items():
    np.testing.assert_array_equal(value, trained[name])
  with pytest.raises(UserError, match='is a classifier of noised pixels'):
    load_classifier_extractor(noised_run / 'model')


@pytest.mark.parametrize(('section', 'changes', 'words'), [
  ('data', {'size': 32}, 'data.size is 32, but settings.classifier.image_size is 16'),
  ('data', {'caption': 'a thing'}, 'data.caption has no effect'),
  ('data', {'transforms': ['normalize']}, 'data.transforms of a classifier need label'),
  ('settings', {'classifier': SMALL | {'class_names': ['across', 'down']}}, "the label 'plain'"),
  ('settings', {'classifier': SMALL | {'image_size': 18}}, '18; it must be a multiple of 4'),
  ('settings', {'classifier': SMALL, 'noised': {'space': {'type': 'pixels', 'patch': 2}}},
   'data.size is 16, but settings.classifier.image_size is 32'),
])
def test_what_does_not_fit_is_named(run, fails, tmp_path, section, changes, words):
  values = classifier_config(run / 'pictures')
  values[section] |= changes
  config = tiny.write_config(tmp_path / 'recipe.py', values)
  assert words in fails('train', '--config', config, '--workdir', tmp_path / 'run')
