"""evaluate: reconstructions of autoencoders, classes of what is drawn, bits per dimension."""

import json
import shutil

import jax
import numpy as np
import pytest
from PIL import Image

from diffusion_jax.evaluation.extractors.images import load_classifier_extractor
from diffusion_jax.evaluation.images import shuffled
from diffusion_jax.formats.networks import save_params
from diffusion_jax.models.network import Network
from diffusion_jax.models.vision.classifier import Classifier, ClassifierConfig
from diffusion_jax.run import load_evaluator
from tests import tiny

BITS = 'latent_bits_per_dim_discrete'


@pytest.fixture(scope='module')
def classifier(sources, tmp_path_factory):
  """Directory of a classifier with random weights for the labels of the data set."""
  labels = sorted({*sources[0].labels, *sources[1].labels})
  config = ClassifierConfig((8, 16), norm_num_groups=4, image_size=tiny.SIZE,
                            class_names=tuple(labels))
  folder = tmp_path_factory.mktemp('classifier') / 'groups'
  save_params(folder, config, jax.jit(Network.of(Classifier, config).initialize)(jax.random.key(3)))
  return folder


def _named(classifier, images):
  """The class that the classifier finds each image to be of."""
  extractor = load_classifier_extractor(classifier)
  found = jax.jit(extractor.apply)(extractor.params, np.stack(images))['logits']
  return [extractor.class_names[i] for i in np.asarray(found).argmax(axis=1)]


@pytest.fixture(scope='module')
def reconstructed(command, trained, sources, parts, tmp_path_factory):
  """(scores, file) of a run's autoencoder on the whole test split."""
  out = tmp_path_factory.mktemp('reconstructed') / 'scores.json'
  arguments = ('--workdir', trained('autoencoder'), '--samples', len(sources[1]))
  features = ('--features', f'clip:{parts["clip"]}')
  assert command('evaluate', 'autoencoder', *arguments, *features, '--out', out) == 0
  return json.loads(out.read_text()), out


def test_an_autoencoder_is_compared_with_its_originals(reconstructed, trained, sources):
  scores, out = reconstructed
  assert set(scores) == {
    'reconstructed', 'untrained', 'intervals', 'measured', 'warnings', 'settings'
  }
  assert set(scores['reconstructed']) == {'rfd_clip', 'psnr', 'ssim', 'l1'}
  # The figures of the loop itself, of all test images.
  with tiny.few_devices():
    wanted = load_evaluator(str(trained('autoencoder')))(len(sources[1]))['test']
  for name in ('psnr', 'l1'):
    assert scores['reconstructed'][name] == pytest.approx(wanted[name], rel=1e-3)
    interval = scores['intervals'][name]
    assert interval['low'] < scores['reconstructed'][name] < interval['high']
  assert scores['reconstructed']['l1'] != scores['untrained']['l1']
  settings = scores['settings']
  assert settings['samples'] == settings['reference_images'] == len(sources[1])
  assert f'openmoji {tiny.SIZE} px test' in settings['reference']
  assert 'at step 4' in settings['model']
  html = out.with_suffix('.html').read_text()
  assert 'Worst reconstructions' in html and 'Best reconstructions' in html
  assert html.count('alt="original"') == html.count('alt="reconstruction"') == 24
  assert 'Nearest in the reference' not in html


def test_what_is_reconstructed_is_not_made_again(
  reconstructed, command, trained, sources, parts, tmp_path, monkeypatch
):
  from diffusion_jax.models.autoencoder import AutoencoderKL

  scores, out = reconstructed
  run = shutil.copytree(out.parent, tmp_path / 'again')
  monkeypatch.setattr(AutoencoderKL, 'encode', lambda *_: 1 / 0)
  arguments = ('--workdir', trained('autoencoder'), '--samples', len(sources[1]))
  features = ('--features', f'clip:{parts["clip"]}')
  assert command('evaluate', 'autoencoder', *arguments, *features, '--out', run / out.name) == 0
  again = json.loads((run / out.name).read_text())
  assert again['reconstructed'] == pytest.approx(scores['reconstructed'], rel=1e-6)


def test_an_autoencoder_alone_at_a_size_of_one_s_own(command, parts, small_data, tmp_path):
  out = tmp_path / 'scores.json'
  arguments = ('--model', parts['autoencoder'], '--size', tiny.SIZE, '--samples', 3)
  how = ('--features', f'clip:{parts["clip"]}', '--metrics', 'psnr', '--keep', 'png')
  assert command('evaluate', 'autoencoder', *arguments, *how, '--out', out) == 0
  scores = json.loads(out.read_text())
  assert set(scores['reconstructed']) == {'psnr'} and scores['settings']['samples'] == 3
  assert len(list((tmp_path / 'scores.images').iterdir())) == 3


