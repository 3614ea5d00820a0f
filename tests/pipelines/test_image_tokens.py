"""DALL-E as a task, a directory and a command: pictures drawn token by token, and chosen."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from diffusion_jax.errors import UserError
from diffusion_jax.formats.networks import save_params
from diffusion_jax.models.dvae import DiscreteVAE, DVAEConfig
from diffusion_jax.models.network import Network
from diffusion_jax.models.token_transformer import Filter, sample_tokens
from diffusion_jax.parallel.mesh import MeshConfig, make_mesh
from diffusion_jax.pipelines.generator import read_generator
from diffusion_jax.pipelines.image_tokens import TRANSFORMER, TokenSampleConfig
from diffusion_jax.run import TrainedRun
from tests import tiny

CODES = DVAEConfig(
  latent_channels=2, block_out_channels=(4, 4, 4, 4), layers_per_block=1, norm_num_groups=2,
  mid_block_add_attention=False, num_vq_embeddings=9, vq_embed_dim=3,
)
TRANSFORMER_SHAPE = {
  'hidden_size': 16, 'num_hidden_layers': 1, 'num_attention_heads': 2, 'intermediate_size': 16,
}


@pytest.fixture(scope='module')
def run(once, parts, command, small_data):
  """Workdir of a run of two steps, finished, with a score."""

  def make(folder):
    params = jax.jit(Network.of(DiscreteVAE, CODES).initialize)(jax.random.key(3))
    save_params(folder / 'codes', CODES, jax.tree.map(np.asarray, params))
    config = tiny.write_config(folder / 'recipe.py', tiny._config('image_tokens', tiny.WITH_TEXT, {
      'autoencoder': str(folder / 'codes'), 'clip': parts['clip'],
      'transformer': TRANSFORMER_SHAPE, 'export_dtype': 'float32',
      'evaluation': {'features': (), 'metrics': ('fd', 'retrieval')},
      'sample': {'guidance': 1.5},
    }, loop={'total_steps': 2, 'evaluate_samples': 16, 'checkpoint_every_steps': 1}))
    assert command('train', '--config', config, '--workdir', folder / 'run', '--quiet') == 0

  return once('image_tokens', make) / 'run'


@pytest.fixture(scope='module')
def opened(run):
  """(model, weights, sample settings) of the run's directory."""
  model, found, sample = read_generator(str(run / 'model'))
  return model, {role: part.load() for role, part in found.items()}, sample


def test_a_run_is_scored_and_its_directory_draws_what_it_draws(run, opened, tmp_path, command):
  assert {'loss', 'loss_text', 'loss_image'} <= tiny.metrics(run)[2].keys()
  scores = json.loads((run / 'scores.json').read_text())
  assert scores['generated']['fd_clip'] > 0 and 'untrained' in scores
  drawn = {}
  for name, source in (('run', ('--workdir', run)), ('model', ('--model', run / 'model'))):
    out = tmp_path / name
    arguments = ('--prompt', 'red apple', '--prompt', '', '--seed', 3, '--top_k', 4, '--out', out)
    assert command('sample', *source, *arguments) == 0
    drawn[name] = [np.asarray(Image.open(file)) for file in sorted(out.glob('0*.png'))]
    assert 'temperature' in Image.open(out / '0000_red_apple.png').text
  np.testing.assert_array_equal(drawn['run'], drawn['model'])
  assert drawn['run'][0].shape == (tiny.SIZE, tiny.SIZE, 3)
  ours, weights = TrainedRun(str(run)), opened[1]
  for name, value in ours.weights()[TRANSFORMER].items():
    np.testing.assert_array_equal(weights[TRANSFORMER][name], value)


def test_going_on_after_a_stop_is_exact(run, command, tmp_path):
  tiny.check_going_on(command, run.parent / 'recipe.py', run, tmp_path)


def test_evaluate_opens_the_directory(run, command, tmp_path):
  out = tmp_path / 'scores.json'
  arguments = ('--model', run / 'model', '--samples', 16, '--metrics', 'fd', '--out', out)
  assert command('evaluate', 'model', *arguments, '--clip', run / 'model' / 'clip') == 0
  assert {'generated', 'untrained', 'real'} <= json.loads(out.read_text()).keys()


