"""A model that was trained here samples alike in diffusers' own pipeline, once it is converted."""

import diffusers
import jax
import numpy as np
import pytest
import torch
import transformers

from diffusion_jax.diffusion.noise import NoiseConfig
from diffusion_jax.diffusion.parameterization import Parameterization
from diffusion_jax.formats.convert import convert
from diffusion_jax.formats.networks import save_params
from diffusion_jax.formats.pipeline import SCHEDULER
from diffusion_jax.formats.tensors import read_json
from diffusion_jax.models.unet import UNetConfig
from diffusion_jax.parallel.mesh import MeshConfig, make_mesh
from diffusion_jax.pipelines.directory import load_model, save_model
from diffusion_jax.pipelines.sampling import SampleConfig
from diffusion_jax.pipelines.spaces import LatentConfig
from tests import tiny_pipeline as tiny
from tests.tiny import assemble

PROMPTS, NEGATIVE, STEPS = ['cat ab', 'b a c d'], 'a', 8
NOISE = np.random.default_rng(0).normal(size=(2, 8, 8, 4)).astype(np.float32)
UNET = UNetConfig(**tiny.UNET, cross_attention_dim=8)
ZERO = NoiseConfig(rescale_betas_zero_snr=True)
FLOW = NoiseConfig(process='flow', label='sigma')
EDM = NoiseConfig(
  process='karras', process_options={'sigma_min': 0.02, 'sigma_max': 20.0}, label='log_snr'
)
V, EPSILON = Parameterization('v_prediction'), Parameterization('epsilon')


@pytest.fixture(scope='module')
def frozen(tmp_path_factory):
  """Folders of an autoencoder and of a text encoder with its tokenizer."""
  folder = tmp_path_factory.mktemp('frozen')
  for seed, name in enumerate(('vae', 'text_encoder')):
    save_params(folder / name, tiny.SD[name], tiny.random_params(tiny.SD[name], seed))
  transformers.CLIPTokenizer(
    vocab={token: i for i, token in enumerate(tiny.TOKENS)}, merges=[('c', 'a'), ('ca', 't</w>')],
    model_max_length=tiny.TEXT['max_position_embeddings'],
  ).save_pretrained(folder / 'text_encoder')
  return {'autoencoder': str(folder / 'vae'), 'clip': str(folder / 'text_encoder')}


def exported(folder, frozen, noise, parameterization, sample):
  """(our model as it is read back, its weights, how it samples)."""
  model, _ = assemble(UNET, **frozen, schedule=noise, parameterization=parameterization)
  params = tiny.random_params(UNET, 2)
  save_model(
    folder, model, params, space=LatentConfig(frozen['autoencoder']),
    conditioners={'text': {'path': frozen['clip']}}, sample=sample, dtype='float32',
  )
  return load_model(str(folder))


@pytest.mark.parametrize(('noise', 'parameterization', 'sample', 'kind'), [
  (NoiseConfig(), EPSILON, SampleConfig(), 'DPMSolverMultistepScheduler'),
  # Whatever the scheduler says, the pipeline of Stable Diffusion takes an offset of 1.
  (ZERO, V, SampleConfig('ddim', spacing='leading', steps_offset=1), 'DDIMScheduler'),
  (ZERO, V, SampleConfig('ddim', guidance=2.0), 'DDIMScheduler'),
  (ZERO, V, SampleConfig('euler'), 'DDIMScheduler'),  # The same steps.
  (FLOW, Parameterization('flow_prediction'), SampleConfig('euler', spacing='linspace'),
   'FlowMatchEulerDiscreteScheduler'),
  *((EDM, Parameterization('edm', 0.5), SampleConfig('euler', spacing=spacing), 'EDMEulerScheduler')
    for spacing in ('karras', 'exponential')),
])
def test_diffusers_samples_what_we_do(noise, parameterization, sample, kind, frozen, tmp_path):
  model, weights, read = exported(tmp_path / 'ours', frozen, noise, parameterization, sample)
  assert (model.noise.config, model.parameterization, read) == (noise, parameterization, sample)
  values = read_json(tmp_path / 'ours' / 'scheduler' / SCHEDULER)
  assert values['_class_name'] == kind
  assert 'scheduler_note' not in read_json(tmp_path / 'ours' / 'model_index.json')

  assert convert(str(tmp_path / 'ours'), str(tmp_path / 'theirs'), 'diffusers') == []
  theirs = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / 'theirs')
  assert type(theirs.scheduler).__name__ == kind
  if noise is FLOW:  # The pipeline asks for it, and flows start from unit noise.
    theirs.scheduler.init_noise_sigma = 1.0
  wanted = theirs(
    PROMPTS, negative_prompt=[NEGATIVE] * 2, guidance_scale=sample.guidance, output_type='np',
    num_inference_steps=STEPS, latents=torch.tensor(NOISE).permute(0, 3, 1, 2),
  ).images
  mesh = make_mesh(MeshConfig(), jax.devices()[:1])
  [images] = model.sample(
    model.on_mesh(weights, mesh), PROMPTS, SampleConfig(**vars(read) | {'steps': STEPS}), seed=0,
    mesh=mesh, negative=NEGATIVE, noise=NOISE, batch_size=2,
  )
  found = images / 2 + 0.5
  assert wanted.std() > 0.02 and ((wanted > 0) & (wanted < 1)).mean() > 0.3
  assert np.abs(found - wanted).max() < 2e-3


def test_what_diffusers_cannot_is_said(frozen, tmp_path):
  # Without signal at the first level, its solvers of second order take a step of another length.
  for sampler, why in (('restart', "the sampler 'restart'"), ('dpmpp_2m', 'cannot have schedule')):
    exported(tmp_path / sampler, frozen, ZERO, V, SampleConfig(sampler))
    assert why in read_json(tmp_path / sampler / 'model_index.json')['scheduler_note']
    values = read_json(tmp_path / sampler / 'scheduler' / SCHEDULER)
    assert values['_class_name'] == 'DDIMScheduler'
  exported(tmp_path / 'b', frozen, NoiseConfig(process='linear'), V, SampleConfig('ddim'))
  assert 'cannot sample' in read_json(tmp_path / 'b' / 'model_index.json')['scheduler_note']
  assert not (tmp_path / 'b' / 'scheduler' / SCHEDULER).exists()
  with pytest.raises(Exception, match='has no scheduler_config'):
    convert(str(tmp_path / 'b'), str(tmp_path / 'c'), 'diffusers')
