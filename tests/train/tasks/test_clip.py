"""The task of CLIP: its temperature, SigLIP's beginning, locked towers."""

import json
import math
import shutil

import jax
import numpy as np
import pytest

from diffusion_jax.build import build_task
from diffusion_jax.config import parse
from diffusion_jax.evaluation.extractors.clip import load_clip_extractor
from diffusion_jax.formats.tensors import open_tensors
from diffusion_jax.models.text.tokenizer import load_tokenizer
from diffusion_jax.parallel.mesh import MeshConfig, make_mesh
from diffusion_jax.pixels import to_float
from diffusion_jax.run import TrainedRun
from diffusion_jax.train.contrastive import sigmoid_loss
from diffusion_jax.train.tasks.clip import TOWERS, CLIPTask, CLIPTaskConfig
from tests import tiny


@pytest.mark.parametrize(('given', 'wanted'), [
  (-0.5, 0.0), (2.0, 2.0), (9.0, math.log(100)),
])
def test_the_temperature_is_clamped(given, wanted):
  task = CLIPTask(CLIPTaskConfig(tiny.CLIP), None, None)
  other = np.full((2, 2), 50.0)
  params = task.constrain({'logit_scale': np.float32(given), 'other.kernel': other}, {})
  assert float(params['logit_scale']) == pytest.approx(wanted)
  np.testing.assert_array_equal(params['other.kernel'], other)


def test_gradient_reaches_every_parameter():
  task = CLIPTask(CLIPTaskConfig(tiny.CLIP), None, None)
  params = jax.jit(task.initialize)(jax.random.key(0))
  rng = np.random.default_rng(0)
  tokens = rng.integers(2, 300, (4, tiny.LENGTH), np.int32)
  tokens[:, -1] = 1  # Pooled at the end, so that every position counts.
  batch = {
    'image': rng.uniform(-1, 1, (4, tiny.SIZE, tiny.SIZE, 3)).astype(np.float32), 'tokens': tokens
  }
  gradients = jax.jit(jax.grad(task.loss, has_aux=True))(params, {}, {}, batch, None, 0)[0]
  dead = [n for n, g in gradients.items() if not np.abs(g).max() > 1e-9]
  # A bias of all keys shifts each row of attention logits, which softmax forgets.
  assert all(name.endswith('k_proj.bias') for name in dead), dead


def _batch(seed=0):
  rng = np.random.default_rng(seed)
  tokens = rng.integers(2, 300, (8, tiny.LENGTH), np.int32)
  tokens[:, -1] = 1
  image = rng.uniform(-1, 1, (8, tiny.SIZE, tiny.SIZE, 3)).astype(np.float32)
  return {'image': image, 'tokens': tokens}


def test_siglip_begins_as_the_paper_says_and_its_bias_is_no_part_of_clip(tmp_path):
  """b = -10, t = ln 10, both trained; at the start a pair that fits costs about 10 - 10 cos."""
  task = CLIPTask(CLIPTaskConfig(tiny.CLIP, loss='sigmoid', export_dtype='float32'), None, None)
  params = jax.jit(task.initialize)(jax.random.key(0))
  assert float(params['logit_bias']) == -10
  assert float(params['logit_scale']) == pytest.approx(math.log(10))
  loss = jax.jit(jax.value_and_grad(task.loss, has_aux=True))
  (value, (metrics, _)), gradients = loss(params, {}, {}, _batch(), None, 0)
  assert 0 < float(value) < 20 and metrics['logit_bias'].compute() == -10
  assert gradients['logit_bias'] != 0 and gradients['logit_scale'] != 0
  hot = task.constrain(params | {'logit_scale': np.float32(9)}, {})
  assert hot['logit_scale'] == 9  # CLIP's clamp is CLIP's.
  assert task.weights(params, {}).keys() == task.clip.shapes.keys()


def _narrow(config, tower):
  """The config with a tower whose layers are as wide as no other's."""
  config['settings']['clip'][f'{tower}_config'] |= {'intermediate_size': 48}
  return config


