"""Stable Diffusion XL's refiner, and consistency models told their guidance, against diffusers."""

import dataclasses
import functools

import diffusers
import jax
import numpy as np
import pytest
import torch
from diffusers.schedulers import scheduling_lcm

from diffusion_jax.diffusion.samplers import initial_noise
from diffusion_jax.diffusion.samplers.common import unit_noise
from diffusion_jax.errors import UserError
from diffusion_jax.formats.convert import convert
from diffusion_jax.parallel.mesh import MeshConfig, make_mesh
from diffusion_jax.pipelines.directory import load_model
from diffusion_jax.pipelines.inputs import Inputs
from tests.parity import small_pipelines as small
from tests.parity.test_parity_pipelines import (
  IMAGES,
  NEGATIVE,
  NOISE,
  PROMPTS,
  assert_same,
  draw,
  pictures,
  torch_noise,
)
from tests.parity.test_parity_transformer_pipelines import said, state

STEPS, GUIDANCE = 10, 5.0
BETAS = dict(beta_start=0.00085, beta_end=0.012, beta_schedule='scaled_linear')
SCHEDULERS = {
  'DDIMScheduler': dict(steps_offset=1, set_alpha_to_one=False, clip_sample=False),
  'EulerDiscreteScheduler': dict(steps_offset=1, timestep_spacing='leading'),
  'DPMSolverMultistepScheduler': dict(use_karras_sigmas=True),
}
CONSISTENT = 'lcm', 'lcm_xl'


def ask(pipeline, **more):
  how = dict(num_inference_steps=STEPS, guidance_scale=GUIDANCE, output_type='np')
  return pipeline(prompt=PROMPTS, negative_prompt=[NEGATIVE] * 2, **how | more).images


def test_the_refiner_changes_a_picture(load):
  """Given its score and sizes, and with a negative prompt."""
  theirs, _, *ours = load('refiner')
  assert (ours[2].guidance, ours[0].conditioners['sizes'].aesthetic) == (5.0, True)
  [_, noise] = torch_noise(*[(2, 4, small.LATENT, small.LATENT)] * 2)  # The encoder's is first.
  change = functools.partial(draw, *ours, noise=noise)
  ask_it = lambda **more: ask(
    theirs, image=pictures(IMAGES), generator=torch.Generator().manual_seed(0), **more
  )
  wanted = ask_it(strength=0.6)
  assert_same(change(inputs=Inputs(IMAGES, 0.6)), wanted, 'image to image')
  assert_same(change(inputs=Inputs(IMAGES)), ask_it(), 'with its own strength')
  told = dict(original_size=(64, 48), aesthetic_score=3.0, negative_aesthetic_score=9.0)
  other = ask_it(strength=0.6, crops_coords_top_left=(3, 5), **told)
  told['original_size'] = '64x48'
  found = change(inputs=Inputs(IMAGES, 0.6), crop=(3, 5), **told)
  assert_same(found, other, 'told otherwise')
  assert np.abs(wanted - other).max() > 1e-3
  for one in ({'crop': (0, 0)}, {'original_size': ''}, {'aesthetic_score': 6.0},
              {'negative_aesthetic_score': 2.5}):
    again = change(inputs=Inputs(IMAGES, 0.6), **{'crop': (3, 5)} | told | one)
    assert np.abs(again - other).max() > 1e-4, one


@pytest.mark.parametrize('scheduler', SCHEDULERS)
def test_the_refiner_takes_the_last_steps(load, scheduler, tmp_path):
  """Ensemble of experts: the base hands latents on at 0.6."""
  made = {}
  for name in ('sdxl', 'refiner'):
    pipeline = small.make(name)
    pipeline.scheduler = getattr(diffusers, scheduler)(**BETAS, **SCHEDULERS[scheduler])
    pipeline.save_pretrained(tmp_path / name)
    made[name] = pipeline, *load_model(str(tmp_path / name))
  base, *ours = made['sdxl']
  refiner, *experts = made['refiner']
  start = torch.tensor(NOISE).permute(0, 3, 1, 2)
  latents = ask(base, latents=start.clone(), denoising_end=0.6, output_type='latent')
  wanted = ask(refiner, image=latents, denoising_start=0.6)
  left = run(*ours, noise=NOISE, denoising_end=0.6, latents=True)
  if scheduler == 'DDIMScheduler':  # Others scale theirs otherwise.
    np.testing.assert_allclose(left, latents.permute(0, 2, 3, 1), rtol=0, atol=1e-4)
  assert left.dtype == np.float32 and left.shape == NOISE.shape
  found = run(*experts, inputs=Inputs(latents=left), denoising_start=0.6)
  assert_same(found / 2 + 0.5, wanted, scheduler)
  whole = run(*ours, noise=NOISE)
  assert np.abs(found - whole).max() > 1e-2


