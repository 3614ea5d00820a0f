"""Guidance by CLIP and by classifiers: their scores, what they see, and what they lead to."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.cli.options import AdapterOptions
from diffusion_jax.diffusion.denoiser import gradient_guidance
from diffusion_jax.diffusion.mixture import GaussianMixture
from diffusion_jax.diffusion.noise import ScheduleConfig
from diffusion_jax.diffusion.parameterization import Parameterization
from diffusion_jax.errors import UserError
from diffusion_jax.evaluation.extractors.clip import load_features
from diffusion_jax.models.text.clip import unit
from diffusion_jax.models.vision.classifier import ClassifierConfig
from diffusion_jax.parallel.mesh import MeshConfig, make_mesh
from diffusion_jax.pipelines.assembly import assemble
from diffusion_jax.pipelines.conditioners import Request
from diffusion_jax.pipelines.guides import (
  GUIDING_CLASSIFIER,
  ClassifierGuide,
  told_noise,
  views_of,
)
from diffusion_jax.pipelines.inputs import Inputs
from diffusion_jax.pipelines.sampling import SampleConfig
from diffusion_jax.pipelines.spaces import PixelSpace
from diffusion_jax.pixels import to_uint8
from tests import tiny
from tests.diffusion.exact_mixture import component

PROMPTS = ('red apple', 'cat face', 'sun')


@pytest.fixture(scope='module')
def features(parts):
  with tiny.few_devices():
    return load_features(parts['clip'], make_mesh(MeshConfig()))


@pytest.fixture(scope='module')
def plain(parts):
  """(a model of latents, the weights of all but its denoiser)."""
  return tiny.assemble(
    tiny.UNET, **parts, schedule=ScheduleConfig(), parameterization=Parameterization()
  )


@pytest.fixture(scope='module')
def guided(plain, parts):
  """The same with the CLIP of the parts as its guide."""
  return AdapterOptions(guiding_clip=parts['clip']).apply(*plain, ['clip_guidance'])


def test_the_score_is_the_logit_of_the_decoded_picture_with_its_prompt(guided, features):
  model, weights = guided
  guide = model.conditioners['clip_guidance']
  z = np.random.default_rng(0).normal(size=(3, 16, 16, 4)).astype(np.float32)
  score = jax.jit(guide.score(weights, guide.rows(Request(PROMPTS)), model.space))
  images = to_uint8(model.space.decode(weights, z))
  cosines = (unit(features.images(images)) * unit(features.texts(PROMPTS))).sum(axis=-1)
  scale = np.exp(weights['guiding_clip']['logit_scale'])
  np.testing.assert_allclose(score(z, 1.0, 0.5), scale * cosines, rtol=2e-2, atol=2e-2)


def test_cut_outs_are_squares_of_the_picture_of_other_places_at_each_level():
  ramp = jnp.broadcast_to(jnp.arange(64.0)[None, None, :, None], (2, 64, 64, 3))
  views = views_of(ramp, 16, 5, jnp.float32(1), jnp.float32(0.5))
  assert views.shape == (5, 2, 16, 16, 3)
  steps = np.diff(np.asarray(views)[:, 0, 8, 3:-3, 0], axis=1)  # Inside, where no edge blends.
  mean = steps.mean(axis=1, keepdims=True)
  np.testing.assert_allclose(steps, mean.repeat(steps.shape[1], 1), atol=0.15)
  assert (mean >= 0.5 * 64 / 16 - 0.02).all() and (mean <= 64 / 16 + 0.02).all()
  assert len(np.unique(mean.round(2))) == 5
  assert np.abs(views_of(ramp, 16, 5, jnp.float32(1), jnp.float32(0.6)) - views).max() > 1
  whole = views_of(ramp, 64, 0, jnp.float32(1), jnp.float32(0.5))
  np.testing.assert_allclose(whole[0], ramp, atol=1e-4)


def test_guided_pictures_fit_their_prompts_better(parts, features):
  """Of the guided steps fewer, less so; one program for all scales, one for all intervals."""
  unet = dataclasses.replace(tiny.UNET, in_channels=12, out_channels=12)
  how = PixelSpace(patch=2), {'text': {'path': parts['clip']}}, ScheduleConfig(), Parameterization()
  model, frozen = assemble(unet, *how)
  weights = {role: part.load() for role, part in frozen.items()}
  weights['denoiser'] = jax.jit(model.denoiser.initialize)(jax.random.key(0))
  plain = model, weights
  guided = AdapterOptions(guiding_clip=parts['clip']).apply(*plain, ['clip_guidance'])
  fits = {}
  for (model, weights), scale, every in (
    (plain, 0.0, 1), (guided, 0.0, 1), (guided, 3.0, 1), (guided, 3.0, 2)
  ):
    config = SampleConfig(
      sampler='ddim', steps=4, guidance=1.0, clip_guidance=scale, clip_guidance_every=every
    )
    images = np.concatenate([*model.generate(
      weights, PROMPTS, config, seed=1, mesh=features.mesh, batch_size=3
    )])
    pairs = unit(features.images(images)) * unit(features.texts(PROMPTS))
    fits[len(model.conditioners), scale, every] = np.asarray(pairs.sum(axis=-1))
  without, unguided, best, half = fits.values()
  np.testing.assert_allclose(without, unguided, atol=1e-3)
  assert (best > without + 0.01).all()
  assert without.mean() < half.mean() < best.mean()
  assert len(guided[0].programs) == 3
  assert config.in_force().items() >= {'clip_guidance': '3', 'clip_guidance_every': '2'}.items()


def test_what_guides_nothing_is_refused(plain, guided):
  with pytest.raises(UserError, match='clip_guidance'):
    plain[0].check_sampling(SampleConfig(clip_guidance=1.0))
  guided[0].check_sampling(SampleConfig(clip_guidance=1.0))
  for given in ({'guiding_clip': 'anywhere'}, {'clip_cutouts': 4}):
    with pytest.raises(UserError, match='--clip_guidance'):
      AdapterOptions(**given).apply(*plain)
  assert AdapterOptions().apply(*plain) == plain


MIXTURE = GaussianMixture(
  np.array([0.2, 0.5, 0.3]), np.array([[-1.0, 0.5], [2.0, 1.0], [0.0, -1.5]]),
  np.array([0.3, 0.1, 0.2]),
)


class ExactClassifier:
  """In place of a network: the classifier of the mixture's three classes under any noise."""

  config = ClassifierConfig(class_names=('a', 'b', 'c'), noised='vectors', in_channels=2)

  def bind(self, params):
    def classify(z, t):
      ratio = jnp.exp(4 * (t / 200 - 2.5))[0]  # sigma / alpha.
      alpha = 1 / jnp.hypot(1.0, ratio)
      return None, MIXTURE.diffused(alpha, ratio * alpha).log_class_probabilities(z) + 3.0

    return classify