@pytest.fixture(scope='module')
def drawn(command, finished, classifier, tmp_path_factory):
  """(scores, file) of 16 test captions with classes and bits; the pictures are kept."""
  out = tmp_path_factory.mktemp('drawn') / 'scores.json'
  features = ('--features', f'classifier:{classifier}', '--metrics', 'class_accuracy,bits_per_dim')
  how = ('--samples', 16, '--draws', 2, '--keep', 'png')
  assert command('evaluate', 'model', '--workdir', finished, *features, *how, '--out', out) == 0
  return json.loads(out.read_text()), out


def test_classes_are_those_of_the_records(drawn, sources, classifier):
  scores, out = drawn
  records = shuffled(sources[1], 16)
  labels = [record['label'] for record in records]
  accuracy = lambda images: np.mean([
    found == label for found, label in zip(_named(classifier, images), labels, strict=True)
  ])
  kept = [np.asarray(Image.open(path)) for path in sorted(out.with_name('scores.images').iterdir())]
  assert scores['real']['class_accuracy'] == accuracy([record['image'] for record in records])
  assert scores['generated']['class_accuracy'] == accuracy(kept)
  assert 'class_accuracy' in scores['untrained'] and 'class_accuracy' in scores['intervals']
  html = out.with_suffix('.html').read_text()
  assert 'Classes that come out worst' in html


def test_bits_per_dimension_stand_beside_the_other_figures(drawn):
  scores, _ = drawn
  assert scores['generated'][BITS] != scores['untrained'][BITS]
  assert BITS not in scores['real'] and scores['settings']['draws'] == 2
  interval = scores['intervals'][BITS]
  assert interval['low'] < scores['generated'][BITS] < interval['high']


def test_captions_of_one_s_own_have_labels_of_one_s_own(
  command, fails, finished, classifier, sources, tmp_path
):
  captions, labels = tmp_path / 'captions.txt', tmp_path / 'labels.txt'
  captions.write_text('red apple\ncat face\nsun\n')
  out, known = tmp_path / 'scores.json', sorted(set(sources[1].labels))
  arguments = ('--workdir', finished, '--captions', captions, '--labels', labels, '--keep', 'png')
  how = ('--features', f'classifier:{classifier}', '--metrics', 'class_accuracy', '--out', out)
  labels.write_text('animal\n' * 2)
  assert 'has 2 labels, but' in fails('evaluate', 'model', *arguments, *how)
  labels.write_text('no such class\n' * 3)
  assert "has no class 'no such class'" in fails('evaluate', 'model', *arguments, *how)
  assert not out.exists()
  # The classes that the classifier will find: all are right, and then none is.
  labels.write_text(f'{known[0]}\n' * 3)
  assert command('evaluate', 'model', *arguments, *how) == 0
  kept = [np.asarray(Image.open(path)) for path in sorted((tmp_path / 'scores.images').iterdir())]
  found = _named(classifier, kept)
  labels.write_text('\n'.join(found))
  assert command('evaluate', 'model', *arguments, *how) == 0
  assert json.loads(out.read_text())['generated']['class_accuracy'] == 1
  labels.write_text('\n'.join(next(k for k in known if k != one) for one in found))
  assert command('evaluate', 'model', *arguments, *how) == 0
  assert json.loads(out.read_text())['generated']['class_accuracy'] == 0


@pytest.mark.parametrize(('arguments', 'named'), [
  (['autoencoder', '--model', 'AUTOENCODER', '--steps', '4'], 'there is no option --steps'),
  (['autoencoder', '--model', 'AUTOENCODER', '--metrics', 'lpips'],
   'lpips needs an autoencoder, and --lpips'),
  (['autoencoder', '--model', 'AUTOENCODER', '--metrics', 'fd', '--lpips', 'x'],
   '--lpips does nothing without'),
  (['autoencoder', '--model', 'AUTOENCODER', '--samples', '99999'], '99999 images cannot be taken'),
  (['autoencoder'], 'there is no autoencoder; give --workdir'),
  (['model', '--lpips', 'x'], 'there is no option --lpips'),
  (['model', '--labels', 'x'], '--labels are those of --captions'),
  (['model', '--workdir', 'RUN', '--samples', '16', '--metrics', 'psnr'],
   'psnr needs an autoencoder'),
  (['model', '--workdir', 'RUN', '--samples', '16', '--metrics', 'class_accuracy'],
   'the features logits'),
  (['images', 'FOLDER', '--metrics', 'bits_per_dim'], 'bits_per_dim needs a diffusion model'),
])
def test_what_cannot_be_is_refused(fails, finished, parts, small_data, tmp_path, arguments, named):
  Image.new('RGB', (8, 8)).save(tmp_path / 'one.png')
  places = {'AUTOENCODER': parts['autoencoder'], 'RUN': finished, 'FOLDER': tmp_path}
  given = [places.get(text, text) for text in arguments]
  if {'AUTOENCODER', 'FOLDER'} & {*arguments}:
    given += ['--size', tiny.SIZE]
  given += ['--features', f'clip:{parts["clip"]}']
  assert named in fails('evaluate', *given, '--out', tmp_path / 'out.json')
  assert not (tmp_path / 'out.json').exists()
