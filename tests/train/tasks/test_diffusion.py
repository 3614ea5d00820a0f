"""The denoiser's loss by hand, dropped captions, and the cache."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.data.cache import Choose, cached_source
from diffusion_jax.data.transforms import apply, build_transforms
from diffusion_jax.diffusion.noise import ScheduleConfig
from diffusion_jax.diffusion.objective import ObjectiveConfig
from diffusion_jax.errors import UserError
from diffusion_jax.parallel.mesh import MeshConfig, make_mesh
from diffusion_jax.pipelines.spaces import LatentConfig
from diffusion_jax.train.tasks.diffusion import NULL, DiffusionTask
from diffusion_jax.train.tasks.diffusion_settings import DiffusionTaskConfig, EvaluationConfig
from tests import tiny


@pytest.fixture(scope='module')
def make_task(parts, sources):
  """make_task(**settings): the task between the tiny frozen parts."""

  def make(network=None, cache=True, **settings):
    config = DiffusionTaskConfig(
      space=LatentConfig(parts['autoencoder']), clip=parts['clip'], denoiser=tiny.UNET,
      preview_captions=('cat',), cache=cache, **settings,
    )
    model, frozen = tiny.assemble(
      tiny.UNET, **parts, schedule=ScheduleConfig(),
      parameterization=config.objective.parameterization,
    )
    if network:
      stand_in = types.SimpleNamespace(config=tiny.UNET, bind=lambda _: network)
      stand_in.with_compute = lambda **_: stand_in
      model = dataclasses.replace(model, denoiser=stand_in)
    return DiffusionTask(config, model, frozen, *sources)

  return make


def _batch(n=6, std=0.0):
  rng = np.random.default_rng(0)
  return {
    'mean': rng.normal(size=(n, 16, 16, 4)).astype(np.float32),
    'logvar': np.full((n, 16, 16, 4), 2 * np.log(std) if std else -np.inf, np.float32),
    'text': rng.normal(size=(n, tiny.LENGTH, 16)).astype(np.float32),
  }


@pytest.mark.parametrize('gamma', [0.0, 0.7])
@pytest.mark.parametrize('prediction', ['epsilon', 'sample', 'v_prediction'])
def test_the_loss_is_the_one_computed_by_hand(make_task, prediction, gamma):
  """A network that outputs 0.3 x and shows its inputs; latents without spread, so x0 is known."""
  seen = []

  def network(x, t, condition):
    seen.append((np.asarray(x, np.float64), np.asarray(t), np.asarray(condition.text)))
    return 0.3 * x

  weighting = {'weighting': 'min_snr', 'weighting_options': {'gamma': gamma}} if gamma else {}
  objective = ObjectiveConfig(prediction=prediction, **weighting)
  task = make_task(network, objective=objective, caption_dropout=0.0)
  batch = _batch()
  loss, error, level = task.losses({}, task.frozen, {}, batch, jax.random.key(3))
  t = level.label
  (x, seen_t, text), = seen
  np.testing.assert_array_equal(seen_t, t)
  np.testing.assert_array_equal(text, batch['text'])
  betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
  bar = np.cumprod(1 - betas)[np.asarray(t)].reshape(-1, 1, 1, 1)
  alpha, sigma = bar**0.5, (1 - bar) ** 0.5
  x0 = (batch['mean'] - tiny.AUTOENCODER.shift_factor) * tiny.AUTOENCODER.scaling_factor
  eps = (x - alpha * x0) / sigma
  assert abs(eps.mean()) < 0.05 and abs(eps.std() - 1) < 0.05
  wanted = {'epsilon': eps, 'sample': x0, 'v_prediction': alpha * eps - sigma * x0}[prediction]
  by_hand = np.square(0.3 * x - wanted).mean(axis=(1, 2, 3))
  np.testing.assert_allclose(error, by_hand, rtol=1e-3)
  snr = (bar / (1 - bar)).ravel()
  weight = {
    'epsilon': np.minimum(snr, gamma) / snr, 'sample': np.minimum(snr, gamma),
    'v_prediction': np.minimum(snr, gamma) / (snr + 1),
  }[prediction]
  np.testing.assert_allclose(loss, by_hand * (weight if gamma else 1.0), rtol=1e-3)


def test_captions_are_dropped_at_the_rate_and_become_the_null_embedding(make_task):
  task = make_task(caption_dropout=0.2)
  null = task.frozen[NULL]['text.bias']
  rows = {'tokens': task.model.text.tokens([''])}
  wanted = task.model.condition(task.frozen, rows).text[0]
  np.testing.assert_allclose(null, wanted, atol=1e-5)
  n = 2000
  text = jnp.ones((n, *null.shape)) * 9.0
  out = task.drop({'text': {'text': text}}, task.frozen[NULL], jax.random.key(0))
  out = np.asarray(out['text']['text'])
  dropped = (out == np.asarray(null)).all(axis=(1, 2))
  assert ((out == 9.0).all(axis=(1, 2)) | dropped).all()
  assert abs(dropped.mean() - 0.2) < 4.5 * (0.2 * 0.8 / n) ** 0.5


def test_examples_are_dropped_at_the_rate_of_their_part(make_task):
  """Below 0 is the task's own; where all are its own nothing is drawn otherwise."""
  task = make_task(caption_dropout=0.2)
  null, n = task.frozen[NULL]['text.bias'], 1500
  drop = lambda rates: np.asarray(task.drop(
    {'text': {'text': jnp.ones((n, *null.shape)) * 9.0}}, task.frozen[NULL], jax.random.key(0),
    None if rates is None else jnp.asarray(rates, jnp.float32),
  )['text']['text']) != 9.0
  own = drop(None)
  np.testing.assert_array_equal(drop(np.full(n, -1)), own)
  found = drop(np.array([0.0, -1.0, 1.0])[np.arange(n) % 3]).any(axis=(1, 2))
  assert not found[::3].any() and found[2::3].all()
  np.testing.assert_array_equal(found[1::3], own.any(axis=(1, 2))[1::3])