@pytest.mark.parametrize(('alpha', 'sigma'), [(0.8, 0.6), (0.3, 0.7), (1.0, 5.0), (1.0, 0.05)])
def test_an_exact_classifier_leads_to_each_prompt_s_class_on_every_process(alpha, sigma):
  """Of noise that preserves the variance, of a flow and of one that explodes; '' is no class."""
  with jax.enable_x64(True):
    guide = ClassifierGuide({GUIDING_CLASSIFIER: ExactClassifier()})
    prompts = ('b', 'a', '', 'c')
    rows = guide.rows(Request(prompts))
    x = jax.random.normal(jax.random.key(0), (4, 2), jnp.float64)
    x = alpha * MIXTURE.means[[1, 0, 1, 2]] + sigma * x
    score = guide.score({GUIDING_CLASSIFIER: {}}, rows, None)
    found = gradient_guidance(MIXTURE.denoise, score, 1.0, of=guide.of)(x, alpha, sigma)
    own = [
      (component(MIXTURE, 'abc'.index(name)) if name else MIXTURE).denoise(x[i, None], alpha, sigma)
      for i, name in enumerate(prompts)
    ]
    np.testing.assert_allclose(found, np.concatenate(own), rtol=1e-7, atol=1e-8)


def test_the_class_is_the_given_one_or_the_prompt_s():
  guide = ClassifierGuide({GUIDING_CLASSIFIER: ExactClassifier()})
  rows = lambda *prompts, **given: guide.rows(Request(prompts, inputs=Inputs(**given)))
  numbers = lambda *prompts, **given: rows(*prompts, **given)['classifier_guidance_class'].tolist()
  assert numbers('a', ' c ', '') == [0, 2, -1]
  assert numbers('red apple', 'sun', classes=('b',)) == [1, 1]
  assert numbers('red apple', 'sun', classes=('b', 'a')) == [1, 0]
  with pytest.raises(UserError, match=r"'sun' is no class of the classifier.*--label.*a, b, c"):
    numbers('a', 'sun')
  with pytest.raises(UserError, match='2 classes and 3 prompts'):
    numbers('a', 'b', 'c', classes=('a', 'b'))


