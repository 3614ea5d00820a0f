"""DALL-E 2: a prior is trained for a decoder; both are one directory, drawn from and scored."""

import dataclasses
import json
import shutil
import types
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from diffusion_jax.diffusion.noise import ScheduleConfig
from diffusion_jax.diffusion.parameterization import Parameterization
from diffusion_jax.errors import UserError
from diffusion_jax.evaluation.generated import fresh_weights
from diffusion_jax.formats.networks import save_params
from diffusion_jax.models.network import Network
from diffusion_jax.models.text.clip import CLIP
from diffusion_jax.models.unet import UNetConfig
from diffusion_jax.parallel.mesh import MeshConfig, make_mesh
from diffusion_jax.pipelines.assembly import assemble
from diffusion_jax.pipelines.directory import load_model, save_model
from diffusion_jax.pipelines.generator import read_generator
from diffusion_jax.pipelines.inputs import Inputs
from diffusion_jax.pipelines.sampling import SampleConfig
from diffusion_jax.pipelines.spaces import PixelSpace
from diffusion_jax.pipelines.unclip import UnCLIP
from diffusion_jax.train.tasks.token_prior import _embeddings
from tests import tiny

LOOP = {'total_steps': 2, 'checkpoint_every_steps': 1}
SAMPLE = SampleConfig(sampler='ddim', steps=2, guidance=1.0)
# The prior reads texts and embeddings of one width.
CONFIG = dataclasses.replace(tiny.CLIP, projection_dim=16)
UNET = UNetConfig(
  sample_size=8, in_channels=48, out_channels=48, block_out_channels=(8,), layers_per_block=1,
  norm_num_groups=4, cross_attention_dim=CONFIG.projection_dim, attention_head_dim=2,
  down_block_types=('DownBlock2D',), up_block_types=('UpBlock2D',),
)


@pytest.fixture(scope='module')
def clip(once, parts):
  """The directory of a CLIP with random weights."""

  def make(folder):
    params = jax.jit(Network.of(CLIP, CONFIG).initialize)(jax.random.key(5))
    save_params(folder, CONFIG, jax.tree.map(np.asarray, params))
    for file in Path(parts['clip']).glob('tokenizer*'):
      shutil.copy(file, folder)

  return str(once('unclip_clip', make))


@pytest.fixture(scope='module')
def decoder(once, clip):
  """A directory that draws 32 x 32 pixels of an embedding of CLIP, with random weights."""

  def make(folder):
    how = dict(space=PixelSpace(4), conditioners={'image_embedding': {'path': clip}})
    model, _ = assemble(
      UNET, how['space'], how['conditioners'], ScheduleConfig(), Parameterization('epsilon'),
      size=(tiny.SIZE, tiny.SIZE),
    )
    params = jax.jit(model.denoiser.initialize)(jax.random.key(2))
    params = {name: np.asarray(value) + 0.05 for name, value in params.items()}
    save_model(folder, model, params, **how, sample=SAMPLE, dtype='float32')

  return str(once('unclip_decoder', make))


@pytest.fixture(scope='module')
def run(once, clip, decoder, command, small_data):
  """Workdir of a run of two steps, finished, with a score."""
  del small_data

  def make(folder):
    settings = {
      'decoder': decoder, 'clip': clip, 'cache': True, 'export_dtype': 'float32',
      'space': {'type': 'embeddings', 'clip': clip, 'scale': 2.0},
      'conditioners': {'text': {'path': clip, 'pooled': True}},
      'denoiser': {
        'type': 'prior', 'num_attention_heads': 2, 'attention_head_dim': 4, 'num_layers': 1,
        'embedding_dim': CONFIG.projection_dim, 'num_embeddings': tiny.LENGTH,
      },
      'objective': {'prediction': 'sample'}, 'schedule': {'beta_schedule': 'squaredcos_cap_v2'},
      'sample': {'sampler': 'ddim', 'steps': 2, 'guidance': 2.0},
      'evaluation': {'features': (), 'metrics': ('fd',)}, 'preview_captions': ['red apple'],
    }
    config = tiny._config('prior', [], settings, loop=LOOP)
    config = tiny.write_config(folder / 'recipe.py', config)
    assert command('train', '--config', config, '--workdir', folder / 'run', '--quiet') == 0

  return once('unclip', make) / 'run'


@pytest.fixture(scope='module')
def run_of_tokens(once, clip, decoder, command, small_data):
  """The same, with a prior that draws token by token."""
  del small_data

  def make(folder):
    settings = {
      'decoder': decoder, 'clip': clip, 'export_dtype': 'float32', 'components': 5, 'intervals': 8,
      'transformer': {'hidden_size': 16, 'num_hidden_layers': 1, 'num_attention_heads': 2,
                      'intermediate_size': 16},
      'evaluation': {'features': (), 'metrics': ('fd',)}, 'preview_captions': ['red apple'],
      'sample': {'candidates': 2},
    }
    loop = LOOP | {'evaluate_samples': 0}
    config = tiny._config('token_prior', tiny.WITH_TEXT, settings, loop=loop)
    config = tiny.write_config(folder / 'recipe.py', config)
    assert command('train', '--config', config, '--workdir', folder / 'run', '--quiet') == 0

  return once('unclip_tokens', make) / 'run'


