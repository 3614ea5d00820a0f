"""A pipeline distilled into fewer steps: begins as its teacher, is told the scale, opens again."""

import dataclasses

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from diffusion_jax import build
from diffusion_jax.diffusion.noise import NoiseConfig
from diffusion_jax.diffusion.parameterization import Parameterization
from diffusion_jax.models.dit import DiTConfig
from diffusion_jax.parallel.mesh import MeshConfig, make_mesh
from diffusion_jax.pipelines.assembly import assemble
from diffusion_jax.pipelines.directory import read_model, save_model
from diffusion_jax.pipelines.sampling import SampleConfig
from diffusion_jax.pipelines.spaces import LatentConfig
from diffusion_jax.recipe import load_config
from tests import tiny
from tests.tiny_pipeline import random_params
from tests.train.tasks.test_models import _same_images

UNET = dataclasses.replace(tiny.UNET, sample_size=8, in_channels=16, out_channels=16)
DIT = DiTConfig(
  sample_size=16, patch_size=4, in_channels=4, out_channels=4, num_layers=1, num_attention_heads=2,
  attention_head_dim=4, num_embeds_ada_norm=None, cross_attention_dim=16,
)
OBJECTIVES = {'unet': 'v_prediction', 'dit': 'flow_prediction'}
METHODS = {
  'consistency': ({'steps': 4, 'guidance': (2.0, 4.0)}, 'unet', {'sampler': 'lcm', 'steps': 2}),
  'progressive': ({'steps': 2, 'guidance': (3.0, 3.0)}, 'dit', {'sampler': 'ddim', 'steps': 2}),
  'mean_flow': ({'guidance': (2.0, 2.0)}, 'dit', {'sampler': 'flow_euler', 'steps': 1}),
}


@pytest.fixture(scope='module')
def teachers(parts, tmp_path_factory):
  """Two directories with random weights, of a U-Net that predicts v and of a DiT of a flow."""
  folder = tmp_path_factory.mktemp('teachers')
  table, flow = NoiseConfig(rescale_betas_zero_snr=True), NoiseConfig(process='flow')
  for name, config, patch, noise in (('unet', UNET, 2, table), ('dit', DIT, 1, flow)):
    how = {
      'space': LatentConfig(parts['autoencoder'], patch),
      'conditioners': {'text': {'path': parts['clip']}},
    }
    model, _ = assemble(
      config, *how.values(), noise, Parameterization(OBJECTIVES[name]), size=(tiny.SIZE, tiny.SIZE)
    )
    save_model(
      folder / name, model, random_params(config), **how, sample=SampleConfig(), dtype='float32'
    )
  return folder


def _values(parts, teachers, kind, distill, sample):
  values = tiny.diffusion_config(parts)
  values['task'] = 'distillation'
  values['settings'] = {
    'model': str(teachers / kind), 'clip': parts['clip'], 'cache': True,
    'objective': {'prediction': OBJECTIVES[kind]},
    'export_dtype': 'float32', 'preview_captions': ['red apple'], 'distill': distill,
    'sample': {'guidance': 1.0, **sample},
  }
  values['loop'] |= {'evaluate_samples': 0}
  return values


def _of(method, teachers, parts, **more):
  distill, kind, sample = METHODS[method]
  return _values(parts, teachers, kind, {'method': method, **distill, **more}, sample)


@pytest.mark.parametrize('method', METHODS)
def test_a_student_is_trained_drawn_opened_and_goes_on(method, teachers, parts, tmp_path, command):
  """It is told the scale, drawn for each example, and the way; its export samples as it does."""
  values, workdir = _of(method, teachers, parts), tmp_path / 'run'
  config = tiny.write_config(tmp_path / 'recipe.py', values)
  assert command('train', '--config', config, '--workdir', workdir, '--quiet') == 0
  losses = [row['loss'] for row in tiny.metrics(workdir).values()]
  assert np.isfinite(losses).all() and min(losses) > 0
  model, _, sample = read_model(str(workdir / 'model'))
  wanted = METHODS[method][2]
  assert (sample.sampler, sample.steps, sample.guidance) == (*wanted.values(), 1.0)
  assert getattr(model.denoiser.config, 'interval', False) == (method == 'mean_flow')
  if method == 'consistency':
    assert model.conditioners['distilled_guidance'].scale == 3.0
    _same_images(workdir, 'cat', command, tmp_path)
  if method == 'mean_flow':
    params = load_file(next((workdir / 'model' / 'denoiser').glob('*.safetensors')))
    name = 'transformer_blocks.0.norm1.emb.interval_embedder.linear_2.weight'
    assert np.abs(params[name]).max() > 0
  assert command('report', '--workdir', workdir) == 0
  tiny.check_going_on(command, config, workdir, tmp_path)


@pytest.mark.parametrize('method', ['consistency', 'mean_flow'])
def test_a_student_begins_as_its_teacher(method, teachers, parts, tmp_path):
  """Of one step unguided its first error is none: neither the scale that it is told nor the way
  changes anything at first. Guided, it has what to learn."""
  rng = np.random.default_rng(0)
  shapes = {'mean': (16, 16, 4), 'logvar': (16, 16, 4), 'text': (tiny.LENGTH, 16)}
  fields = {name: rng.standard_normal((8, *shape), np.float32) for name, shape in shapes.items()}
  made, scales = {}, {'plain': (1.0, 1.0), 'guided': (3.0, 3.0)}
  for name, guidance in list(scales.items())[: 1 + (method == 'consistency')]:
    values = _of(method, teachers, parts, steps=1, jumps=0.0, guidance=guidance)
    file = tiny.write_config(tmp_path / f'{name}.py', values)
    with tiny.few_devices(1):
      task = build.build(load_config(file), str(tmp_path)).task
      params = task.beginning(make_mesh(MeshConfig()), jax.random.key(0))
      run = jax.jit(lambda params, task=task: task.losses(
        params, task.frozen, {}, fields, jax.random.key(3)
      ).error)
      made[name] = np.asarray(run(params))
  np.testing.assert_allclose(made['plain'], 0, atol=1e-9)
  assert all((made[name] > 1e-6).all() for name in made if name == 'guided')


@pytest.mark.parametrize(('kind', 'distill', 'more', 'said'), [
  ('unet', {'method': 'mean_flow'}, {}, 'mean_flow is of a dit that predicts a flow'),
  ('dit', {'guidance': (1.0, 2.0)}, {}, 'can be told no scale; give one twice'),
  ('unet', {'guidance': (3.0, 2.0)}, {}, 'exchange the two'),
  ('unet', {'spacing': 'even'}, {}, 'settings.distill.spacing'),
  ('unet', {'method': 'progressive', 'steps': 600}, {}, 'steps'),
  ('unet', {}, {'caption_dropout': 0.1}, 'caption_dropout must be 0'),
])
def test_what_cannot_be_is_one_sentence(
  kind, distill, more, said, teachers, parts, tmp_path, command, capsys
):
  values = _values(parts, teachers, kind, distill, {'sampler': 'ddim'})
  values['settings'] |= more
  config = tiny.write_config(tmp_path / 'recipe.py', values)
  assert command('train', '--config', config, '--workdir', tmp_path / 'run', '--quiet') == 2
  (line,) = capsys.readouterr().err.splitlines()
  assert said in line
