"""sample and evaluate with what guides besides the model: a classifier, CLIP, a worse model."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from diffusion_jax.formats.networks import load_params, save_params
from diffusion_jax.pipelines.directory import read_model
from tests import tiny

PROMPTS = ('red apple', 'cat face')


@pytest.fixture(scope='module')
def classifier(finished, tmp_path_factory):
  """Directory of a random classifier of the run's noised latents."""
  space = read_model(str(finished / 'model'))[0].space
  return tiny.noisy_classifier(space, tmp_path_factory.mktemp('classifier'))


@pytest.fixture(scope='module')
def worse(finished, tmp_path_factory):
  """Directory of the run's model with other weights of its denoiser."""
  folder = tmp_path_factory.mktemp('worse') / 'model'
  shutil.copytree(finished / 'model', folder)
  config, params = load_params('unet', folder / 'unet')
  rng = np.random.default_rng(0)
  save_params(folder / 'unet', config, {n: v + 0.1 * rng.normal(size=v.shape).astype(np.float32)
                                        for n, v in params.items()})
  return folder


def test_pictures_are_drawn_to_the_class_of_label(command, fails, finished, classifier, tmp_path):
  prompts = [x for prompt in PROMPTS for x in ('--prompt', prompt)]
  common = ('sample', '--workdir', finished, *prompts, '--out')
  guide = ('--classifier', classifier, '--classifier_guidance', 50)
  for name, labels in (('plain', ''), ('a', 'a'), ('b', 'b'), ('both', 'ab')):
    given = [x for label in labels for x in ('--label', label)]
    assert command(*common, tmp_path / name, *(guide if labels else ()), *given) == 0
  first, second = (
    {path.parent.name: Image.open(path) for path in tmp_path.glob(f'*/000{i}_*.png')}
    for i in (0, 1)
  )
  pixels = {name: np.asarray(image).astype(int) for name, image in first.items()}
  for one, other in (('plain', 'a'), ('plain', 'b'), ('a', 'b')):
    assert np.abs(pixels[one] - pixels[other]).max() > 1
  np.testing.assert_array_equal(pixels['both'], pixels['a'])
  np.testing.assert_array_equal(np.asarray(second['both']), np.asarray(second['b']))
  wanted = {'classifier': classifier, 'classifier_guidance': '50', 'label': 'a, b'}
  assert first['both'].text.items() >= wanted.items()
  out = tmp_path / 'none'
  assert 'is no class of the classifier that guides; give --label' in fails(*common, out, *guide)
  assert '--label needs --classifier_guidance S' in fails(*common, out, '--label', 'a')
  assert 'need each other' in fails(*common, out, *guide[:2])
  assert not out.exists()


def test_a_sweep_compares_kinds_of_guidance(
  command, fails, finished, parts, classifier, worse, tmp_path
):
  captions, labels, out = (tmp_path / name for name in ('captions', 'labels', 'sweep.json'))
  captions.write_text('\n'.join([*PROMPTS, 'sun', 'dog']))
  labels.write_text('\n'.join('abab'))
  swept = ('guidance=1', 'or', 'guidance=1', 'classifier_guidance=50', 'or', 'guidance=1',
           'clip_guidance=5', 'or', 'guidance=1', 'autoguidance=3')
  common = ('evaluate', 'sweep', *swept, '--workdir', finished, '--captions', captions,
            '--metrics', 'fd,clip_score', '--batch', 4, '--out', out)
  guides = ('--guiding_clip', parts['clip'], '--classifier', classifier, '--worse', worse)
  assert "'red apple' is no class of the classifier" in fails(*common, *guides)
  assert command(*common, *guides, '--labels', labels) == 0
  scores = json.loads(out.read_text())
  plain, *others = names = list(scores['sweep'])
  assert len({scores[name]['fd_clip'] for name in names}) == 4
  assert scores['guidance=1 clip_guidance=5']['clip_score'] > scores[plain]['clip_score'] + 1
  calls = [scores['sweep'][name]['network_calls'] for name in names]
  assert calls == [2, 2, 2, 4] and len(others) == 3
  # What guides is part of the name, so that columns of another are not taken for these.
  assert f'classifier {classifier} of ' in scores['settings']['model']
  assert f'worse {worse} of ' in scores['settings']['model']
  assert '--worse DIR' in fails(*common, *guides[:4], '--labels', labels)
