"""T5, alone and with CLIP, conditions a U-Net and an MMDiT: trained, resumed, exported, sampled."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from diffusion_jax import build
from diffusion_jax.config import parse
from diffusion_jax.data.cache import Choose, cached_source
from diffusion_jax.errors import UserError
from diffusion_jax.parallel.mesh import MeshConfig, make_mesh
from diffusion_jax.pipelines.assembly import assemble
from diffusion_jax.pipelines.directory import load_model
from diffusion_jax.recipe import load_config
from diffusion_jax.train.tasks.diffusion import NULL
from tests import tiny

MMDIT = {
  'type': 'mmdit', 'sample_size': 8, 'in_channels': 16, 'out_channels': 16, 'patch_size': 2,
  'num_layers': 2, 'attention_head_dim': 4, 'num_attention_heads': 2, 'joint_attention_dim': 24,
  'caption_projection_dim': 8, 'pooled_projection_dim': tiny.CLIP.projection_dim,
  'pos_embed_max_size': 8,
}
LENGTH = 16


def settings(name, parts, t5):
  """Those of the base that differ: the U-Net with T5, from images, or the MMDiT with CLIP and T5,
  from a cache."""
  t5 = {'path': t5, 'length': LENGTH}
  if name == 'unet':
    text = {'encoders': [t5]}
    return {'cache': False, 'conditioners': {'text': text}}
  text = {'encoders': [{'path': parts['clip']}, t5], 'join': 'length', 'pooled': True}
  return {
    'cache': True, 'conditioners': {'text': text}, 'denoiser': MMDIT,
    'schedule': {'process': 'flow'}, 'objective': {'prediction': 'flow_prediction'},
    'sample': {'sampler': 'flow_euler', 'steps': 2, 'guidance': 2.0},
  }


def config(name, parts, t5):
  values = tiny.diffusion_config(parts, settings(name, parts, t5))
  if name == 'unet':
    values['settings']['unet'] |= {'cross_attention_dim': tiny.T5.d_model}
    values['data']['transforms'] = tiny.WITH_TEXT
  else:
    del values['settings']['unet']
  values['loop']['sample_every_steps'] = 2
  return values


@pytest.fixture(scope='module')
def trained(once, parts, t5, command):
  """trained(name): workdir of a run of four steps."""

  def run(name):
    def make(folder):
      recipe = tiny.write_config(folder / 'recipe.py', config(name, parts, t5))
      assert command('train', '--config', recipe, '--workdir', folder / 'run', '--quiet') == 0

    return once(f'texts_{name}', make) / 'run'

  return run


def losses(workdir):
  found = [line['loss'] for line in tiny.metrics(workdir).values()]
  assert np.isfinite(found).all()
  return found


@pytest.mark.parametrize('name', ['unet', 'mmdit'])
def test_trained_previewed_exported_and_drawn(name, trained, command, tmp_path):
  workdir, drawn = trained(name), []
  assert len(losses(workdir)) == 4
  assert list(workdir.rglob('*.png'))  # Previews.
  for source in (('--workdir', workdir), ('--model', workdir / 'model')):
    out = tmp_path / source[0].strip('-')
    assert command('sample', *source, '--prompt', 'red apple', '--out', out, '--batch', 1) == 0
    drawn.append(next(out.glob('0000_*.png')).read_bytes().split(b'IDAT')[1])
  assert drawn[0] == drawn[1]
  index = json.loads((workdir / 'model' / 'model_index.json').read_text())
  folders = [one['path'] for one in index['conditioners']['text']['encoders']]
  assert index['_class_name'] == 'Diffusion'
  assert folders == ['text_encoder', 'text_encoder_2'][: len(folders)]


@pytest.mark.parametrize('name', ['unet', 'mmdit'])
def test_a_run_that_was_cut_off_goes_on_to_the_same_weights(name, trained, command, tmp_path):
  run = trained(name)
  tiny.check_going_on(command, run.parent / 'recipe.py', run, tmp_path)


@pytest.mark.parametrize('name', ['unet', 'mmdit'])
def test_padding_does_not_change_a_picture(name, trained):
  """Prompts padded to twice the length; without a mask they would make another picture."""
  model, weights, sample = load_model(str(trained(name) / 'model'))
  rng = np.random.default_rng(0)  # After four steps the text of a transformer hardly counts.
  weights['denoiser'] = {
    n: p + rng.normal(0, 0.2, p.shape).astype(p.dtype) for n, p in weights['denoiser'].items()
  }
  text = model.conditioners['text']
  role, mesh = list(text.networks)[-1], make_mesh(MeshConfig(), jax.devices()[:1])

  def draw(**changes):
    reader = dataclasses.replace(text.readers[role], **changes)
    other = dataclasses.replace(text, readers=text.readers | {role: reader})
    found = model.with_conditioner('text', other)
    sample = found.sample(weights, ['red apple', 'cat face'], how, seed=0, mesh=mesh)
    return np.concatenate(list(sample))

  how = dataclasses.replace(sample, steps=2, guidance=3.0)
  wanted = draw()
  np.testing.assert_allclose(draw(length=2 * LENGTH), wanted, atol=1e-4)
  assert np.abs(draw(length=2 * LENGTH, masked=False) - wanted).max() > 1e-3


def test_eight_devices_train_as_one(trained, parts, t5, command, tmp_path):
  """Which encode the texts of their part of the batch."""
  values = config('unet', parts, t5)
  values['loop'] |= {'sample_every_steps': 0, 'total_steps': 2, 'evaluate_samples': 0}
  recipe = tiny.write_config(tmp_path / 'recipe.py', values)
  arguments = '--config', recipe, '--workdir', tmp_path / 'run', '--quiet'
  assert command('train', *arguments, devices=8) == 0
  np.testing.assert_allclose(losses(tmp_path / 'run'), losses(trained('unet'))[:2], rtol=1e-4)


def test_a_text_encoder_of_another_width_is_refused_before_any_work(
  parts, t5, command, tmp_path, capsys
):
  values = config('unet', parts, t5)
  values['settings']['unet']['cross_attention_dim'] = 16
  recipe = tiny.write_config(tmp_path / 'recipe.py', values)
  assert command('train', '--config', recipe, '--workdir', tmp_path / 'run', '--quiet') != 0
  said = capsys.readouterr().err.strip()
  assert said.endswith(
    'denoiser.cross_attention_dim is 16, but the text encoder gives texts of width 24; set it to '
    '24.'
  ) and not (tmp_path / 'run' / 'checkpoints').exists()


def test_the_recipe_takes_another_t5(t5, parts):
  overrides = [
    f'settings.conditioners.text.path={t5}', 'settings.unet.cross_attention_dim=24',
    f'settings.autoencoder={parts["autoencoder"]}', f'settings.clip={parts["clip"]}',
  ]
  config = parse(load_config('openmoji/unet_t5', [f'--config.{one}' for one in overrides]))
  settings = config.settings
  model, found = assemble(
    settings.denoiser, settings.space, settings.conditioned, settings.schedule,
    settings.objective.parameterization,
  )
  assert model.text.kept == ('text', 'mask') and model.text.length == 48
  assert found['text_encoder'].path == t5
  own = load_config('openmoji/t5').settings.t5.d_model
  assert load_config('openmoji/unet_t5').settings.unet.cross_attention_dim == own


@pytest.fixture(scope='module')
def task(parts, t5, sources):
  """The MMDiT's of CLIP and T5, with a cache."""
  return build.build_task(parse(config('mmdit', parts, t5)), *sources, None, None)


