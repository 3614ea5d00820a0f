"""Text encoders trained with the denoiser, whole or by adapters, in a new model."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from diffusion_jax import build
from diffusion_jax.config import parse
from diffusion_jax.models.network import Network, used_names
from diffusion_jax.models.text.clip import CLIPTextModelWithProjection, CLIPTextProjectionConfig
from diffusion_jax.parallel.mesh import MeshConfig, make_mesh
from diffusion_jax.pipelines.directory import load_model
from diffusion_jax.run import TrainedRun
from diffusion_jax.train.tasks.diffusion import NULL
from tests import tiny
from tests.train.tasks.test_texts import MMDIT

LENGTH = 16
HOW = 'trained', 'lora'


def config(parts, t5, how, **more):
  """An MMDiT that reads CLIP's text and pooled text, and T5's, with its mask."""
  text = {'encoders': [{'path': parts['clip']}, {'path': t5, 'length': LENGTH}], 'pooled': True}
  values = tiny.diffusion_config(parts, {
    'cache': False, 'conditioners': {'text': text}, 'denoiser': MMDIT, 'text_training': how,
    'schedule': {'process': 'flow'}, 'objective': {'prediction': 'flow_prediction'},
    'sample': {'sampler': 'flow_euler', 'steps': 2, 'guidance': 2.0}, 'caption_dropout': 0.3,
  } | more)
  del values['settings']['unet']
  values['data']['transforms'] = tiny.WITH_TEXT
  values['optimizer']['groups'] = [['^text_encoder', 0.5]] if how != 'frozen' else []
  values['loop']['evaluate_samples'] = 0
  return values


@pytest.fixture(scope='module')
def trained(once, parts, t5, command):
  """trained(how): workdir of a run of four steps."""

  def run(how):
    def make(folder):
      recipe = tiny.write_config(folder / 'recipe.py', config(parts, t5, how))
      assert command('train', '--config', recipe, '--workdir', folder / 'run', '--quiet') == 0

    return once(f'text_training_{how}', make) / 'run'

  return run


@pytest.fixture(scope='module')
def task(parts, t5, sources):
  """task(how, **settings)."""
  return lambda how, **more: build.build_task(
    parse(config(parts, t5, how, **more)), *sources, None, None
  )


def batch_of(task, sources, count=4):
  records = [sources[0][i] for i in range(count)]
  return {
    'image': jnp.asarray(np.stack([r['image'] for r in records]) / 127.5 - 1, jnp.float32),
    'tokens': jnp.asarray(task.model.text.tokens([r['captions'][0] for r in records])),
  }


def denoiser_for_tests(params):
  """The denoiser begins with zeros in places, through which no gradient would pass."""
  keys = iter(jax.random.split(jax.random.key(1), len(params)))
  return {n: p + 0.2 * jax.random.normal(next(keys), p.shape) for n, p in params.items()}


@pytest.mark.parametrize('how', ['frozen', *HOW])
def test_gradients_reach_what_is_trained_and_nothing_else(how, task, sources):
  one = task(how)
  params = one.beginning(make_mesh(MeshConfig(), jax.devices()[:1]), jax.random.key(0))
  grads = jax.jit(jax.grad(lambda params: one.loss(
    params, one.frozen, {}, batch_of(one, sources), jax.random.key(3), 0
  )[0]))(denoiser_for_tests(params))
  dead = {name for name, grad in grads.items() if not np.abs(grad).max() > 0}
  # What is added to all keys of a query; and the last block's text, which is not read any more.
  assert not [n for n in dead if n.startswith('text_encoder') and not n.endswith('k_proj.bias')]
  found = {name for name in params if name.startswith('text_encoder')}
  if how == 'frozen':
    assert not found and one.frozen[NULL]
  elif how == 'lora':
    assert found and all('.lora.' in name for name in found)
    assert {n.split('.lora')[0].rsplit('.', 1)[1] for n in found} == {
      'q_proj', 'k_proj', 'v_proj', 'out_proj', 'q', 'k', 'v', 'o'
    }
  else:  # The vision tower stays what it was.
    own, t5 = (one.model.networks[role].shapes for role in ('text_encoder', 'text_encoder_2'))
    read = {n for n in own if n.startswith(('text_model.', 'text_projection.'))}
    assert found == {f'text_encoder.{n}' for n in read} | {f'text_encoder_2.{n}' for n in t5}
    assert one.frozen.keys() == {'autoencoder', 'text_encoder'}
    assert one.frozen['text_encoder'].keys() == own.keys() - read


def test_the_first_loss_is_that_of_frozen_encoders(trained):
  losses = {how: tiny.metrics(trained(how))[1]['loss'] for how in ('frozen', *HOW)}
  for how in HOW:
    np.testing.assert_allclose(losses[how], losses['frozen'], rtol=1e-5)
  last = [tiny.metrics(trained(how))[4]['loss'] for how in ('frozen', 'trained')]
  assert last[0] != last[1]


@pytest.mark.parametrize('how', HOW)
def test_a_dropped_caption_is_the_empty_prompt_of_now(how, task):
  one = task(how, caption_dropout=1.0)
  start = one.beginning(make_mesh(MeshConfig(), jax.devices()[:1]), jax.random.key(0))
  null = []
  for params in (start, denoiser_for_tests(start)):
    weights = one.weights(params, one.frozen)
    tokens = jnp.asarray(one.model.text.tokens(['red apple', '']))
    text = jax.jit(one.model.text.encode)(weights, {'tokens': tokens})
    found = one.condition({'text': text}, one.nulls(weights), jax.random.key(0), (2, 8, 8, 16))
    for name, value in text.items():
      np.testing.assert_allclose(getattr(found, name)[0], value[1], atol=1e-5)
    null.append(np.asarray(found.text[0]))
  assert np.abs(null[0] - null[1]).max() > 1e-2
  assert NULL not in one.frozen


@pytest.mark.parametrize('how', HOW)
def test_a_run_that_was_cut_off_goes_on_to_the_same_weights(how, trained, command, tmp_path):
  run = trained(how)
  tiny.check_going_on(command, run.parent / 'recipe.py', run, tmp_path)


@pytest.mark.parametrize('how', HOW)
def test_the_whole_model_is_exported(how, trained, parts, t5):
  """With the averages of encoders, or with those of adapters merged into them."""
  workdir = trained(how)
  run, (model, found, _) = TrainedRun(str(workdir)), load_model(str(workdir / 'model'))
  own, last = run.weights(), run.weights(ema_halflife_images=0)
  tokens = {'tokens': jnp.asarray(model.text.tokens(['red apple', 'cat']))}
  texts = [
    jax.jit(one.text.encode)({role: weights[role] for role in one.text.networks}, tokens)
    for one, weights in ((model, found), (run.model, own), (run.model, last))
  ]
  for name, value in texts[0].items():
    np.testing.assert_allclose(value, texts[1][name], rtol=1e-5, atol=1e-6)
  assert np.abs(texts[0]['text'] - texts[2]['text']).max() > 1e-6
  index = json.loads((workdir / 'model' / 'model_index.json').read_text())
  for section, role, source in zip(
    index['conditioners']['text']['encoders'], ('text_encoder', 'text_encoder_2'),
    (parts['clip'], t5), strict=True,
  ):
    assert section['path'] == role
    if how == 'trained':
      assert all(np.array_equal(value, own[role][n]) for n, value in found[role].items())
    folders = source, workdir / 'model' / role
    before, after = (load_file(f'{folder}/model.safetensors') for folder in folders)
    assert before.keys() == after.keys()
    changed = {n for n in before if not np.array_equal(before[n], after[n])}
    unread = {n for n in before if n.startswith(('vision_model.', 'visual_', 'logit_scale'))}
    assert changed and not changed & unread
    assert changed == before.keys() - unread or how == 'lora'


def test_what_is_drawn_is_what_was_trained(trained, command, tmp_path):
  drawn, workdir = [], trained('trained')
  for source in (('--workdir', workdir), ('--model', workdir / 'model')):
    out = tmp_path / source[0].strip('-')
    assert command('sample', *source, '--prompt', 'red apple', '--out', out, '--batch', 1) == 0
    drawn.append(next(out.glob('0000_*.png')).read_bytes().split(b'IDAT')[1])
  assert drawn[0] == drawn[1]


def test_eight_devices_train_as_one(trained, parts, t5, command, tmp_path):
  values = config(parts, t5, 'trained')
  values['loop']['total_steps'] = 2
  values['mesh'] = {'data': 2, 'fsdp': 2, 'tensor': 2}
  recipe = tiny.write_config(tmp_path / 'recipe.py', values)
  run = tmp_path / 'run'
  assert command('train', '--config', recipe, '--workdir', run, '--quiet', devices=8) == 0
  found, wanted = ([line['loss'] for line in tiny.metrics(p).values()] for p in (
    run, trained('trained')
  ))
  np.testing.assert_allclose(found, wanted[:2], rtol=1e-4)


def test_parameters_that_a_result_depends_on():
  network = Network.of(CLIPTextModelWithProjection, tiny_text())
  encode = lambda skip, which: lambda params: network.bind(params).encode_text(
    jnp.zeros((1, 4), jnp.int32), skip=skip, normalize=False
  )[which]
  every = set(network.shapes)
  last = {n for n in every if '.layers.1.' in n}
  norm = {n for n in every if 'final_layer_norm' in n}
  assert set(used_names(encode(0, 1), network.shapes)) == every
  assert set(used_names(encode(0, 0), network.shapes)) == every - norm - {'text_projection.kernel'}
  assert set(used_names(encode(1, 0), network.shapes)) == (
    every - norm - last - {'text_projection.kernel'}
  )


def tiny_text():
  return CLIPTextProjectionConfig(
    **tiny.TOWER | {'num_hidden_layers': 2}, vocab_size=10, max_position_embeddings=4,
    projection_dim=8,
  )


@pytest.mark.parametrize(('changes', 'message'), [
  ({'text_training': 'trained', 'cache': True}, 'settings.cache keeps what text encoders give'),
  ({'text_training': 'trained', 'conditioners': {}}, 'has no effect without'),
  ({'text_encoders': ['text_encoder']}, 'settings.text_encoders has no effect'),
  ({'text_training': 'trained', 'text_lora': {'rank': 2}}, 'settings.text_lora has no effect'),
  ({'text_training': 'lora', 'text_encoders': ['unet']}, 'settings.text_encoders names unet'),
  ({'text_training': 'lora', 'text_encoders': ['text_encoder_3']},
   'names text_encoder_3, but the model has text_encoder, text_encoder_2; leave it out.'),
  ({'text_training': 'lora', 'text_lora': {'targets': ['to_q']}}, "text_lora.targets has 'to_q'"),
  ({'text_training': 'lora', 'text_lora': {'targets': ['wo']}}, 'names no layer of text_encoder;'),
  ({'text_training': 'all'}, "text_training is 'all'"),
  ({'text_training': 'lora', 'transforms': tiny.NORMALIZE}, 'batches lack tokens, which task'),
])
def test_settings_that_cannot_work_are_refused(changes, message, parts, t5, fails, tmp_path):
  changes = dict(changes)
  transforms = changes.pop('transforms', tiny.WITH_TEXT)
  values = config(parts, t5, 'frozen', **changes)
  values['data']['transforms'] = transforms
  recipe = tiny.write_config(tmp_path / 'recipe.py', values)
  line = fails('train', '--config', recipe, '--workdir', tmp_path / 'run', '--quiet')
  assert message in line
  assert not (tmp_path / 'run').exists()
