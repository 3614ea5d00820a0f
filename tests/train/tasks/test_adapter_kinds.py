"""Fine-tuning with each kind of adapter: what it begins with, and what it writes."""

import jax
import numpy as np
import pytest

from diffusion_jax import build
from diffusion_jax.errors import UserError
from diffusion_jax.pipelines.adapters import add_loras
from diffusion_jax.pipelines.directory import load_model
from diffusion_jax.recipe import load_config
from diffusion_jax.train.optimizer import decay_mask
from tests import tiny

KINDS = {
  'lokr': {'kind': 'lokr', 'factor': 2, 'dora': True, 'rank': 4, 'alpha': 4.0},
  'loha': {'kind': 'loha', 'ranks': '(("attn1.to_q", 3),)', 'targets': "('to_q', 'conv1')"},
  'oft': {'kind': 'oft', 'rank': 2}, 'diag_oft': {'kind': 'diag_oft', 'rank': 2},
}
WRITTEN = {
  'lokr': {'kohya.safetensors'}, 'loha': {'kohya.safetensors', 'peft/unet', 'peft/text_encoder'},
  'oft': {'peft/unet'}, 'diag_oft': {'kohya.safetensors'},
}


@pytest.fixture(scope='module')
def task(arguments, tmp_path_factory):
  """task(**changes): the task of the recipe of LoRA with these changes, and its mesh."""

  def make(**changes):
    folder = tmp_path_factory.mktemp('run')
    file, more = arguments('lora', folder, **changes)
    with tiny.few_devices():
      training = build.build(load_config(file, more), str(folder))
    return training.task, training.mesh

  return make


@pytest.mark.parametrize('kind', KINDS)
def test_what_is_written_is_what_was_trained(kind, task, pipelines, tmp_path):
  changes = {f'settings.lora.{key}': value for key, value in KINDS[kind].items()}
  if kind == 'loha':
    changes |= {'settings.text_training': 'lora', 'settings.text_lora.kind': 'loha'}
  one, mesh = task(**changes)
  params = one.beginning(mesh, jax.random.key(0))
  norms = {name for name in params if name.endswith('.magnitude')}
  assert bool(norms) == (kind == 'lokr')
  assert {name for name, decays in decay_mask(params).items() if not decays} == norms
  model, weights = load_model(str(pipelines / 'sd'))[:2]
  merge = lambda params: {role: found[1] for role, found in one.trainable.changed(params).items()}
  for role, found in merge(params).items():
    for name, value in found.items():
      np.testing.assert_allclose(value, weights[role][name], atol=1e-6, err_msg=name)

  rng = np.random.default_rng(0)
  params = {n: np.asarray(p) + 0.1 * rng.normal(size=p.shape).astype(np.float32)
            for n, p in params.items()}
  one.export(tmp_path, params, {})
  assert not (tmp_path / 'pytorch_lora_weights.safetensors').exists()
  wanted = merge(params)
  for file in WRITTEN[kind] - {'peft/text_encoder'}:
    added = add_loras(model, weights, [(str(tmp_path / file), 1.0)])
    for role, found in wanted.items():
      if role == 'text_encoder' and file.startswith('peft'):
        continue
      for name, value in found.items():
        np.testing.assert_allclose(added[role][name], value, atol=1e-6, err_msg=name)
      assert any(np.abs(found[n] - weights[role][n]).max() > 1e-3 for n in found)
  there = {str(path.relative_to(tmp_path)) for path in (tmp_path / 'peft').glob('*')}
  assert there | {p.name for p in tmp_path.glob('*.safetensors')} == WRITTEN[kind]

  # Several at once: each with its weight, and of the weights without the other, in any order.
  file = str(tmp_path / min(WRITTEN[kind]))
  twice = add_loras(model, weights, [(file, 0.75), (file, -0.5)])['denoiser']
  for name, value in add_loras(model, weights, [(file, 0.25)])['denoiser'].items():
    np.testing.assert_allclose(twice[name], value, atol=1e-5, err_msg=name)


def test_a_pattern_that_fits_nothing_is_refused_before_training(task):
  with pytest.raises(UserError, match=r"lora.ranks has 'attn9', but no adapted layer fits it"):
    task(**{'settings.lora.ranks': '(("attn9", 3),)'})
