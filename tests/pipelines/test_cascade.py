"""Cascades: what the stages make of each other's pictures, as one directory that `sample` opens."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from PIL import Image

from diffusion_jax.diffusion.noise import ScheduleConfig
from diffusion_jax.diffusion.parameterization import Parameterization
from diffusion_jax.errors import UserError
from diffusion_jax.evaluation.generated import fresh_weights
from diffusion_jax.parallel.mesh import MeshConfig, make_mesh
from diffusion_jax.pipelines.assembly import assemble
from diffusion_jax.pipelines.cascade import Cascade, Stage
from diffusion_jax.pipelines.directory import save_model
from diffusion_jax.pipelines.generator import read_generator
from diffusion_jax.pipelines.inputs import Inputs
from diffusion_jax.pipelines.sampling import SampleConfig
from diffusion_jax.pipelines.spaces import PixelSpace
from diffusion_jax.pixels import to_uint8
from tests import tiny

SPACE, SCHEDULE = PixelSpace(2), ScheduleConfig(rescale_betas_zero_snr=True)
SAMPLE = SampleConfig('ddim', steps=2, guidance=3.0)
PROMPTS = ['red apple', 'cat face', 'sun']


@pytest.fixture(scope='module')
def folders(parts, tmp_path_factory):
  """Directories of a model of 8 pixels, and of one that makes 16 of them."""
  text, out = {'text': {'path': parts['clip']}}, tmp_path_factory.mktemp('models')
  upscale = {'upscale': {'beta_schedule': 'linear', 'beta_start': 1e-4, 'beta_end': 0.02}}
  for number, (name, size, conditioners, more) in enumerate((
    ('base', 8, text, {}), ('double', 16, text | upscale, {'num_class_embeds': 351}),
  )):
    unet = dataclasses.replace(
      tiny.UNET, sample_size=size // 2, in_channels=15 if more else 12, out_channels=12, **more
    )
    model, _ = assemble(
      unet, SPACE, conditioners, SCHEDULE, Parameterization('v_prediction'), size=(size, size)
    )
    params = jax.jit(model.denoiser.initialize)(jax.random.key(number))
    save_model(
      out / name, model, jax.tree.map(np.asarray, params), space=SPACE, conditioners=conditioners,
      sample=SAMPLE, dtype='float32',
    )
  return out


@pytest.fixture(scope='module')
def cascade(folders, command):
  """Its directory, as `convert` writes it."""
  to = folders / 'cascade'
  assert command('convert', '--from', folders / 'base', '--stage', folders / 'double', '--to', to,
                 '--layout', 'cascade') == 0
  return to


def opened(path, mesh):
  model, parts, sample = read_generator(str(path))
  return model, {role: part.load(mesh=mesh) for role, part in parts.items()}, sample


def changed(weights, others):
  """Return the roles of the networks that differ."""
  equal = lambda role: all(np.array_equal(weights[role][n], others[role][n]) for n in weights[role])
  return {role for role in weights if not equal(role)}


def test_the_stages_draw_in_turn(cascade, folders):
  """What each would draw alone of what it is given, by its own settings and noise."""
  mesh = make_mesh(MeshConfig(), jax.devices()[:1])
  (model, weights, config), base, double = (
    opened(path, mesh) for path in (cascade, folders / 'base', folders / 'double')
  )
  assert isinstance(model, Cascade) and model.trained_size == (16, 16) and config == SAMPLE
  assert model.edges.multiple == 4 and weights.keys() == model.networks.keys()
  assert changed(weights, fresh_weights(model, weights, mesh)) == {'denoiser', '1.denoiser'}
  draw = lambda level=20, **more: np.concatenate(list(model.sample(
    weights, PROMPTS, config, seed=3, mesh=mesh, batch_size=2, inputs=Inputs(noise_level=level),
    **more
  )))
  how = {'mesh': mesh, 'batch_size': 2}
  small = to_uint8(np.concatenate(list(base[0].sample(base[1], PROMPTS, SAMPLE, seed=3, **how))))
  assert small.shape == (3, 8, 8, 3)
  seed = int(np.random.SeedSequence([3, 1]).generate_state(1)[0])
  wanted = np.concatenate(list(double[0].sample(
    double[1], PROMPTS, double[2], seed=seed, inputs=Inputs(small=small), **how
  )))
  found = draw()
  np.testing.assert_allclose(found, wanted, atol=1e-5)
  assert np.abs(draw(300) - found).max() > 1e-2
  np.testing.assert_allclose(
    np.concatenate(list(model.sample(
      weights, PROMPTS[1:], config, seed=3, mesh=mesh, batch_size=2, first=1
    ))), found[1:], atol=1e-4,
  )
  assert draw(height=8, width=16).shape == (3, 8, 16, 3)
  for more, said in (
    ({'height': 10}, 'multiples of 4'), ({'latents': True}, 'leaves no latents'),
    ({'inputs': Inputs(images=np.zeros((1, 16, 16, 3), np.uint8))}, 'prompts alone'),
  ):
    with pytest.raises(UserError, match=said):
      list(model.sample(weights, PROMPTS, config, **{'seed': 0, 'mesh': mesh} | more))
  with pytest.raises(UserError, match='stage 1 of the cascade enlarges no picture'):
    Cascade.of(base[0], [Stage(base[0], SAMPLE)])
  with pytest.raises(UserError, match='base of a cascade needs small'):
    Cascade.of(double[0], [Stage(double[0], SAMPLE)])
  with pytest.raises(UserError, match='take the model of a stage'):
    model.with_compute(attention='xla')


def test_the_command_opens_it(cascade, command, fails, tmp_path):
  arguments = ('sample', '--model', cascade, '--prompt', 'cat', '--out')
  assert command(*arguments, tmp_path / 'out', '--noise_level', 40) == 0
  picture = Image.open(tmp_path / 'out' / '0000_cat.png')
  assert picture.size == (16, 16) and picture.text['noise_level'] == '40'
  assert 'a cascade draws from prompts alone' in fails(
    *arguments, 'x', '--image', tmp_path / 'out' / '0000_cat.png'
  )
  assert 'a cascade draws from prompts alone' in fails(*arguments, 'x', '--tiling', 'x')


def test_directories_that_are_none_are_refused(cascade, folders, fails, tmp_path):
  index = cascade / 'model_index.json'
  written = json.loads(index.read_text())
  assert written == {'_class_name': 'Cascade', 'stages': ['base', 'stage_1']}
  for stages, said in (
    ('base', 'must be a list of 2 to 8 folders'), (['base'], 'must be a list'),
    (['base', '../double'], 'double'), (['base', 'base'], 'enlarges no picture'),
  ):
    index.write_text(json.dumps(written | {'stages': stages}))
    assert said in fails('sample', '--model', cascade, '--prompt', 'cat', '--out', 'x')
  index.write_text(json.dumps(written))
  start = ('convert', '--from', folders / 'base', '--to', tmp_path / 'new')
  convert = lambda *more: fails(*start, *more)
  assert 'name each by --stage' in convert('--layout', 'cascade')
  assert '--stage is of --layout cascade' in convert('--layout', 'native', '--stage', cascade)
  assert 'is a Cascade; a cascade is of' in convert('--layout', 'cascade', '--stage', cascade)
  assert not (tmp_path / 'new').exists()
