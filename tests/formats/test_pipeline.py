"""Models that were trained here: what is absurd in their files is one sentence."""

import json

import numpy as np
import pytest

from diffusion_jax.errors import UserError
from diffusion_jax.formats.convert import convert
from diffusion_jax.formats.pipeline import save_changed
from diffusion_jax.formats.tensors import write_json
from diffusion_jax.pipelines.directory import load_model
from tests.tiny import ROOT

NAN, LONG = float('nan'), 'x' * 10**5
NO_SIZE = [10**9, -1, 0, NAN, 1.5, '1', True, [10**9], [[1]], [1] * 10**5, {}]

CLIP = 'asset:clip-openmoji-64'
OWN = {
  '_class_name': 'Diffusion', 'sample': {}, 'prediction': 'v_prediction',
  'space': {'type': 'latents', 'autoencoder': 'asset:autoencoder-openmoji-64', 'patch': 2},
}


def model(folder, **changes):
  """A model of our own class whose files are changed: {file: {key: value}} by keyword."""
  source = ROOT / 'diffusion_jax' / 'assets' / 'text-to-image-openmoji-64'
  for file in source.rglob('*'):
    if file.is_file():
      target = folder / file.relative_to(source)
      target.parent.mkdir(parents=True, exist_ok=True)
      target.write_bytes(file.read_bytes())
  files = {'index': 'model_index.json', 'scheduler': 'scheduler/scheduler_config.json',
           'unet': 'unet/config.json'}
  for name, values in changes.items():
    path = folder / files[name]
    write_json(path, json.loads(path.read_text()) | values)
  return str(folder)


@pytest.mark.parametrize('changes', [
  *({'scheduler': {'num_train_timesteps': bad}} for bad in NO_SIZE),
  *({'scheduler': {key: bad}} for key in ('beta_start', 'beta_end')
    for bad in (NAN, -1, 2, '0.1', [], 1e300)),
  *({'scheduler': {'beta_schedule': bad}} for bad in (3, [], LONG)),
  *({'scheduler': {'prediction_type': bad}} for bad in (3, [], LONG)),
  *({'index': {'latent_patch_size': bad}} for bad in NO_SIZE),
  *({'index': {'sample': bad}} for bad in ([], 3, LONG, {'steps': '3'}, {'guidance': []})),
  *({'index': {'_class_name': 'Other', 'unet': bad}} for bad in ([], 3, {})),
  *({'unet': {key: 10**9}} for key in ('layers_per_block', 'cross_attention_dim', 'in_channels')),
])
def test_models_of_our_own(changes, tmp_path):
  with pytest.raises(UserError) as error:
    load_model(model(tmp_path, **changes))
  assert len(str(error.value)) < 400


def test_steps_of_a_model(tmp_path, fails):
  for steps in (10**9, 0, -1):
    path = model(tmp_path, index={'sample': {'steps': steps, 'spacing': 'karras'}})
    line = fails('sample', '--model', path, '--prompt', 'x', '--out', tmp_path / 'out')
    assert f'steps is {steps}' in line


@pytest.mark.parametrize('text', [
  None, {'path': CLIP}, {'encoders': [{'path': CLIP}, {'path': CLIP, 'skip': 1}]},
])
def test_trained_encoders_take_the_place_of_an_asset(text, tmp_path):
  """Of both classes of our own; with their tokenizers, and the denoiser where it is read."""
  source = model(tmp_path / 'a')
  if text is not None:
    write_json(tmp_path / 'a' / 'model_index.json', OWN | {'conditioners': {'text': text}})
    (tmp_path / 'a' / 'unet').rename(tmp_path / 'a' / 'denoiser')
  made, weights, _ = load_model(source)
  changed = {
    role: (made.networks[role].config, {n: np.asarray(v) + 1 for n, v in weights[role].items()})
    for role in ('denoiser', *list(made.text.networks)[-1:])
  }
  save_changed(tmp_path / 'b', source, changed, 'float32')
  again, found, _ = load_model(str(tmp_path / 'b'))
  assert found.keys() == weights.keys()
  for role, values in found.items():
    wanted = changed[role][1] if role in changed else weights[role]
    assert all(np.array_equal(value, wanted[name]) for name, value in values.items()), role
  np.testing.assert_array_equal(again.text.tokens(['red cat']), made.text.tokens(['red cat']))


@pytest.mark.parametrize(('index', 'words'), [
  ({'space': {'type': 'pixels'}, 'conditioners': {}}, 'of this library alone .* on nothing'),
  ({'space': {'autoencoder': 'vae'}, 'conditioners': {'class': {}}}, 'conditioned on class'),
  ({'space': 3, 'conditioners': {}}, 'describes no model'), ({}, 'describes no model'),
  ({'space': {'autoencoder': '../vae'}, 'conditioners': {}}, 'leads out of its model'),
])
def test_what_no_other_layout_has_is_not_converted(index, words, tmp_path):
  write_json(tmp_path / 'model' / 'model_index.json', {'_class_name': 'Diffusion', **index})
  with pytest.raises(UserError, match=words):
    convert(tmp_path / 'model', tmp_path / 'out', 'diffusers')
