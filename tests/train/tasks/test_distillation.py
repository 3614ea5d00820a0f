"""A pipeline distilled into fewer steps: begins as its teacher, is told the scale, opens again."""


import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from diffusion_jax import build
from diffusion_jax.parallel.mesh import MeshConfig, make_mesh
from diffusion_jax.pipelines.directory import read_model
from diffusion_jax.recipe import load_config
from tests import tiny
from tests.train.tasks.test_models import _same_images

DIT = {
  'type': 'dit', 'sample_size': 16, 'patch_size': 4, 'in_channels': 4, 'out_channels': 4,
  'num_layers': 1, 'num_attention_heads': 2, 'attention_head_dim': 4, 'num_embeds_ada_norm': None,
  'cross_attention_dim': 16,
}
FLOW = {'objective': {'prediction': 'flow_prediction'}, 'schedule': {'process': 'flow'}}
METHODS = {
  'consistency': ({'steps': 4, 'guidance': (2.0, 4.0)}, 'unet', {'sampler': 'lcm', 'steps': 2}),
  'progressive': ({'steps': 2, 'guidance': (3.0, 3.0)}, 'dit', {'sampler': 'ddim', 'steps': 2}),
  'mean_flow': ({'guidance': (2.0, 2.0)}, 'dit', {'sampler': 'flow_euler', 'steps': 1}),
}


@pytest.fixture(scope='module')
def teachers(parts, tmp_path_factory, command):
  """Two runs of four steps, of a U-Net that predicts v and of a DiT of a flow."""
  folder = tmp_path_factory.mktemp('teachers')
  kinds = {'unet': tiny.diffusion_config(parts), 'dit': tiny.diffusion_config(parts, FLOW)}
  settings = kinds['dit']['settings']
  for name in ('unet', 'latent_patch_size', 'autoencoder'):
    del settings[name]
  settings |= {
    'denoiser': DIT, 'space': {'type': 'latents', 'autoencoder': parts['autoencoder']},
  }
  for name, values in kinds.items():
    values['loop'] |= {'evaluate_samples': 0}
    # Far from its first weights, whose last layer is zero.
    values['optimizer'] |= {'learning_rate': 3e-2}
    config = tiny.write_config(folder / f'{name}.py', values)
    assert command('train', '--config', config, '--workdir', folder / name, '--quiet') == 0
  return folder


def _values(parts, model, objective, distill, sample):
  values = tiny.diffusion_config(parts)
  values['task'] = 'distillation'
  values['settings'] = {
    'model': str(model), 'clip': parts['clip'], 'objective': objective, 'cache': True,
    'export_dtype': 'float32', 'preview_captions': ['red apple'], 'distill': distill,
    'sample': {'guidance': 1.0, **sample},
  }
  values['loop'] |= {'evaluate_samples': 0}
  return values


def _of(method, teachers, parts, **more):
  distill, kind, sample = METHODS[method]
  objective = FLOW['objective'] if kind == 'dit' else {'prediction': 'v_prediction'}
  distill = {'method': method, **distill, **more}
  return _values(parts, teachers / kind / 'model', objective, distill, sample)


@pytest.mark.parametrize('method', METHODS)
def test_a_student_is_trained_drawn_and_opened_again(method, teachers, parts, tmp_path, command):
  """It is told the scale, and the way, and its export samples as its previews do."""
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


@pytest.mark.slow
def test_going_on_after_a_stop_is_exact(teachers, parts, tmp_path, command):
  """With a scale drawn for each example."""
  values = _of('consistency', teachers, parts)
  config, run = tiny.write_config(tmp_path / 'recipe.py', values), tmp_path / 'run'
  assert command('train', '--config', config, '--workdir', run, '--quiet') == 0
  tiny.check_going_on(command, config, run, tmp_path, 6)


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
  objective = FLOW['objective'] if kind == 'dit' else {'prediction': 'v_prediction'}
  values = _values(parts, teachers / kind / 'model', objective, distill, {'sampler': 'ddim'})
  values['settings'] |= more
  config = tiny.write_config(tmp_path / 'recipe.py', values)
  assert command('train', '--config', config, '--workdir', tmp_path / 'run', '--quiet') == 2
  (line,) = capsys.readouterr().err.splitlines()
  assert said in line