def test_the_network_sees_dropped_captions_as_the_null_embedding(make_task):
  seen = []
  task = make_task(lambda x, t, condition: (seen.append(condition.text), x)[1], caption_dropout=1.0)
  task.losses({}, task.frozen, {}, _batch(), jax.random.key(0))
  null = task.frozen[NULL]['text.bias']
  np.testing.assert_array_equal(seen[0], np.broadcast_to(null, seen[0].shape))


def test_cached_latents_and_texts_are_the_uncached_ones(make_task, sources):
  task, from_cache = make_task(cache=False, caption_dropout=0.0), make_task(caption_dropout=0.0)
  few = [sources[0][i] for i in range(5)]
  cache = cached_source(few, task.model, task.frozen, make_mesh(MeshConfig()), progress=False)
  tokenize = task.model.text.tokenize
  transforms = build_transforms(('first_caption', 'tokenize', 'normalize'), tokenizer=tokenize)
  rng = np.random.default_rng(0)
  rows = [apply(transforms, record, rng) for record in few]
  uncached = {name: np.stack([row[name] for row in rows]) for name in ('image', 'tokens')}
  first = [{**cache[i], 'texts': cache[i]['texts'][:1]} for i in range(5)]
  rows = [Choose()(row, rng) for row in first]
  cached = {name: np.stack([row[name] for row in rows]) for name in ('mean', 'logvar', 'text')}
  assert all(len(cache[i]['texts']) == len(few[i]['captions']) for i in range(5))
  key = jax.random.key(5)

  def encode(task, batch):
    moments, conditions, *_ = jax.jit(task.encode)(task.frozen, batch, jax.random.clone(key))
    return task.model.space.sample(moments, jax.random.clone(key)), conditions['text']['text']

  (z, text), (z_cached, text_cached) = encode(task, uncached), encode(from_cache, cached)
  assert float(np.std(z)) > 0.01
  np.testing.assert_allclose(z_cached, z, atol=1e-4)
  np.testing.assert_allclose(text_cached, text, atol=2e-3, rtol=2e-3)


def test_gradient_reaches_every_parameter_of_the_denoiser(make_task):
  task = make_task(caption_dropout=0.5)
  params = jax.jit(task.initialize)(jax.random.key(0))
  # Some layers begin at zero, which would hide those before them.
  params = {name: value + 0.02 for name, value in params.items()}
  gradients, (metrics, _) = jax.jit(jax.grad(task.loss, has_aux=True))(
    params, task.frozen, {}, _batch(std=0.1), jax.random.key(0), 0
  )
  dead = [name for name, g in gradients.items() if not np.abs(g).max() > 1e-10]
  assert not dead
  total, count = jax.tree.leaves(metrics['loss_by_timestep'])
  assert count.sum() == 6 and total.shape == (10,)


@pytest.mark.parametrize(('features', 'metrics', 'named'), [
  (('vgg:x',), ('fd',), 'settings.evaluation.features vgg:x is not of the form KIND:PATH'),
  ((), ('FID',), "settings.evaluation.metrics is 'FID'; did you mean fd"),
  ((), (), 'settings.evaluation.metrics is empty'),
])
def test_a_config_that_cannot_be_is_refused(features, metrics, named):
  with pytest.raises(UserError, match=named):
    EvaluationConfig(features, metrics)
