"""Pipelines of PixArt-alpha, -sigma and DiT against diffusers, whole."""

import dataclasses
import importlib
import json

import diffusers
import jax
import numpy as np
import pytest

from diffusion_jax.errors import UserError
from diffusion_jax.files import INDEX
from diffusion_jax.formats.convert import convert
from diffusion_jax.parallel.mesh import MeshConfig, make_mesh
from diffusion_jax.pipelines.bins import bins, nearest_bin
from diffusion_jax.pipelines.directory import load_model
from tests.parity import small_pipelines as small

torch = pytest.importorskip('torch')

PROMPTS, NEGATIVE, STEPS = [' Cab ab', 'b a c d e f g h a b c'], 'a', 5
SIZES = (16, 16), (8, 24)
NAMES = 'pixart_alpha', 'pixart_sigma'


def noise_of(size):
  return np.random.default_rng(1).normal(size=(2, *(n // 2 for n in size), 4)).astype(np.float32)


def draw_theirs(theirs, size, prompts=PROMPTS, noise=None):
  """In bins where the noise is given."""
  latents = torch.tensor((noise_of(size) if noise is None else noise).transpose(0, 3, 1, 2))
  return theirs(
    prompt=prompts, negative_prompt=NEGATIVE, latents=latents, height=size[0], width=size[1],
    num_inference_steps=STEPS, use_resolution_binning=noise is not None, clean_caption=False,
    max_sequence_length=small.T5_LENGTH, output_type='np',
  ).images


def draw(model, weights, sample, size, prompts=PROMPTS, noise=None, **changes):
  mesh = make_mesh(MeshConfig(), jax.devices()[:1])
  changes = {'binning': 'none'} | changes
  [images] = model.sample(
    model.on_mesh(weights, mesh), prompts, dataclasses.replace(sample, steps=STEPS, **changes),
    seed=0, mesh=mesh, negative=NEGATIVE, noise=noise_of(size) if noise is None else noise,
    batch_size=2, height=size[0], width=size[1],
  )
  return images / 2 + 0.5


@pytest.mark.parametrize('name', NAMES)
def test_pictures(load, name):
  theirs, _, *ours = load(name)
  assert (ours[2].guidance, ours[2].steps) == (4.5, 20)
  assert ('sizes' in ours[0].conditioners) == (name == 'pixart_alpha')
  for size in SIZES:
    wanted, found = draw_theirs(theirs, size), draw(*ours, size)
    assert found.shape == wanted.shape and wanted.std() > 0.02
    assert ((wanted > 0) & (wanted < 1)).mean() > 0.5
    assert np.abs(found - wanted).max() < 2e-4
  assert np.abs(draw(*ours, size, ['b', 'c']) - wanted).max() > 1e-3


def test_other_sizes_are_cut_out_of_those_of_training(load):
  """Of any number of pixels; without bins they are drawn as they are, where they can be."""
  theirs, _, *ours = load('pixart_256')
  assert ours[2].binning == 'aspect'
  size, drawn = (201, 330), (192, 320)
  noise = np.random.default_rng(1).normal(size=(2, *(n // 8 for n in drawn), 4))
  noise = noise.astype(np.float32)
  wanted = draw_theirs(theirs, size, noise=noise)
  found = draw(*ours, size, noise=noise, binning='aspect')
  assert wanted.shape == found.shape == (2, *size, 3) and wanted.std() > 0.02
  assert np.abs(found - wanted).max() < 2e-4
  inside = draw(*ours, drawn, noise=noise, binning='aspect')
  assert np.abs(inside - draw(*ours, drawn, noise=noise)).max() == 0
  with pytest.raises(UserError, match='multiples of 16; the nearest such size is 208x336'):
    draw(*ours, size)


@pytest.mark.parametrize(('edge', 'module', 'table'), [
  (256, 'alpha', 'ASPECT_RATIO_256_BIN'), (512, 'alpha', 'ASPECT_RATIO_512_BIN'),
  (1024, 'alpha', 'ASPECT_RATIO_1024_BIN'), (2048, 'sigma', 'ASPECT_RATIO_2048_BIN'),
])
def test_the_sizes_of_training_are_those_of_the_published_tables(edge, module, table):
  module = importlib.import_module(f'diffusers.pipelines.pixart_alpha.pipeline_pixart_{module}')
  table = getattr(module, table)
  wanted = [(float(ratio), (int(h), int(w))) for ratio, (h, w) in table.items()]
  assert list(bins(edge).items()) == wanted
  processor = diffusers.image_processor.PixArtImageProcessor
  for size in np.random.default_rng(0).integers(50, 3000, (50, 2)).tolist():
    found = nearest_bin(*size, edge // 8)
    assert found == processor.classify_height_width_bin(*size, ratios=table)
  assert nearest_bin(70, 30, 8) == nearest_bin(70, 30, None) == (70, 30)


def test_classes(load):
  theirs, folder, *_ = load('dit')
  index = json.loads((folder / INDEX).read_text())  # The published one has names, and keeps them.
  (folder / INDEX).write_text(json.dumps(index | {'id2label': {'2': 'cock'}}))
  model, weights, sample = load_model(str(folder))
  noise = torch.Generator().manual_seed(0)
  wanted = theirs([2, 0], guidance_scale=4.0, generator=noise, num_inference_steps=STEPS,
                  output_type='np').images
  x = torch.randn((2, 4, 8, 8), generator=noise.manual_seed(0)).numpy().transpose(0, 2, 3, 1)
  assert sample.guidance == 4.0
  mesh = make_mesh(MeshConfig(), jax.devices()[:1])
  [images] = model.sample(
    model.on_mesh(weights, mesh), ['cock', '0'], dataclasses.replace(sample, steps=STEPS), seed=0,
    mesh=mesh, noise=x, batch_size=2,
  )
  assert wanted.std() > 0.02 and np.abs(images / 2 + 0.5 - wanted).max() < 2e-4
  # The name of the class in the files that were published first.
  file = folder / 'transformer' / 'config.json'
  values = json.loads(file.read_text())
  older = {'_class_name': 'Transformer2DModel', 'cross_attention_dim': None}
  file.write_text(json.dumps(values | older))
  again, _, _ = load_model(str(folder))
  assert again.denoiser.config == model.denoiser.config


@pytest.mark.parametrize('name', [*NAMES, 'dit'])
def test_saved_and_read_again(load, name, tmp_path):
  """In our layout and back in that of diffusers, which opens it; to the bit."""
  theirs, folder, _, weights, sample = load(name)
  convert(str(folder), str(tmp_path / 'native'), 'native')
  convert(str(tmp_path / 'native'), str(tmp_path / 'again'), 'diffusers')
  _, other, how = load_model(str(tmp_path / 'again'))
  assert how == sample
  jax.tree.map(np.testing.assert_array_equal, other, weights)
  again = type(theirs).from_pretrained(tmp_path / 'again')
  for part in ('transformer', 'vae', *['text_encoder'] * (name != 'dit')):
    found, wanted = (getattr(pipeline, part).state_dict() for pipeline in (again, theirs))
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)
