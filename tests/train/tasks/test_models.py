"""Any denoiser in any space on any process, by config: trained, sampled, exported, opened again."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from diffusion_jax import build
from diffusion_jax.config import parse, untyped
from diffusion_jax.errors import UserError
from diffusion_jax.formats.networks import network_format, save_params
from diffusion_jax.models.controlnet import ControlNetConfig
from diffusion_jax.models.unet import UNetConfig
from diffusion_jax.pipelines.directory import load_model
from diffusion_jax.run import TrainedRun
from tests import tiny

DIT = {
  'type': 'dit', 'num_attention_heads': 2, 'attention_head_dim': 4, 'in_channels': 3,
  'out_channels': 3, 'num_layers': 1, 'sample_size': tiny.SIZE, 'patch_size': 8,
  'num_embeds_ada_norm': 3,
}
CLASSES = ['red', 'green', 'blue']
HEUN = {'sampler': 'heun', 'steps': 2, 'guidance': 2.0}
PROCESSES = {
  'flow': ({'process': 'flow', 'process_options': {'shift': 3.0}, 'label': 'sigma'},
           {'prediction': 'flow_prediction', 'times': 'logit_normal'}, HEUN),
  'edm': ({'process': 'karras', 'process_options': {'sigma_min': 0.002, 'sigma_max': 80.0},
           'label': 'log_snr'},
          {'prediction': 'edm', 'weighting': 'edm', 'weighting_options': {'data_std': 1.0},
           'times': 'log_normal'}, HEUN | {'spacing': 'karras'}),
  'vp': ({'process': 'cosine'}, {'prediction': 'v_prediction', 'loss': 'vdm'},
         {'sampler': 'ddim', 'steps': 2}),
}


def _trained(values, tmp_path, command, *arguments):
  config, workdir = tiny.write_config(tmp_path / 'recipe.py', values), tmp_path / 'run'
  assert command('train', '--config', config, '--workdir', workdir, '--quiet', *arguments) == 0
  losses = [line['loss'] for line in tiny.metrics(workdir).values()]
  assert len(losses) == 4 and np.isfinite(losses).all()
  return workdir


def _same_images(workdir, prompt, command, out, *arguments):
  """A run and its export sample the same."""
  images = [
    _drawn(place, workdir, prompt, command, out / place, *arguments)
    for place in ('workdir', 'model')
  ]
  assert images[0] == images[1]
  return images[0]


def _drawn(place, workdir, prompt, command, out, *arguments):
  """The pixels of one picture of a run, or of its export."""
  source = {'workdir': workdir, 'model': workdir / 'model'}[place]
  assert command('sample', f'--{place}', source, '--prompt', prompt, '--out', out, '--batch', 1,
                 *arguments) == 0
  return next(out.glob('0000_*.png')).read_bytes().split(b'IDAT')[1]


def _pictures(folder):
  """Two folders of classes, each with pictures of its colour."""
  for i, name in enumerate(CLASSES):
    (folder / name).mkdir(parents=True)
    for n in range(20):
      colour = np.full((tiny.SIZE, tiny.SIZE, 3), 4 * n, np.uint8)
      colour[..., i] = 200
      Image.fromarray(colour).save(folder / name / f'{n}.png')


def test_a_transformer_on_pixels_learns_classes(parts, tmp_path, command):
  """Of images higher than wide, and draws such."""
  _pictures(tmp_path / 'data')
  values = tiny.diffusion_config(parts)
  settings = {k: values['settings'][k] for k in ('clip', 'preview_captions', 'export_dtype')}
  values['settings'] = settings | {
    'space': {'type': 'pixels'}, 'denoiser': DIT, 'conditioners': {'class': {}},
    'schedule': {'process': 'flow'}, 'objective': {'prediction': 'flow_prediction'},
    'sample': {'sampler': 'flow_euler', 'steps': 2, 'guidance': 2.0},
    'preview_captions': ['red', 'blue'],
  }
  values['data'] |= {'dataset': f'folder:{tmp_path / "data"}',
                     'transforms': [['label', {}], ['normalize', {}]]}
  values['data'] |= {'test_fraction': 0.5, 'size': [tiny.SIZE, 24]}
  values['loop'] |= {'evaluate_samples': 16, 'sample_every_steps': 2}
  workdir = _trained(values, tmp_path, command)
  scores = json.loads((workdir / 'scores.json').read_text())
  assert scores['generated'].keys() == scores['untrained'].keys() and len(scores['generated'])
  model, weights, _ = load_model(str(workdir / 'model'))
  assert model.trained_size == (tiny.SIZE, 24)
  assert model.text is None and model.conditioners['class'].classes == ('blue', 'green', 'red')
  assert weights['denoiser']['transformer_blocks.0.norm1.emb.class_embedder.embedding_table'
                             '.embedding'].shape == (4, 8)
  _same_images(workdir, 'green', command, tmp_path)
  assert Image.open(next((tmp_path / 'model').glob('0000_*'))).size == (24, tiny.SIZE)
  with pytest.raises(UserError, match="'brown' is no class of the model; give one of blue, green"):
    model.check_prompts(['brown'])


@pytest.mark.parametrize('name', PROCESSES)
def test_latents_are_trained_on_any_process(name, parts, tmp_path, command):
  schedule, objective, sample = PROCESSES[name]
  values = tiny.diffusion_config(parts, {
    'schedule': schedule, 'objective': objective, 'sample': sample,
  }, loop={'evaluate_samples': 0})
  workdir = _trained(values, tmp_path, command)
  _same_images(workdir, 'cat', command, tmp_path)
  run, (exported, _, settings) = TrainedRun(str(workdir)), load_model(str(workdir / 'model'))
  for model in (run.model, exported):
    assert model.noise.table is None and model.noise.config.process == schedule['process']
    assert model.parameterization.name == objective['prediction']
  numbers = settings.numbers(model.noise)
  start = np.hypot(*(float(part[0]) for part in numbers.grid))
  np.testing.assert_allclose(numbers.start, start, rtol=1e-6)
  model = run.model
  level = model.noise.at(jnp.asarray([0.2, 0.7]))
  alpha, sigma = (np.asarray(part, np.float64)[:, None] for part in (level.alpha, level.sigma))
  x0, eps = np.random.default_rng(0).normal(size=(2, 2, 3)).astype(np.float32)
  std = np.sqrt(alpha**2 + sigma**2)
  wanted = {
    'flow': eps - x0, 'vp': alpha * eps - sigma * x0,
    # (x0 - c_skip x) / c_out at unit data deviation (Karras et al. 2022, table 1).
    'edm': (x0 - alpha / std**2 * (alpha * x0 + sigma * eps)) * std / sigma,
  }[name]
  found = model.parameterization.target(x0, eps, level.alpha, level.sigma)
  np.testing.assert_allclose(found, wanted, rtol=2e-3, atol=2e-3)
  assert {'flow': np.allclose(alpha + sigma, 1), 'vp': np.allclose(std, 1),
          'edm': np.allclose(alpha, 1)}[name]


EDGES = [*tiny.WITH_TEXT[:-1], ['edges', {}], *tiny.NORMALIZE]
CONDITIONED = {
  'control': ({}, {}, EDGES, ('--control', 'FILE')),
  'upscale': ({'in_channels': 19, 'num_class_embeds': 400}, {'beta_end': 0.02}, tiny.WITH_TEXT,
              ('--small', 'FILE', '--noise_level', 5)),
  'image_embedding': ({'cross_attention_dim': 8}, {}, tiny.NORMALIZE, ('--reference', 'FILE')),
  'inpaint': ({'in_channels': 33}, {}, tiny.WITH_TEXT, ('--image', 'FILE', '--mask', 'FILE')),
}


@pytest.mark.parametrize('name', CONDITIONED)
def test_a_model_is_conditioned_on_images_by_config(name, parts, tmp_path, command):
  changes, options, transforms, arguments = CONDITIONED[name]
  values = tiny.diffusion_config(parts)
  settings, loop = values['settings'], values['loop']
  unet = settings['unet'] = {**settings['unet'], **changes}
  settings['conditioners'] = {'text': {'path': parts['clip']}}
  if name == 'control':
    config = ControlNetConfig.for_unet(UNetConfig(**unet))
    config = dataclasses.replace(config, conditioning_embedding_out_channels=(4, 8, 8))
    made = network_format('controlnet').network(config)
    params = jax.jit(made.initialize)(jax.random.key(0))
    # Its last layers begin at zero, which would add nothing.
    save_params(tmp_path / 'control', config, {n: v + 0.1 for n, v in params.items()})
    options = {'path': str(tmp_path / 'control')}
  elif name == 'image_embedding':
    settings['conditioners'], options = {}, {'path': parts['clip']}
  settings['conditioners'][name] = options
  settings['cache'], values['data']['transforms'] = False, transforms
  loop |= {'evaluate_samples': 0, 'sample_every_steps': 2}
  workdir = _trained(values, tmp_path, command)
  assert list((workdir / 'samples').iterdir())  # Of the test split's own images.
  rng, given = np.random.default_rng(0), []
  for i in range(2):
    picture = rng.integers(0, 256, (tiny.SIZE, tiny.SIZE, 3), np.uint8)
    Image.fromarray(picture).save(tmp_path / f'{i}.png')
    given.append([str(tmp_path / f'{i}.png') if one == 'FILE' else one for one in arguments])
  found = _same_images(workdir, 'cat', command, tmp_path / '0', *given[0])
  assert found != _drawn('model', workdir, 'cat', command, tmp_path / '1', *given[1])


def test_older_settings_are_the_same(parts):
  """A U-Net in latents as recipes spelt it, and as they may."""
  old = tiny.diffusion_config(parts)
  new = json.loads(json.dumps(old))
  settings = new['settings']
  settings['denoiser'] = {'type': 'unet', **settings.pop('unet')}
  settings['space'] = {
    'type': 'latents', 'autoencoder': settings.pop('autoencoder'),
    'patch': settings.pop('latent_patch_size'),
  }
  settings['conditioners'] = {'text': {'path': settings['clip']}}
  parsed = parse(old), parse(new)
  assert parsed[0].settings.conditioned == parsed[1].settings.conditioned
  assert parsed[0].settings.denoiser == parsed[1].settings.denoiser
  assert parse(untyped(parsed[1])) == parsed[1]
  assert parse(untyped(parsed[0])) == parsed[0]


@pytest.mark.parametrize(('changes', 'message'), [
  ({'denoiser': {'type': 'dti'}}, 'did you mean dit'),
  ({'denoiser': {'type': 'dit', 'patch': 2}}, 'settings.denoiser.patch is not a known key'),
  ({'space': {'type': 'pixel'}}, 'did you mean pixels'),
  ({'conditioners': {'klass': {}}}, 'did you mean class'),
  ({'space': {'type': 'pixels'}}, 'what it is to denoise has 3'),
  ({'conditioners': {'depth': {}}}, 'settings.conditioners.depth needs what no data set has'),
  ({'conditioners': {'inpaint': {}}, 'cache': True}, 'settings.cache keeps what follows from'),
  ({'conditioners': {'upscale': {}}}, 'z and its conditions have 7; set in_channels'),
  ({'conditioners': {'control': {}}}, 'settings.conditioners.control takes path alone'),
  ({'size': [32, 33]}, r'multiples of 2; the nearest such size is \(32, 32\)'),
  ({'size': [32, 64]}, 'data.size is .*, but openmoji has one size'),
])
def test_what_cannot_be_is_one_sentence(parts, tmp_path, changes, message):
  values = tiny.diffusion_config(parts)
  for key in ('unet', 'autoencoder', 'latent_patch_size'):
    values['settings'].pop(key)
  space = {'type': 'latents', 'autoencoder': parts['autoencoder']}
  size = 32 if 'space' in changes else 16
  unet = {'sample_size': size, 'block_out_channels': [8], 'norm_num_groups': 4,
          'down_block_types': ['DownBlock2D'], 'up_block_types': ['UpBlock2D'],
          'cross_attention_dim': 16, 'attention_head_dim': 2}
  values['data']['size'] = changes.get('size', values['data']['size'])
  changes = {name: value for name, value in changes.items() if name != 'size'}
  values['settings'] |= {'space': space, 'denoiser': unet, 'cache': False, **changes}
  values['data']['transforms'] = [list(one) for one in tiny.WITH_TEXT]
  values['loop']['evaluate_samples'] = 0
  with pytest.raises(UserError, match=message):
    build.build(values, str(tmp_path / 'run'))
