"""Whole pipelines against diffusers: the same prompts, noise and pictures give the same images."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
import torch
from PIL import Image

from diffusion_jax.parallel.mesh import MeshConfig, make_mesh
from diffusion_jax.pipelines.conditions import Inputs
from diffusion_jax.pipelines.directory import load_text_to_image
from tests.parity import small_pipelines as small

PROMPTS, NEGATIVE = ['cab ab', 'b a c d e f g h a b c'], 'a'
RNG = np.random.default_rng(0)
NOISE = RNG.normal(size=(2, small.LATENT, small.LATENT, 4)).astype(np.float32)
IMAGES, CONTROL = RNG.integers(0, 256, (2, 2, small.SIZE, small.SIZE, 3), np.uint8)
SMALL = RNG.integers(0, 256, (2, small.LATENT, small.LATENT, 3), np.uint8)
MASKS = RNG.random((2, small.SIZE, small.SIZE)) > 0.5
DEPTH = RNG.random((2, small.LATENT, small.LATENT)).astype(np.float32)
STEPS, GUIDANCE = 10, 7.5


@pytest.fixture(scope='module')
def load(tmp_path_factory):
  """load(name): (theirs, our model, its weights, how it samples) of a pipeline they saved."""

  @functools.cache
  def run(name):
    folder = tmp_path_factory.mktemp('pipelines') / name
    theirs = small.make(name)
    theirs.save_pretrained(folder)
    return theirs, *load_text_to_image(str(folder)), folder

  return run


def pictures(images):
  return [Image.fromarray(image) for image in images]


def torch_noise(*shapes, seed=0):
  """What a seeded generator draws, NHWC."""
  generator = torch.Generator().manual_seed(seed)
  return [torch.randn(shape, generator=generator).permute(0, 2, 3, 1).numpy() for shape in shapes]


def draw_theirs(pipeline, negative=NEGATIVE, noise=NOISE, prompts=PROMPTS, **more):
  latents = {} if noise is None else {
    'latents': torch.tensor(noise).permute(0, 3, 1, 2)
  }
  told = {} if prompts is None else {'prompt': prompts}
  if negative is not None:
    told['negative_prompt'] = [negative] * 2
  how = dict(num_inference_steps=STEPS, guidance_scale=GUIDANCE, output_type='np')
  return pipeline(**told, **latents, **how | more).images


def draw(model, weights, sample, noise=NOISE, negative=NEGATIVE, prompts=PROMPTS, inputs=None,
         **changes):
  """Ours, in [0, 1] as theirs."""
  mesh = make_mesh(MeshConfig(), jax.devices()[:1])
  sample = dataclasses.replace(sample, steps=STEPS, **changes)
  [images] = model.draw(
    model.on_mesh(weights, mesh), prompts, sample, seed=0, mesh=mesh, negative=negative,
    noise=noise, batch_size=2, inputs=inputs,
  )
  return images / 2 + 0.5


def assert_same(found, wanted, name=''):
  """Within 1e-3, where the images say something: varied, and hardly clipped."""
  error = np.abs(found - wanted).max()
  inside = ((wanted > 0) & (wanted < 1)).mean()
  print(f'{name}: {error:.2e} std {wanted.std():.3f} inside {inside:.2f}')
  assert found.shape == wanted.shape
  assert wanted.std() > 0.02 and inside > 0.5
  assert error < 1e-3


@pytest.mark.parametrize('name', ['sd1', 'sd2_v'])
def test_text_to_image(load, name):
  theirs, *ours, _ = load(name)
  assert_same(draw(*ours), draw_theirs(theirs), name)


def test_two_encoders(load):
  theirs, *ours, _ = load('sdxl')
  assert_same(draw(*ours), draw_theirs(theirs), 'sdxl')
  nothing = draw_theirs(theirs, negative=None)
  assert_same(draw(*ours, negative=''), nothing, 'sdxl, no negative prompt')
  assert np.abs(nothing - draw_theirs(theirs, negative='')).max() > 1e-2