@pytest.mark.parametrize(('arguments', 'said'), [
  (('--steps', 3), 'steps does nothing'), (('--image', 'x.png'), 'takes no pictures'),
  (('--size', '64'), 'draws 32x32 alone'), (('--negative', 'x'), 'no negative prompt'),
  (('--lora', 'x'), 'lora is for models of diffusion'),
  (('--refiner', 'x'), 'refiner is for models of diffusion'),
  (('--temperature', 0), 'temperature is 0'), (('--prompt', 'x ' * 99), 'fit; shorten it'),
])
def test_what_has_no_effect_is_said(run, fails, tmp_path, arguments, said):
  source = ('--model', run / 'model', '--prompt', 'sun', '--out', tmp_path / 'out')
  assert said in fails('sample', *source, *arguments)
  assert not (tmp_path / 'out').exists()


def test_options_of_tokens_do_nothing_for_a_diffusion_model(fails, tmp_path):
  assert 'top_k does nothing' in fails(
    'sample', '--prompt', 'sun', '--top_k', 3, '--out', tmp_path / 'out'
  )


def test_parts_that_do_not_fit_are_refused(run, copy_of):
  folder = copy_of(run / 'model')
  file = folder / 'autoencoder' / 'config.json'
  file.write_text(json.dumps(json.loads(file.read_text()) | {'num_vq_embeddings': 8}))
  with pytest.raises(UserError, match='image_vocab_size 9, but its other parts have 8'):
    read_generator(str(folder))
  index = folder / 'model_index.json'
  index.write_text(json.dumps(json.loads(index.read_text()) | {'clip': '../elsewhere'}))
  with pytest.raises(UserError, match='elsewhere'):
    read_generator(str(folder))


def test_the_loss_is_the_papers_sum_and_dropped_captions_say_nothing(run):
  task = TrainedRun(str(run)).task
  params = task.initialize(jax.random.key(0))
  heads = {name: jnp.zeros_like(x) for name, x in params.items() if '_head.' in name}
  text = task.model.tokenize.batch(['red apple', 'cat'])
  images = jax.random.uniform(jax.random.key(1), (2, tiny.SIZE, tiny.SIZE, 3), minval=-1)
  loss = jax.jit(lambda params, text: task.loss(
    params, task.frozen, {}, {'image': images, 'tokens': text}, jax.random.key(2), 0
  )[0])
  config = task.model.transformer.config
  wanted = math.log(config.vocab_size) / 8 + 7 / 8 * math.log(config.image_vocab_size)
  assert float(loss(params | heads, text)) == pytest.approx(wanted, rel=1e-5)
  assert float(loss(params, text)) != float(loss(params, text[::-1]))
  task.config = dataclasses.replace(task.config, caption_dropout=1.0)
  dropped = jax.jit(lambda params, text: task.loss(
    params, task.frozen, {}, {'image': images, 'tokens': text}, jax.random.key(2), 0
  )[0])
  assert float(dropped(params, text)) == float(dropped(params, text[::-1]))


def test_of_several_pictures_clip_chooses_the_likest(opened):
  model, weights, _ = opened
  mesh = make_mesh(MeshConfig(), jax.devices()[:1])
  how = dict(seed=7, mesh=mesh, batch_size=1)
  with jax.set_mesh(mesh):
    chosen = next(model.sample(weights, ['sun'], TokenSampleConfig(candidates=4), **how))
    keys = jax.random.split(jax.random.fold_in(jax.random.key(7), 0), 4)
    text = jnp.repeat(model.rows(['sun'])['text'], 4, axis=0)

    @jax.jit
    def drawn(weights):
      transformer = model.transformer.bind(weights[TRANSFORMER])
      images = model.decode(weights, sample_tokens(transformer, text, keys, Filter()))
      return images, model.likeness(weights, images, text)

    images, likeness = drawn(weights)
  np.testing.assert_allclose(chosen[0], images[likeness.argmax()], atol=1e-5)
  assert len(np.unique(np.round(likeness, 6))) > 1
