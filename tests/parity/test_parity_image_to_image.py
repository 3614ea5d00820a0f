"""Image to image of Stable Diffusion 3 and Flux.1 against diffusers, whole, at several strengths.
"""

import dataclasses

import diffusers
import jax
import numpy as np
import pytest
import torch
from PIL import Image

from diffusion_jax.parallel.mesh import MeshConfig, make_mesh
from diffusion_jax.pipelines.directory import load_model
from diffusion_jax.pipelines.inputs import Inputs
from tests.parity import small_pipelines as small

PROMPTS, NEGATIVE, STEPS = ['cab ab', 'b a c d'], 'a', 5
SIZE = 12, 20
IMAGES = np.random.default_rng(0).integers(0, 256, (2, *SIZE, 3), np.uint8)
KINDS = {
  'sd3': diffusers.StableDiffusion3Img2ImgPipeline, 'flux_dev': diffusers.FluxImg2ImgPipeline,
}


def second_noise(seed=0):
  """The first that a seeded generator draws is the encoder's, of next to no deviation here."""
  generator, shape = torch.Generator().manual_seed(seed), (2, 16, *(edge // 2 for edge in SIZE))
  _, noise = (torch.randn(shape, generator=generator) for _ in range(2))
  return noise.permute(0, 2, 3, 1).numpy()


@pytest.mark.parametrize('name', KINDS)
def test_several_strengths(name, tmp_path):
  """Also those that are no whole number of steps, and the pipeline that they save for this."""
  theirs = small.make(name)
  more = {'guidance_scale': 3.5}  # Which of Flux's pipelines that from texts alone has by itself.
  if name == 'sd3':
    more = {'negative_prompt': [NEGATIVE] * 2, 'guidance_scale': 7.0}
  pipeline = KINDS[name](**theirs.components)
  pipeline.set_progress_bar_config(disable=True)
  pipeline.save_pretrained(tmp_path / name)
  model, weights, sample = load_model(str(tmp_path / name))
  mesh = make_mesh(MeshConfig(), jax.devices()[:1])
  weights, sample = model.on_mesh(weights, mesh), dataclasses.replace(sample, steps=STEPS)

  def draw(strength, images=IMAGES):
    [found] = model.sample(
      weights, PROMPTS, sample, seed=0, mesh=mesh, batch_size=2, noise=second_noise(),
      negative=NEGATIVE if name == 'sd3' else '', inputs=Inputs(images, strength),
      height=SIZE[0], width=SIZE[1],
    )
    return found / 2 + 0.5

  drawn = []
  for strength in (0.4, 0.5, 0.6, 0.75, 1.0):
    wanted = pipeline(
      prompt=PROMPTS, image=[Image.fromarray(one) for one in IMAGES], strength=strength,
      height=SIZE[0], width=SIZE[1], num_inference_steps=STEPS, output_type='np',
      generator=torch.Generator().manual_seed(0), max_sequence_length=small.T5_LENGTH, **more,
    ).images
    found = draw(strength)
    error, inside = np.abs(found - wanted).max(), ((wanted > 0) & (wanted < 1)).mean()
    print(f'{name} {strength}: {error:.2e} std {wanted.std():.3f} inside {inside:.2f}')
    assert wanted.std() > 0.02 and inside > 0.5 and error < 2e-4, strength
    drawn.append(found)
  assert np.abs(drawn[0] - drawn[3]).max() > 1e-2
  assert np.abs(draw(0.4, IMAGES[::-1]) - drawn[0]).max() > 1e-2
