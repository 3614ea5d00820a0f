"""Pipelines of Stable Diffusion 3 and Flux.1 against diffusers, whole."""

import dataclasses
import json
import shutil

import diffusers
import jax
import numpy as np
import pytest
import torch

from diffusion_jax.errors import UserError
from diffusion_jax.files import INDEX
from diffusion_jax.formats.convert import convert
from diffusion_jax.formats.pipeline import save_changed
from diffusion_jax.parallel.mesh import MeshConfig, make_mesh
from diffusion_jax.pipelines.directory import load_model, read_model
from diffusion_jax.pipelines.model import DENOISER
from tests.parity import small_pipelines as small

PROMPTS, NEGATIVE, STEPS = ['cab ab', 'b a c d e f g h a b c'], 'a', 5
SIZES = (small.SIZE, small.SIZE), (12, 20)
FLUX = 'flux_dev', 'flux_schnell'


def noise_of(size):
  return np.random.default_rng(1).normal(size=(2, *(n // 2 for n in size), 16)).astype(np.float32)


def draw_theirs(theirs, size, prompts=PROMPTS, **more):
  """In [0, 1]; Flux takes its noise as it packs it."""
  height, width = size
  latents = torch.tensor(noise_of(size).transpose(0, 3, 1, 2))
  if isinstance(theirs, diffusers.FluxPipeline):
    latents = theirs._pack_latents(latents, 2, 16, height // 2, width // 2)
  return theirs(
    prompt=prompts, latents=latents, height=height, width=width, num_inference_steps=STEPS,
    output_type='np', **{'max_sequence_length': small.T5_LENGTH} | more,
  ).images


def draw(model, weights, sample, size, prompts=PROMPTS, negative='', **changes):
  mesh = make_mesh(MeshConfig(), jax.devices()[:1])
  [images] = model.sample(
    model.on_mesh(weights, mesh), prompts, dataclasses.replace(sample, steps=STEPS, **changes),
    seed=0, mesh=mesh, negative=negative, noise=noise_of(size), batch_size=2, height=size[0],
    width=size[1],
  )
  return images / 2 + 0.5


def assert_same(found, wanted, name):
  error, inside = np.abs(found - wanted).max(), ((wanted > 0) & (wanted < 1)).mean()
  print(f'{name}: {error:.2e} std {wanted.std():.3f} inside {inside:.2f}')
  assert found.shape == wanted.shape
  assert wanted.std() > 0.02 and inside > 0.5
  assert error < 2e-4


@pytest.mark.parametrize('name', ['sd3', 'sd3_without_t5', 'sd35'])
def test_stable_diffusion_3(load, name):
  theirs, _, *ours = load(name)
  assert ours[2].guidance == 7.0
  more = dict(negative_prompt=[NEGATIVE] * 2, guidance_scale=7.0)
  if theirs.text_encoder_3 is None:
    more['max_sequence_length'] = 256
  for size in SIZES:
    wanted = draw_theirs(theirs, size, **more)
    assert_same(draw(*ours, size, negative=NEGATIVE), wanted, f'{name} {size}')
  other = draw(*ours, size, negative='')
  assert np.abs(other - wanted).max() > 1e-2


@pytest.mark.parametrize('name', FLUX)
def test_flux(load, name):
  theirs, _, *ours = load(name)
  for size in SIZES:
    wanted = draw_theirs(theirs, size)  # Its own guidance is 3.5.
    assert_same(draw(*ours, size), wanted, f'{name} {size}')
  if name == 'flux_dev':
    other = draw(*ours, size, distilled_guidance=1.0)
    assert_same(other, draw_theirs(theirs, size, guidance_scale=1.0), 'guidance 1')
    assert np.abs(other - wanted).max() > 1e-2


def state(pipeline):
  """Every tensor by part and name."""
  parts = pipeline.components.items()
  return {
    f'{name}.{key}': value for name, part in parts if isinstance(part, torch.nn.Module)
    for key, value in part.state_dict().items()
  }


@pytest.mark.parametrize('name', ['sd35', 'sd3_without_t5', 'flux_dev'])
def test_saved_and_read_again(load, name, tmp_path):
  """In our layout and back in that of diffusers, which opens it; to the bit."""
  theirs, folder, _, weights, sample = load(name)
  convert(str(folder), str(tmp_path / 'native'), 'native')
  convert(str(tmp_path / 'native'), str(tmp_path / 'again'), 'diffusers')
  for made in ('native', 'again'):
    _, other, how = load_model(str(tmp_path / made))
    assert how == sample and other.keys() == weights.keys()
    jax.tree.map(np.testing.assert_array_equal, other, weights)
  # Which diffusers wants to be told once more.
  absent = dict.fromkeys(('text_encoder_3', 'tokenizer_3')) if 'without' in name else {}
  again, wanted = type(theirs).from_pretrained(tmp_path / 'again', **absent), state(theirs)
  found = state(again)
  assert found.keys() == wanted.keys()
  assert all(torch.equal(found[key], wanted[key]) for key in wanted)
  for part in ('transformer', 'vae', 'scheduler'):
    assert said(getattr(again, part)) == said(getattr(theirs, part))


def said(part):
  """The config of a part of diffusers, as it is written."""
  values = json.loads(json.dumps(dict(part.config)))
  return {key: value for key, value in values.items() if key[0] != '_'}


@pytest.mark.parametrize('name', ['sd35', 'flux_schnell'])
def test_a_trained_denoiser_takes_the_place_of_the_old_one(load, name, tmp_path):
  theirs, folder, model, weights, _ = load(name)
  trained = {key: value + 1 for key, value in weights[DENOISER].items()}
  changed = {DENOISER: (model.denoiser.config, trained)}
  save_changed(tmp_path / 'new', str(folder), changed, 'float32')
  found, old = state(type(theirs).from_pretrained(tmp_path / 'new')), state(theirs)
  for key in old:
    added = 1 if key.startswith('transformer.') else 0
    torch.testing.assert_close(found[key], old[key] + added, rtol=0, atol=0)
  _, again, _ = load_model(str(tmp_path / 'new'))
  jax.tree.map(np.testing.assert_array_equal, again, {**weights, DENOISER: trained})


def copied(folder, target, index=(), **parts):
  """A copy of a pipeline's directory with other entries of its index and configs of its parts."""
  shutil.copytree(folder, target)
  edited = [(target / INDEX, index), *((target / n / 'config.json', c) for n, c in parts.items())]
  for file, changes in edited:
    values = json.loads(file.read_text()) | dict(changes)
    file.write_text(json.dumps({key: value for key, value in values.items() if value is not ...}))
  return str(target)


NONE = [None, None]


@pytest.mark.parametrize('left_out', [('text_encoder',), ('text_encoder_2',),
                                      ('text_encoder', 'text_encoder_2')])
def test_towers_of_clip_may_be_left_out(load, left_out, tmp_path):
  """Then zeros take the place of their texts; diffusers can leave out T5 alone."""
  _, folder, model, weights, _ = load('sd35')
  path = copied(folder, tmp_path / 'less', dict.fromkeys(left_out, NONE))
  other, less, _ = load_model(path)
  told, wanted = (
    m.condition(w, m.rows(PROMPTS, height=16, width=16))
    for m, w in ((other, less), (model, weights))
  )
  assert not set(left_out) & less.keys()
  text, pooled = np.array(wanted.text), np.array(wanted.pooled)
  clip, w = text[:, : small.LENGTH], small.WIDTH
  for role, own in (('text_encoder', slice(0, w)), ('text_encoder_2', slice(w, 2 * w))):
    assert np.abs(clip[..., own]).max() > 0.1 < np.abs(pooled[:, own]).max()
    if role in left_out:
      clip[..., own] = pooled[:, own] = 0
  np.testing.assert_allclose(told.pooled, pooled, rtol=0, atol=1e-6)
  found = np.array(told.text)
  if len(left_out) == 2:  # As many zeros as CLIP has tokens.
    assert found.shape[1] == 77 + small.T5_LENGTH
    found = np.delete(found, np.s_[: 77 - small.LENGTH], axis=1)
  np.testing.assert_allclose(found, text, rtol=0, atol=1e-6)


@pytest.mark.parametrize(('name', 'index', 'parts', 'says'), [
  ('sd35', {'text_encoder_3': ...}, {}, 'says nothing of text_encoder_3'),
  ('sd35', {'transformer': NONE}, {}, 'names no transformer'),
  ('sd35', {'_class_name': 'StableDiffusion3ControlNetPipeline'}, {}, "ControlNetPipeline', which"),
  ('flux_dev', {'_class_name': 'FluxFillPipeline'}, {}, 'give a model of Stable.*FluxPipeline'),
  ('flux_dev', {'_class_name': ['custom', 'X']}, {}, 'is of the class .*, which is not impl'),
  ('flux_dev', {'text_encoder_2': NONE}, {}, 'names no text_encoder_2, without which'),
  ('sd35', {}, {'transformer': {'joint_attention_dim': 24}},
   'joint_attention_dim is 24, but the text encoder gives texts of width 20'),
  ('sd3', {'text_encoder': NONE}, {'transformer': {'pooled_projection_dim': 8}},
   'leave 0 of pooled_projection_dim 8'),
  ('sd35', {}, {'text_encoder_3': {'d_model': 24}}, 'gives texts of width 24'),
  ('flux_dev', {}, {'transformer': {'pooled_projection_dim': 9}}, 'pooled texts of width 9'),
])
def test_parts_that_do_not_fit_are_one_sentence(load, name, index, parts, says, tmp_path):
  _, folder, *_ = load(name)
  path = copied(folder, tmp_path / 'other', index, **parts)
  with pytest.raises(UserError, match=says) as error:
    read_model(path)
  assert str(error.value).count('\n') == 0


@pytest.mark.parametrize(('name', 'kind'), [
  ('sd35', 'StableDiffusion3InpaintPipeline'), ('flux_dev', 'FluxInpaintPipeline')
])
def test_another_class_of_the_same_networks(load, name, kind, tmp_path):
  _, folder, model, _, sample = load(name)
  found, _, how = read_model(copied(folder, tmp_path / 'other', {'_class_name': kind}))
  assert how == sample and found.denoiser.config == model.denoiser.config
  assert found.conditioners.keys() == model.conditioners.keys()
  assert found.text.readers.keys() == model.text.readers.keys()


def test_guidance_that_a_denoiser_is_not_told(load):
  _, _, *ours = load('flux_schnell')
  with pytest.raises(UserError, match='distilled_guidance is 2'):
    draw(*ours, (16, 16), distilled_guidance=2.0)
