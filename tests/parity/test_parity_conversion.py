"""What diffusers reads of a model whose prediction was changed: the network, as it is."""

import dataclasses

import diffusers
import jax
import numpy as np
import pytest
import torch

from diffusion_jax.diffusion.noise import NoiseConfig
from diffusion_jax.errors import UserError
from diffusion_jax.files import INDEX
from diffusion_jax.formats.convert import convert
from diffusion_jax.formats.pipeline import save_changed
from diffusion_jax.formats.tensors import read_json, write_json
from diffusion_jax.parallel.mesh import MeshConfig, make_mesh
from diffusion_jax.pipelines.directory import load_model, save_conversion
from diffusion_jax.pipelines.model import DENOISER
from diffusion_jax.pipelines.sampling import SampleConfig
from tests import tiny_pipeline as tiny

PROMPTS, NEGATIVE, STEPS = ['cat ab', 'b a c d'], 'a', 8
NOISE = np.random.default_rng(0).normal(size=(2, 8, 8, 4)).astype(np.float32)
V = 'v_prediction', NoiseConfig(rescale_betas_zero_snr=True)
FLOW = 'flow_prediction', NoiseConfig(process='flow', label='sigma')
TRAILING, LINSPACE = SampleConfig('ddim', guidance=2.0), SampleConfig('flow_euler', guidance=2.0,
                                                                      spacing='linspace')


@pytest.fixture(scope='module')
def source(tmp_path_factory):
  folder = tmp_path_factory.mktemp('source') / 'sd'
  tiny.write_tiny_pipeline(folder, tiny.SD)
  return folder


def saved(source, folder, terms, sample, exact):
  """(the model, its weights) that are written as a run of the task finetune writes them."""
  model, weights, _ = load_model(str(source))
  model = model.in_terms(*terms, exact)
  save_changed(
    folder, str(source), {DENOISER: (model.denoiser.config, weights[DENOISER])}, 'float32'
  )
  save_conversion(folder, model, sample)
  return model, weights


def draw(model, weights, sample):
  mesh = make_mesh(MeshConfig(), jax.devices()[:1])
  [images] = model.sample(
    model.on_mesh(weights, mesh), PROMPTS, dataclasses.replace(sample, steps=STEPS), seed=0,
    mesh=mesh, negative=NEGATIVE, noise=NOISE, batch_size=2,
  )
  return images / 2 + 0.5


@pytest.mark.parametrize(('terms', 'sample', 'exact', 'kind'), [
  (V, TRAILING, True, 'DDIMScheduler'), (V, TRAILING, False, 'DDIMScheduler'),
  (FLOW, LINSPACE, True, 'DDIMScheduler'),
  (FLOW, LINSPACE, False, 'FlowMatchEulerDiscreteScheduler'),
])
def test_diffusers_draws_what_we_do(terms, sample, exact, kind, source, tmp_path):
  """Of an exact conversion the network on its own noise, which is what it was; else the model."""
  model, weights = saved(source, tmp_path / 'made', terms, sample, exact)
  again, same, how = load_model(str(tmp_path / 'made'))
  assert (again.noise.config, again.parameterization, how) == (
    model.noise.config, model.parameterization, sample
  )
  jax.tree.map(np.testing.assert_array_equal, same, weights)
  np.testing.assert_array_equal(draw(again, same, how), draw(model, weights, sample))
  # So it is after it was written in our layout and back.
  convert(str(tmp_path / 'made'), str(tmp_path / 'native'), 'native')
  convert(str(tmp_path / 'native'), str(tmp_path / 'again'), 'diffusers')
  assert load_model(str(tmp_path / 'again'))[0].parameterization == model.parameterization

  theirs = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / 'made')
  assert type(theirs.scheduler).__name__ == kind
  said = getattr(theirs.scheduler.config, 'prediction_type', 'flow_prediction')
  assert said == again.network_terms[0] == ('epsilon' if exact else terms[0])
  if kind.startswith('Flow'):
    theirs.scheduler.init_noise_sigma = 1.0  # The pipeline asks for it; flows have unit noise.
  wanted = theirs(
    PROMPTS, negative_prompt=[NEGATIVE] * 2, guidance_scale=2.0, output_type='np',
    num_inference_steps=STEPS, latents=torch.tensor(NOISE).permute(0, 3, 1, 2),
  ).images
  if exact:
    again, _, how = load_model(str(source))
    how = dataclasses.replace(how, guidance=2.0)
  assert wanted.std() > 0.02
  np.testing.assert_allclose(draw(again, same, how), wanted, rtol=0, atol=2e-4)


def test_a_single_file_says_what_it_cannot_hold(source, tmp_path):
  """The network alone, which other programs read as it is; a flow they would take for epsilon."""
  for number, (terms, exact) in enumerate([(V, True), (FLOW, True), (V, False), (FLOW, False)]):
    folder, file = tmp_path / str(number), str(tmp_path / f'{number}.safetensors')
    saved(source, folder, terms, TRAILING if terms is V else LINSPACE, exact)
    if (terms, exact) == (FLOW, False):
      with pytest.raises(UserError, match='cannot say that its network is sampled by FlowMatch'):
        convert(str(folder), file, 'single-file')
      continue
    notes = [note for note in convert(str(folder), file, 'single-file') if 'conversion' in note]
    assert len(notes) == exact and all(f'and not {terms[0]!r}' in note for note in notes)


@pytest.mark.parametrize(('change', 'message'), [
  ({'prediction': 'noise'}, "predicts 'noise'"), ({'network': None}, 'network is None'),
  ({'noise': 7}, 'noise is 7'), ({'sample': {'steps': 'many'}}, "steps is 'many'"),
])
def test_what_describes_no_conversion_is_refused(change, message, source, tmp_path):
  saved(source, tmp_path / 'made', V, TRAILING, True)
  index = read_json(tmp_path / 'made' / INDEX)
  index['conversion'] |= change
  write_json(tmp_path / 'made' / INDEX, index)
  with pytest.raises(UserError, match=message):
    load_model(str(tmp_path / 'made'))
