"""Every family of model learns points in the plane; importance sampling resumes to the bit."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.spatial.distance import cdist

from diffusion_jax.config import parse
from diffusion_jax.data.sources.arrays import open_points
from diffusion_jax.errors import UserError
from diffusion_jax.evaluation.metrics.kernel import energy_distance
from diffusion_jax.formats.networks import load_params
from diffusion_jax.parallel.mesh import MeshConfig, make_mesh
from diffusion_jax.recipe import load_config
from diffusion_jax.train.tasks.toy import ToyTask, ToyTaskConfig
from tests import tiny

TOYS = tiny.ROOT / 'configs' / 'toy'
FAMILIES = ('ddpm', 'ncsn', 'vp_sde', 've_sde', 'edm', 'flow')
STEPS = 250


def _task(family, width=48, **changes):
  values = load_config(str(TOYS / f'{family}.py')).to_dict()
  values['settings'] |= {'width': width, 'depth': 2, **changes}
  config = parse(values)
  return ToyTask(config.settings, open_points(config.data.dataset, 'test', config.data.size))


def _trained(task):
  """Parameters after STEPS steps of Adam, averaged over the last of them."""
  source = open_points('moons', 'train', 512)
  batches = jnp.stack([source[i % len(source)]['points'] for i in range(STEPS)])
  optimizer = optax.adam(optax.cosine_decay_schedule(4e-3, STEPS))

  @jax.jit
  def train(params):
    def step(carry, inputs):
      params, state, memory = carry
      points, key = inputs
      (loss, (_, seen)), grads = jax.value_and_grad(task.loss, has_aux=True)(
        params, {}, memory, {'points': points[None]}, key, 0
      )
      updates, state = optimizer.update(grads, state, params)
      params = optax.apply_updates(params, updates)
      return (params, state, task.next_carry(memory, seen)), loss

    keys = jax.random.split(jax.random.key(1), STEPS)
    carry = params, optimizer.init(params), task.carry()
    return jax.lax.scan(step, carry, (batches, keys))[0][0]

  return train(jax.jit(task.initialize)(jax.random.key(0)))


@pytest.mark.parametrize('family', FAMILIES)
def test_a_family_learns_the_moons(family):
  """Samples lie on the moons, and on all of them: the Gaussian of the same moments does not."""
  sample = load_config(str(TOYS / f'{family}.py')).settings.sample.to_dict()
  task = _task(family, sample=sample | {'steps': min(sample['steps'], 60)})
  found = np.asarray(task.model.points(task.config.sample)({'denoiser': _trained(task)}, 0, 1024))
  gaussian = np.random.default_rng(0).multivariate_normal(
    task.test.mean(axis=0), np.cov(task.test.T), 1024
  )
  off = lambda points: float((cdist(points, task.test).min(axis=1) > 0.15).mean())
  assert off(gaussian) > 0.4
  assert off(found) < 0.33 and energy_distance(found, task.test) < 0.03


@pytest.mark.parametrize('family', ['ncsn', 'vp_sde', 'ddpm'])
def test_an_idle_network_is_an_idle_denoiser(family):
  """Zero parameters: no noise is seen, so the estimate of x_0 is x / alpha."""
  task = _task(family)
  params = {name: jnp.zeros(leaf.shape) for name, leaf in task.model.denoiser.shapes.items()}
  level = task.model.noise.at_ratio(jnp.asarray([0.5]))
  x = jnp.asarray([[0.3, -0.4]])
  alpha, sigma = level.alpha[0], level.sigma[0]
  found = task.model.estimate({'denoiser': params})(x, alpha, sigma)
  np.testing.assert_allclose(found, x / alpha, rtol=1e-5)


def test_the_label_tells_the_pair():
  for family in ('ddpm', 'vp_sde', 've_sde'):
    task = _task(family)
    level = task.model.noise.at(jnp.asarray([0.1, 0.5, 0.9]))
    alpha, sigma = task.model.noise.at_label(level.label)
    np.testing.assert_allclose(alpha, level.alpha, rtol=1e-3)
    np.testing.assert_allclose(sigma, level.sigma, rtol=1e-3)


def test_learned_scores_are_drawn_on_the_scale_of_the_data():
  """An untrained EDM denoiser is c_skip x: the score of N(0, 1) with noise added."""
  task = _task('edm')
  params = {name: jnp.zeros(leaf.shape) for name, leaf in task.model.denoiser.shapes.items()}
  x = jnp.asarray([[0.5, -1.0], [2.0, 0.0]])
  ratios = jnp.asarray([1.0, 0.4, 0.15])
  for field, ratio in zip(task.model.scores({'denoiser': params}, x, ratios), ratios, strict=True):
    np.testing.assert_allclose(field, -x / (1 + ratio**2), rtol=1e-3)
  preview, _ = task.evaluators(make_mesh(MeshConfig()))
  (_, (pictures, captions, _)), = preview.run(task.model, {'denoiser': params}, jax.random.key(0))
  assert pictures.dtype == np.uint8 and len(pictures) == len(captions) == 4
  assert len({picture.tobytes() for picture in pictures}) == 4


def test_importance_resumes_to_the_bit_and_the_run_is_whole(tmp_path, command):
  values = load_config(str(TOYS / 'iddpm.py')).to_dict()
  values['settings'] |= {'width': 16, 'depth': 1, 'likelihood_points': 16}
  values['settings']['schedule']['num_train_timesteps'] = 4
  values['settings']['sample']['steps'] = 4
  values['data']['size'] = 16
  values['optimizer'] |= {'schedule': 'constant', 'learning_rate': 1e-2}
  values['loop'] |= {
    'total_steps': 8, 'log_every_steps': 1, 'checkpoint_every_steps': 4, 'sample_every_steps': 0,
    'evaluate_samples': 256,
  }
  config = tiny.write_config(tmp_path / 'recipe.py', values)
  assert command('train', '--config', config, '--workdir', tmp_path / 'whole', '--quiet') == 0
  # Without the memory the second part would draw timesteps uniformly: other losses.
  tiny.check_going_on(command, config, tmp_path / 'whole', tmp_path)
  scores = json.loads((tmp_path / 'whole' / 'scores.json').read_text())
  assert set(scores) == {'generated', 'untrained', 'real', 'measured', 'settings'}
  assert scores['settings']['step'] == 8
  config, params = load_params('mlp', tmp_path / 'whole' / 'model')
  assert config.width == 16 and params['conv_in.kernel'].shape == (2, 16)
  assert '16 points' in (tmp_path / 'whole' / 'README.md').read_text()


@pytest.mark.parametrize(('values', 'words'), [
  ({'process': 'flow', 'schedule': {'shift': 2.0}}, 'schedule.shift has no effect'),
  ({'process': 'table', 'sub_vp': True}, 'no effect on a table'),
])
def test_settings_without_effect_are_refused(values, words):
  values = {'task': 'toy', 'data': {'dataset': 'moons', 'size': 8}, 'settings': values}
  with pytest.raises(UserError, match=words):
    parse(values)


def test_the_settings_of_a_process_are_checked():
  with pytest.raises(UserError, match='did you mean linear'):
    ToyTaskConfig(process='linera')


def test_a_learned_process_is_trained_beside_the_network(command, tmp_path):
  values = tiny.toy_config({
    'process': 'learned', 'process_options': {'gamma_min': -8.0, 'gamma_max': 5.0},
    'objective': {'prediction': 'epsilon', 'loss': 'vdm', 'stratified': True},
    'sample': {'sampler': 'ddpm', 'steps': 2}, 'likelihood_points': 8,
  }, loop={'total_steps': 2})
  run = tmp_path / 'run'
  config = tiny.write_config(tmp_path / 'recipe.py', values)
  assert command('train', '--config', config, '--workdir', run, '--quiet') == 0
  task = ToyTask(parse(values).settings, open_points('moons', 'test', 16))
  first = jax.jit(task.initialize)(jax.random.key(0))
  assert {'noise.l1.kernel', 'noise.l3.kernel'} < first.keys()
  _, params = load_params('mlp', str(run / 'model'))
  assert params.keys() == task.model.denoiser.shapes.keys()
  batch = {'points': jnp.asarray(open_points('moons', 'train', 16)[0]['points'])[None]}
  slopes = jax.jit(jax.grad(
    lambda params: task.loss(params, {}, {}, batch, jax.random.key(1), 0)[0]
  ))(first)
  assert all(np.isfinite(slope).all() for slope in slopes.values())
  assert np.abs(slopes['noise.l3.kernel']).max() > 0