@pytest.mark.parametrize('name', ['run', 'run_of_tokens'])
def test_a_run_and_its_directory_draw_the_same_and_are_scored(
  name, request, command, tmp_path, fails
):
  run = request.getfixturevalue(name)
  if name == 'run':
    assert json.loads((run / 'scores.json').read_text())['generated']['fd_clip'] > 0
  for name, source in (('run', ('--workdir', run)), ('model', ('--model', run / 'model'))):
    arguments = ('--prompt', 'red apple', '--seed', 1, '--out', tmp_path / name)
    assert command('sample', *source, *arguments) == 0
  drawn = [
    np.asarray(Image.open(tmp_path / name / '0000_red_apple.png')) for name in ('run', 'model')
  ]
  np.testing.assert_array_equal(*drawn)
  assert drawn[0].shape == (tiny.SIZE, tiny.SIZE, 3)
  strip = ('--prompt', 'red apple', '--prompt', 'sun', '--seed', 1, '--interpolate', 3)
  assert command('sample', '--model', run / 'model', *strip, '--out', tmp_path / 'strip') == 0
  first, middle, last = (
    np.asarray(Image.open(file), int) for file in sorted((tmp_path / 'strip').glob('0*.png'))
  )
  # All of one noise, that of the first picture of this seed; batches round in another way.
  assert np.abs(first - drawn[1]).max() <= 1
  assert 0 < np.abs(first - middle).sum() < np.abs(first - last).sum()
  source = ('--model', run / 'model' / 'prior', '--prompt', 'sun', '--out', tmp_path / 'none')
  assert 'draws embeddings and no pictures' in fails('sample', *source)


@pytest.mark.slow
@pytest.mark.parametrize('name', ['run', 'run_of_tokens'])
def test_going_on_after_a_stop_is_exact(name, request, command, tmp_path):
  run = request.getfixturevalue(name)
  tiny.check_going_on(command, run.parent / 'recipe.py', run, tmp_path)


def test_the_decoder_draws_of_an_embedding_what_it_draws_of_its_picture(run, decoder, sources):
  model, weights, sample = load_model(decoder)
  mesh = make_mesh(MeshConfig(), jax.devices()[:1])
  pictures = np.stack([sources[1][i]['image'] for i in range(2)])
  encoder = next(iter(model.conditioners.values()))
  reference = encoder.examples(pictures)['reference']
  how = dict(seed=0, mesh=mesh, batch_size=2)
  draw = lambda inputs: next(model.sample(weights, ['', ''], sample, inputs=inputs, **how))
  with jax.set_mesh(mesh):
    of_pictures = draw(Inputs(reference=reference))
    embedding = np.asarray(encoder.encode(weights, {'reference': reference})['text'])[:, 0]
    of_embeddings = draw(Inputs(embedding=embedding))
    np.testing.assert_allclose(of_embeddings, of_pictures, atol=1e-4)
    assert np.abs(draw(Inputs(embedding=-embedding)) - of_embeddings).max() > 1e-4
    # And the whole model draws of the embeddings that its prior draws.
    whole, parts, config = read_generator(str(run / 'model'))
    every = {role: part.load() for role, part in parts.items()}
    prompts = ['red apple', 'sun']
    images = next(whole.sample(every, prompts, config, **how))
    own = whole.embeddings(every, prompts, config, **how)
    np.testing.assert_allclose(next(whole.decode(every, own, **how)), images, atol=1e-5)
    untrained = fresh_weights(whole, every, mesh)
  for role in ('prior.denoiser', 'decoder.denoiser'):
    assert any(np.any(untrained[role][name] != every[role][name]) for name in every[role])
  assert own.shape == (2, CONFIG.projection_dim)


def test_a_strip_between_pictures_begins_with_a_variation_of_the_first(
  run, decoder, sources, command, fails, tmp_path
):
  for name, index in {'a.png': 0, 'b.png': 1}.items():
    Image.fromarray(sources[1][index]['image']).save(tmp_path / name)
  common = ('--prompt', '', '--seed', 3)
  between = ('--image', tmp_path / 'a.png', '--to', tmp_path / 'b.png', '--interpolate', 2)
  of_whole = ('sample', '--model', run / 'model', *common)
  assert command(*of_whole, *between, '--out', tmp_path / 'strip') == 0
  reference = ('--reference', tmp_path / 'a.png', '--out', tmp_path / 'one')
  assert command('sample', '--model', decoder, *common, *reference) == 0
  of = lambda folder: [
    np.asarray(Image.open(file), int) for file in sorted((tmp_path / folder).glob('0*.png'))
  ]
  (first, last), (one,) = of('strip'), of('one')
  np.testing.assert_array_equal(first, one)
  assert (last != one).any()
  image = ('--image', tmp_path / 'a.png', '--invert', '--out', tmp_path / 'none')
  assert 'which are not inverted' in fails(*of_whole, *image)


def test_a_prior_of_another_clip_is_refused(run, decoder):
  whole, _, config = read_generator(str(run / 'model'))
  with pytest.raises(UserError, match='the prior draws no embeddings'):
    UnCLIP(whole.decoder, whole.decoder, config)
  with pytest.raises(UserError, match='which the decoder does not read'):
    UnCLIP(whole.prior, whole.prior, config)


def test_pictures_are_embedded_few_at_a_time():
  """All of a data set at once would not fit into memory."""
  seen = []

  class Mean:
    def embed(self, weights, images):
      seen.append(len(images))
      return images.mean((1, 2))

  records = [{'image': np.full((2, 2, 3), i, np.uint8)} for i in range(130)]
  mesh = make_mesh(MeshConfig(), jax.devices()[:1])
  with jax.set_mesh(mesh):
    found = _embeddings(Mean(), {}, types.SimpleNamespace(train=records, mesh=mesh))
  assert set(seen) == {64}
  np.testing.assert_allclose(found[:, 0], np.arange(130) / 127.5 - 1, atol=1e-6)