def run(model, weights, sample, latents=False, inputs=None, noise=None, **changes):
  mesh = make_mesh(MeshConfig(), jax.devices()[:1])
  sample = dataclasses.replace(sample, steps=STEPS, guidance=GUIDANCE, **changes)
  [images] = model.sample(
    model.on_mesh(weights, mesh), PROMPTS, sample, seed=0, mesh=mesh, negative=NEGATIVE,
    noise=noise, batch_size=2, inputs=inputs, latents=latents,
  )
  return images


@pytest.mark.parametrize('name', CONSISTENT)
def test_consistency_models(load, name, monkeypatch):
  """Told the guidance they imitate; the noise between steps is ours."""
  theirs, _, *ours = load(name)
  default = {'lcm': 8.5, 'lcm_xl': 7.5}[name]
  assert ours[2].guidance == 1.0
  assert ours[0].conditioners['distilled_guidance'].scale == default
  keys = initial_noise(0, 0, 2, NOISE.shape[1:])[1]
  for scale in (default, 2.0):
    calls = iter(range(9))

    def noise(shape, **_):
      drawn = np.asarray(unit_noise(keys, next(calls), np.zeros(NOISE.shape, np.float32)))  # noqa: B023
      return torch.tensor(drawn).permute(0, 3, 1, 2)

    monkeypatch.setattr(scheduling_lcm, 'randn_tensor', noise)
    wanted = theirs(
      prompt=PROMPTS, latents=torch.tensor(NOISE).permute(0, 3, 1, 2), num_inference_steps=4,
      guidance_scale=scale, output_type='np',
    ).images
    told = {} if scale == default else {'distilled_guidance': scale}
    found = draw(*ours, negative='', **{'steps': 4} | told)
    assert_same(found, wanted, f'{name} {scale}')
  assert np.abs(found - draw(*ours, negative='', steps=4)).max() > 1e-3


@pytest.mark.parametrize(('how', 'says'), [
  ({'guidance': 2.0}, 'guidance is 2, but the denoiser imitates guidance'),
  ({'negative': 'a'}, "negative prompt 'a' has no effect"),
  ({'original_size': '8x8'}, 'original_size is 8x8, but the model is not conditioned on it'),
  ({'denoising_start': 0.5}, 'denoising_start is 0.5, but there are no latents'),
  ({'inputs': Inputs(latents=NOISE)}, 'denoising_start is 0, but there are latents'),
  ({'inputs': Inputs(IMAGES, latents=NOISE), 'denoising_start': 0.5}, 'both latents and images'),
  ({'inputs': Inputs(latents=NOISE[..., :3]), 'denoising_start': 0.5}, 'latents are float32'),
  ({'inputs': Inputs(latents=NOISE), 'denoising_start': 0.999}, 'no step of 4 begins in that part'),
])
def test_what_cannot_be_sampled_is_one_sentence(load, how, says):
  _, _, *ours = load('lcm')
  with pytest.raises(UserError, match=says) as error:
    draw(*ours, **{'negative': '', 'steps': 4} | how)
  assert str(error.value).count('\n') == 0


@pytest.mark.parametrize('name', ['refiner', *CONSISTENT])
def test_saved_and_read_again(load, name, tmp_path):
  """In our layout and back in that of diffusers, which opens it; to the bit."""
  theirs, folder, _, weights, sample = load(name)
  convert(str(folder), str(tmp_path / 'native'), 'native')
  convert(str(tmp_path / 'native'), str(tmp_path / 'again'), 'diffusers')
  _, other, how = load_model(str(tmp_path / 'again'))
  assert how == sample
  jax.tree.map(np.testing.assert_array_equal, other, weights)
  again = type(theirs).from_pretrained(tmp_path / 'again')
  found, wanted = state(again), state(theirs)
  assert found.keys() == wanted.keys()
  assert all(torch.equal(found[key], wanted[key]) for key in wanted)
  for part in ('unet', 'vae', 'scheduler'):
    assert said(getattr(again, part)) == said(getattr(theirs, part))
  assert again.config.get('requires_aesthetics_score', False) == (name == 'refiner')