@pytest.fixture(scope='module')
def classified(plain, tmp_path_factory):
  """The model with such a classifier as its guide."""
  folder = tiny.noisy_classifier(plain[0].space, tmp_path_factory.mktemp('classifier'))
  weights = {**plain[1], 'denoiser': jax.jit(plain[0].denoiser.initialize)(jax.random.key(0))}
  return AdapterOptions(classifier=folder).apply(plain[0], weights, ['classifier_guidance'])


def test_samples_are_of_the_class_that_they_are_guided_to(classified):
  """One program for both classes and all scales; of fewer guided steps, less so."""
  model, weights = classified
  classifier = model.networks[GUIDING_CLASSIFIER].bind(weights[GUIDING_CLASSIFIER])
  log = {}
  for scale, every, name in ((0.0, 1, 'a'), (60.0, 1, 'a'), (60.0, 1, 'b'), (60.0, 4, 'b')):
    config = SampleConfig(
      sampler='ddim', steps=4, guidance=1.0, classifier_guidance=scale,
      classifier_guidance_every=every,
    )
    with tiny.few_devices():
      z = np.concatenate([*model.sample(
        weights, PROMPTS, config, seed=1, mesh=make_mesh(MeshConfig()), batch_size=3,
        inputs=Inputs(classes=(name,)), latents=True,
      )])
    logits = classifier(*told_noise(jnp.asarray(z), 1.0, 0.0))[1]
    log[scale, every, name] = np.asarray(logits[:, 0] - logits[:, 1])
  free, a, b, seldom = log.values()
  assert (a > free + 0.1).all() and (b < free - 0.1).all()
  assert b.mean() < seldom.mean() < free.mean()
  assert len(model.programs) == 3
  assert config.in_force().items() >= {
    'classifier_guidance': '60', 'classifier_guidance_every': '4'
  }.items()


def test_a_classifier_that_does_not_fit_is_refused(plain, tmp_path):
  model, space = plain[0], plain[0].space
  needed = ['classifier_guidance']
  other = tiny.noisy_classifier(space, tmp_path / 'scaled', scaling_factor=0.13025)
  with pytest.raises(UserError, match=r'has scaling_factor 0\.13025'):
    AdapterOptions(classifier=other).apply(*plain, needed)
  other = tiny.noisy_classifier(space, tmp_path / 'wide', in_channels=5)
  with pytest.raises(UserError, match='has in_channels 5'):
    AdapterOptions(classifier=other).apply(*plain, needed)
  with pytest.raises(UserError, match='--classifier DIR and --classifier_guidance S'):
    AdapterOptions().apply(*plain, needed)
  with pytest.raises(UserError, match='--classifier DIR and --classifier_guidance S'):
    AdapterOptions(classifier=other).apply(*plain)
  with pytest.raises(UserError, match='classifier_guidance is given, but the model has no such'):
    model.check_sampling(SampleConfig(classifier_guidance=1.0))