def test_a_locked_image_tower_comes_out_as_it_went_in(tmp_path, parts, command, sources):
  """From the command, with SigLIP's loss: its parameters are no part of what is trained, its own
  config and pixels count, what is exported is it to the bit, beside texts that have learned, and a
  run that goes on ends as one in one piece, to the bit."""
  folder, mean, run = tmp_path / 'pretrained', 0.25, tmp_path / 'run'
  shutil.copytree(parts['clip'], folder)
  statistics = {'image_mean': [mean] * 3, 'image_std': [0.5] * 3}
  (folder / 'preprocessor_config.json').write_text(json.dumps(statistics))
  values = tiny.clip_config(
    {'locked': 'image', 'locked_from': str(folder), 'loss': 'sigmoid'},
    loop={'evaluate_samples': 0, 'total_steps': 2},
  )
  values = _narrow(_narrow(values, 'text'), 'vision')  # Of which the second does not count.
  config = tiny.write_config(tmp_path / 'recipe.py', values)
  train = lambda *how: command('train', '--config', config, '--quiet', '--workdir', *how)
  more = '--config.loop.total_steps=3'
  assert [train(run), train(run, more), train(tmp_path / 'whole', more)] == [0, 0, 0]
  whole, resumed = (
    (path / 'model' / 'model.safetensors').read_bytes() for path in (tmp_path / 'whole', run)
  )
  assert whole == resumed
  before, after = (
    {name: np.asarray(t) for name, t in open_tensors(path / 'model.safetensors').items()}
    for path in (folder, run / 'model')
  )
  kept = [name for name in before if name.startswith(TOWERS['image'])]
  assert kept and all(np.array_equal(before[name], after[name]) for name in kept)
  assert after['text_model.encoder.layers.0.mlp.fc1.weight'].shape[0] == 48
  opened = TrainedRun(str(run))
  assert not [name for name in opened.params() if name.startswith(TOWERS['image'])]
  # What the loss saw is what whoever opens the export sees.
  image, extractor = sources[1][0]['image'], load_clip_extractor(run / 'model')
  pixels = ((image / 255 - mean) / 0.5).astype(np.float32)[None]
  own = extractor.network.bind(extractor.params).encode_image(pixels)
  found = extractor.apply(extractor.params, image[None])['embedding']
  np.testing.assert_allclose(found, own, rtol=1e-4, atol=1e-5)
  task, batch = opened.task, {**_batch(), 'image': to_float(image[None]).repeat(8, axis=0)}
  texts = load_clip_extractor(run / 'model').network.bind(extractor.params).encode_text
  loss, _ = task.loss(opened.params(), task.frozen, {}, batch, None, 0)
  params = opened.params()
  assert 0 < abs(params['logit_bias'] + 10) < 0.1
  of = lambda images: sigmoid_loss(
    images.repeat(8, axis=0), texts(batch['tokens'])[1], params['logit_scale'], params['logit_bias']
  )[0].mean()
  plain = of(extractor.network.bind(extractor.params).encode_image(batch['image'][:1]))
  assert abs(loss - of(own)) < 1e-3 and abs(loss - plain) > 1e-2


def test_a_locked_text_tower_brings_its_words(tmp_path, parts, sources):
  settings = {'locked': 'text', 'locked_from': parts['clip']}
  config = parse(_narrow(_narrow(tiny.clip_config(settings), 'text'), 'vision'))
  task = build_task(config, *sources, tmp_path, make_mesh(MeshConfig()))
  shapes = jax.eval_shape(task.initialize, jax.random.key(0))
  assert not [name for name in shapes if name.startswith(TOWERS['text'])]
  assert shapes['vision_model.encoder.layers.0.mlp.fc1.kernel'].shape[1] == 48
  assert task.frozen['locked']['text_model.encoder.layers.0.mlp.fc1.kernel'].shape[1] == 32
  assert task.tokenizer.get_vocab() == load_tokenizer(parts['clip']).get_vocab()
  whole = task.weights(shapes, task.frozen)
  assert {name: leaf.shape for name, leaf in whole.items()} == {
    name: leaf.shape for name, leaf in task.clip.shapes.items()
  }


@pytest.mark.parametrize(('settings', 'words'), [
  ({'locked': 'image'}, 'locked_from'),
  ({'locked_from': 'x'}, 'locked'),
  ({'locked': 'image', 'locked_from': 'nowhere'}, 'nowhere'),
  ({'loss': 'sigmoid', 'label_smoothing': 0.1}, 'label_smoothing'),
])
def test_what_does_not_go_together_is_refused(settings, words, tmp_path, fails, small_data):
  config = tiny.write_config(tmp_path / 'recipe.py', tiny.clip_config(settings))
  said = fails('train', '--config', config, '--workdir', tmp_path / 'run')
  assert words in said