def test_a_cache_keeps_each_caption_with_its_mask(task, sources):
  few = [sources[0][i] for i in range(4)]
  cache = cached_source(few, task.model, task.frozen, make_mesh(MeshConfig()), progress=False)
  for record, row in zip(few, map(cache.__getitem__, range(4)), strict=True):
    wanted = task.model.text.encode(
      task.frozen, {'tokens': task.model.text.tokens(record['captions'])}
    )
    texts = list(row['texts'])
    np.testing.assert_array_equal([one['mask'] for one in texts], wanted['mask'])
    chosen = Choose()(row, np.random.default_rng(0))
    which = [np.array_equal(chosen['text'], one['text']) for one in texts]
    np.testing.assert_array_equal(chosen['mask'], texts[which.index(True)]['mask'])
    np.testing.assert_allclose(chosen['pooled'], wanted['pooled'][which.index(True)], atol=2e-3)
  assert {'text', 'pooled', 'mask'} <= set(task.batch_fields)


def test_what_each_encoder_gives_is_dropped_by_itself(parts, t5, sources):
  values = config('mmdit', parts, t5)
  values['settings'] |= {'encoder_dropout': (0.5, 0.2), 'caption_dropout': 0.0}
  task = build.build_task(parse(values), *sources, None, None)
  null = {name.removesuffix('.bias'): np.asarray(x) for name, x in task.frozen[NULL].items()}
  given = {name: np.full((400, *x.shape), 9, x.dtype) for name, x in null.items()}
  out = jax.tree.map(np.asarray, task.drop({'text': given}, task.frozen[NULL], jax.random.key(1)))
  text, width = out['text']['text'], task.model.text.shape('text_encoder').width
  of_clip = (text[:, : tiny.LENGTH, :width] != 9).any(axis=(1, 2))
  of_t5 = (text[:, tiny.LENGTH :, : tiny.T5.d_model] != 9).any(axis=(1, 2))
  assert 150 < of_clip.sum() < 250 and 40 < of_t5.sum() < 120
  assert 10 < (of_clip & of_t5).sum() < 80
  gone = np.stack([of_clip] * tiny.LENGTH + [of_t5] * LENGTH, axis=1)[..., None]
  wanted = np.where(gone, null['text'], 9)
  np.testing.assert_array_equal(text[..., :width], wanted[..., :width])
  np.testing.assert_array_equal(
    out['text']['pooled'], np.where(of_clip[:, None], null['pooled'], 9)
  )
  np.testing.assert_array_equal(out['text']['mask'], np.where(gone[..., 0], null['mask'], 9))
  values['settings']['encoder_dropout'] = (0.5,)
  with pytest.raises(UserError, match=r'encoder_dropout has 1 fractions.*2 text encoders'):
    build.build_task(parse(values), *sources, None, None)


def test_a_dropped_caption_has_the_mask_of_the_empty_one(task):
  null = task.frozen[NULL]
  assert null['mask.bias'].sum() == tiny.LENGTH + 1  # CLIP's is not masked; T5's is </s> alone.
  shapes = {name: null[f'{name}.bias'].shape for name in task.model.text.kept}
  given = {name: np.full((400, *shape), 9, null[f'{name}.bias'].dtype)
           for name, shape in shapes.items()}
  out = jax.tree.map(np.asarray, task.drop({'text': given}, null, jax.random.key(0))['text'])
  gone = (out['mask'] != 9).any(axis=1)
  assert 10 < gone.sum() < 100
  for name, value in out.items():
    assert (value[gone] == np.asarray(null[f'{name}.bias'])).all() and (value[~gone] == 9).all()
