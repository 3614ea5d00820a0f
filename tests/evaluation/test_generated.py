"""Scores of a model in training: on one device and on eight, by a clock, and by what they need."""

import jax
import numpy as np
import pytest

from diffusion_jax.diffusion.noise import ScheduleConfig
from diffusion_jax.diffusion.parameterization import Parameterization
from diffusion_jax.errors import UserError
from diffusion_jax.evaluation.evaluator import run_all, scores_of
from diffusion_jax.evaluation.extractors.clip import load_features
from diffusion_jax.evaluation.extractors.images import load_classifier_extractor
from diffusion_jax.evaluation.generated import GeneratedImages
from diffusion_jax.evaluation.images import shuffled
from diffusion_jax.evaluation.metrics.gaussians import frechet_distance
from diffusion_jax.evaluation.metrics.images import clip_score
from diffusion_jax.evaluation.statistics import Statistics
from diffusion_jax.formats.networks import save_params
from diffusion_jax.models.network import Network
from diffusion_jax.models.vision.classifier import Classifier, ClassifierConfig
from diffusion_jax.parallel.mesh import MeshConfig, make_mesh
from diffusion_jax.pipelines.sampling import SampleConfig
from tests import tiny

SAMPLE = SampleConfig(sampler='ddim', steps=1, guidance=2.0)
FIGURES = ['fd_clip', 'kid_clip', 'kid_clip_std', 'clip_score', 'retrieval_r1']


class Some:
  """The first records of a source, so that a reference is quick to read."""

  def __init__(self, source, count):
    self._source, self._length = source, count

  def __len__(self):
    return self._length

  def __getitem__(self, index):
    return self._source[index]


@pytest.fixture(scope='module')
def model(parts):
  return tiny.assemble(
    tiny.UNET, **parts, schedule=ScheduleConfig(), parameterization=Parameterization(),
  )


@pytest.fixture(scope='module')
def evaluation(model, parts, sources):
  """evaluation(devices, *metrics): of the tiny model, and its weights."""

  def make(devices, *metrics, named=(f'clip:{parts["clip"]}',)):
    mesh = make_mesh(MeshConfig(), jax.devices()[:devices])
    network, frozen = model
    rng = np.random.default_rng(0)
    unet = {
      name: 0.1 * rng.normal(size=leaf.shape).astype(np.float32)
      for name, leaf in network.denoiser.shapes.items()
    }
    weights = network.on_mesh({**frozen, 'denoiser': unet}, mesh)
    evaluator = GeneratedImages(
      named, metrics, SAMPLE, Some(sources[0], 40), sources[1], mesh, samples=20, batch_size=8
    )
    return evaluator, network, weights

  return make


def _scores(evaluator, network, weights, **options):
  return scores_of(run_all([evaluator], network, weights, jax.random.key(0), **options))


@pytest.fixture(scope='module')
def on_one(evaluation):
  """((evaluator, model, weights), scores of 20 samples) on one device."""
  made = evaluation(1, 'fd', 'kid', 'clip_score', 'retrieval')
  assert made[0].metrics == FIGURES
  return made, _scores(*made)


def test_figures_are_those_of_the_pictures(on_one, model, parts, sources):
  """Drawn, embedded and compared by hand."""
  (made, _, weights), scores = on_one
  columns = ['generated', 'untrained', 'real']
  assert list(scores) == [*columns, 'measured', 'warnings', 'settings']
  assert scores['settings']['samples'] == 20
  clip = load_features(parts['clip'], made.mesh)
  records = shuffled(sources[1], 20)
  captions = [record['captions'][0] for record in records]
  drawn = np.concatenate(list(model[0].generate(
    weights, captions, SAMPLE, seed=0, mesh=made.mesh, batch_size=8
  )))
  reference = Statistics.from_features(
    clip.images(np.stack([sources[0][i]['image'] for i in range(40)]))
  )
  for name, images in (('generated', drawn), ('real', [r['image'] for r in records])):
    features = clip.images(np.stack(images))
    wanted = frechet_distance(Statistics.from_features(features), reference)
    assert scores[name]['fd_clip'] == pytest.approx(wanted, rel=1e-4)
    wanted = clip_score(features, clip.texts(captions))
    assert scores[name]['clip_score'] == pytest.approx(wanted, rel=1e-4)
  assert list(scores['generated']) == FIGURES
  assert scores['generated'] != scores['real']


def test_eight_devices_score_as_one(on_one, evaluation):
  for metrics in (('fd', 'kid', 'clip_score', 'retrieval'), ('fd', 'kl')):
    made, *rest = evaluation(8, *metrics)
    found = _scores(made, *rest)
    for column in ('generated', 'real'):
      assert list(found[column]) == made.metrics
      for name in set(made.metrics) & set(FIGURES):
        # With fd and kl alone, features are summed on the devices.
        assert found[column][name] == pytest.approx(
          on_one[1][column][name], rel=2e-3, abs=1e-6
        ), name
  reference = made.comparison.read_reference()
  assert 'kl_clip' in made.metrics and list(reference.columns) == [] and reference.sums


def test_a_budget_ends_drawing_after_two_batches_and_16_samples(on_one):
  made, whole = on_one
  cut = _scores(*made, seconds=1e-6)
  assert cut['settings']['samples'] == 16
  assert cut == _scores(*made, samples=16) and cut['generated'] != whole['generated']
  slow = _scores(*made, seconds=1e6, baselines=False)
  assert slow['settings']['samples'] == 20 and 'real' not in slow


def test_a_metric_of_other_features_is_refused(evaluation):
  with pytest.raises(UserError, match=r'inception_score needs the features logits_unbiased.*'
                     r'leave inception_score out of settings\.evaluation\.metrics'):
    _ = evaluation(1, 'fd', 'inception_score')[0].metrics


def test_classes_are_found_where_the_test_records_have_some(evaluation, sources, tmp_path):
  """By the labels of the records that pictures are drawn for; real ones have the same."""
  classes = tuple(sorted({sources[1][i]['label'] for i in range(len(sources[1]))}))
  config = ClassifierConfig(
    (4, 8), norm_num_groups=2, image_size=tiny.SIZE, patch_size=2, class_names=classes
  )
  params = Network.of(Classifier, config).initialize(jax.random.key(0))
  save_params(tmp_path, config, params)
  made, *rest = evaluation(1, 'class_accuracy', named=(f'classifier:{tmp_path}',))
  assert made.metrics == ['class_accuracy']
  found = _scores(made, *rest)
  classifier, records = load_classifier_extractor(tmp_path), shuffled(sources[1], 20)
  images = np.stack([record['image'] for record in records])
  own = np.asarray(classifier.apply(classifier.params, images)['logits']).argmax(-1)
  wanted = np.mean([classes[i] == record['label'] for i, record in zip(own, records, strict=True)])
  assert found['real']['class_accuracy'] == pytest.approx(wanted)
