"""Whole pipelines against diffusers: the same prompts, noise and pictures give the same images."""

import dataclasses
import functools
import json
import types

import diffusers
import jax
import numpy as np
import pytest
import torch
from PIL import Image

from diffusion_jax.formats.scheduler import read_scheduler
from diffusion_jax.formats.textual_inversion import FILES, TextualInversion, write_textual_inversion
from diffusion_jax.parallel.mesh import MeshConfig, make_mesh
from diffusion_jax.pipelines.adapters import add_lora, add_textual_inversion
from diffusion_jax.pipelines.directory import load_model, sample_config
from diffusion_jax.pipelines.inputs import Inputs
from diffusion_jax.pipelines.text_conditioners import EXTRA
from tests.parity import small_pipelines as small

PROMPTS, NEGATIVE = ['cab ab', 'b a c d e f g h a b c'], 'a'
RNG = np.random.default_rng(0)
NOISE = RNG.normal(size=(2, small.LATENT, small.LATENT, 4)).astype(np.float32)
IMAGES = RNG.integers(0, 256, (2, small.SIZE, small.SIZE, 3), np.uint8)
SMALL = RNG.integers(0, 256, (2, small.LATENT, small.LATENT, 3), np.uint8)
DEPTH = RNG.random((2, small.LATENT, small.LATENT)).astype(np.float32)
OBLONG = small.SIZE, 2 * small.SIZE - 4
"""Height and width of pictures that the models are shown, unlike those of their training."""
STEPS, GUIDANCE = 10, 7.5
OBLONG_LATENT = tuple(edge * small.LATENT // small.SIZE for edge in OBLONG)
OBLONG_NOISE = RNG.normal(size=(2, *OBLONG_LATENT, 4)).astype(np.float32)
OBLONG_IMAGES, OBLONG_CONTROL = RNG.integers(0, 256, (2, 2, *OBLONG, 3), np.uint8)
OBLONG_SMALL = RNG.integers(0, 256, (2, *OBLONG_LATENT, 3), np.uint8)
MASKS = RNG.random((2, *OBLONG)) > 0.5
WIDE = dict(height=OBLONG[0], width=OBLONG[1])
TABLE = dict(beta_start=0.00085, beta_end=0.012, beta_schedule='scaled_linear')


@pytest.fixture(scope='module')
def load(tmp_path_factory):
  """load(name): (theirs, our model, its weights, how it samples) of a pipeline they saved."""

  @functools.cache
  def run(name):
    folder = tmp_path_factory.mktemp('pipelines') / name
    theirs = small.make(name)
    theirs.save_pretrained(folder)
    return theirs, *load_model(str(folder)), folder

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
         size=(None, None), **changes):
  """Ours, in [0, 1] as theirs."""
  mesh = make_mesh(MeshConfig(), jax.devices()[:1])
  sample = dataclasses.replace(sample, **{'steps': STEPS} | changes)
  [images] = model.sample(
    model.on_mesh(weights, mesh), prompts, sample, seed=0, mesh=mesh, negative=negative,
    noise=noise, batch_size=2, inputs=inputs, height=size[0], width=size[1],
  )
  return images / 2 + 0.5


def assert_same(found, wanted, name=''):
  """Within 1e-4, where the images say something: varied, and hardly clipped."""
  error = np.abs(found - wanted).max()
  inside = ((wanted > 0) & (wanted < 1)).mean()
  print(f'{name}: {error:.2e} std {wanted.std():.3f} inside {inside:.2f}')
  assert found.shape == wanted.shape
  assert wanted.std() > 0.02 and inside > 0.5
  assert error < 1e-4


@pytest.mark.parametrize('name', ['sd1', 'sd2_v'])
def test_text_to_image(load, name):
  theirs, *ours, _ = load(name)
  wanted = draw_theirs(theirs)
  assert_same(draw(*ours), wanted, name)
  changes = {'steps_offset': 0}, {'set_alpha_to_one': True}, {'guidance': 7.0}, {
    'prompts': PROMPTS[::-1]}, {'negative': ''}
  for change in changes:
    assert np.abs(draw(*ours, **change) - wanted).max() > 5e-4, change


@pytest.mark.parametrize('name', ['sd1', 'sdxl'])
def test_any_size(load, name):
  """Higher than wide and wider than high, at sizes that the U-Net was not made for."""
  theirs, *ours, _ = load(name)
  factor = small.SIZE // small.LATENT
  for height, width in ((64, 96), (96, 64)):
    noise, = torch_noise((2, 4, height // factor, width // factor), seed=1)
    wanted = draw_theirs(theirs, noise=noise, height=height, width=width)
    found = draw(*ours, noise=noise, size=(height, width))
    assert_same(found, wanted, f'{name} {height} x {width}')


def test_inpainting(load):
  """Of pictures wider than high, which lose nothing."""
  theirs, *ours, _ = load('inpaint')
  masks = pictures(255 * MASKS.astype(np.uint8))
  wanted = draw_theirs(theirs, noise=OBLONG_NOISE, image=pictures(OBLONG_IMAGES),
                       mask_image=masks, strength=1.0, **WIDE)
  inputs = Inputs(OBLONG_IMAGES, masks=MASKS)
  wide = functools.partial(draw, *ours, noise=OBLONG_NOISE, size=OBLONG)
  assert_same(wide(inputs=inputs), wanted, 'inpaint')
  other = wide(inputs=dataclasses.replace(inputs, masks=~MASKS))
  assert np.abs(other - wanted).max() > 1e-2
  kept = wide(inputs=dataclasses.replace(inputs, feather=0))
  np.testing.assert_allclose(kept[~MASKS], OBLONG_IMAGES[~MASKS] / 255, atol=1e-6)
  np.testing.assert_allclose(kept[MASKS], wanted[MASKS], atol=1e-4)


def test_inpainting_by_a_model_that_is_not_shown_the_mask(load):
  """In latents, where they blend both after each step; the last step leaves theirs clean."""
  theirs, model, weights, sample, _ = load('sd1')
  theirs = diffusers.StableDiffusionInpaintPipeline(
    **theirs.components, requires_safety_checker=False
  )
  theirs.set_progress_bar_config(disable=True)
  places = np.random.default_rng(1).random((2, small.LATENT, small.LATENT)) > 0.5
  masks = np.kron(places, np.ones((2, 2))).astype(bool)
  _, noise = torch_noise(*[(2, 4, small.LATENT, small.LATENT)] * 2)  # The encoder takes the first.
  wanted = draw_theirs(
    theirs, noise=None, image=pictures(IMAGES), mask_image=pictures(255 * masks.astype(np.uint8)),
    strength=0.6, generator=torch.Generator().manual_seed(0), output_type='latent',
    height=small.SIZE, width=small.SIZE,
  ).numpy().transpose(0, 2, 3, 1)
  mesh = make_mesh(MeshConfig(), jax.devices()[:1])
  draw = lambda **more: next(model.sample(
    model.on_mesh(weights, mesh), PROMPTS, dataclasses.replace(sample, steps=STEPS), seed=0,
    mesh=mesh, negative=NEGATIVE, noise=noise, batch_size=2, latents=True,
    inputs=Inputs(IMAGES, 0.6, **more),
  ))
  np.testing.assert_allclose(draw(masks=masks)[places], wanted[places], atol=1e-4)
  assert np.abs(draw() - wanted)[places].max() > 1e-2


def test_editing_with_two_scales(load):
  theirs, *ours, _ = load('edit')
  assert ours[2].image_guidance == 1.5
  wanted = draw_theirs(theirs, image=pictures(IMAGES), image_guidance_scale=1.5)
  assert_same(draw(*ours, inputs=Inputs(IMAGES)), wanted, 'edit')
  other = draw(*ours, inputs=Inputs(IMAGES), image_guidance=1.2)
  assert np.abs(other - wanted).max() > 1e-2


def test_upscaling(load):
  theirs, *ours, _ = load('upscale')
  [noise] = torch_noise((2, 3, *OBLONG_LATENT))
  wanted = draw_theirs(theirs, noise=OBLONG_NOISE, image=pictures(OBLONG_SMALL), noise_level=20,
                       generator=torch.Generator().manual_seed(0))
  found, other = (
    draw(*ours, noise=OBLONG_NOISE, size=OBLONG,
         inputs=Inputs(small=OBLONG_SMALL, noise_level=level, small_noise=noise))
    for level in (20, 10)
  )
  assert_same(found, wanted, 'upscale')
  assert np.abs(other - wanted).max() > 1e-2


def test_depth(load):
  theirs, *ours, _ = load('depth')
  noise = torch_noise(*[(2, 4, small.LATENT, small.LATENT)] * 2)[1]
  wanted = draw_theirs(theirs, noise=None, image=pictures(IMAGES), strength=0.6,
                       depth_map=torch.tensor(DEPTH), generator=torch.Generator().manual_seed(0))
  inputs = Inputs(IMAGES, 0.6, depth=normalized(DEPTH))
  assert_same(draw(*ours, noise=noise, inputs=inputs), wanted, 'depth')
  other = draw(*ours, noise=noise, inputs=dataclasses.replace(inputs, depth=-inputs.depth))
  assert np.abs(other - wanted).max() > 1e-2


def normalized(depth):
  """Every map from -1 to 1, as diffusers hands it to the network."""
  low, high = depth.min((1, 2), keepdims=True), depth.max((1, 2), keepdims=True)
  return 2 * (depth - low) / (high - low) - 1


def test_controlnet(load):
  theirs, *ours, _ = load('controlled')
  wanted = draw_theirs(theirs, noise=OBLONG_NOISE, image=pictures(OBLONG_CONTROL),
                       controlnet_conditioning_scale=0.7, **WIDE)
  inputs = Inputs(control=OBLONG_CONTROL, control_strength=0.7)
  wide = functools.partial(draw, *ours, noise=OBLONG_NOISE, size=OBLONG)
  assert_same(wide(inputs=inputs), wanted, 'controlnet')
  other = wide(inputs=dataclasses.replace(inputs, control=OBLONG_IMAGES))
  assert np.abs(other - wanted).max() > 1e-2


@pytest.mark.parametrize(('kind', 'config'), [
  ('PNDMScheduler', {'skip_prk_steps': True, 'steps_offset': 1}),
  ('EulerDiscreteScheduler', {'timestep_spacing': 'leading', 'steps_offset': 1}),
])
def test_the_schedulers_of_published_pipelines(load, kind, config):
  """Of Stable Diffusion 1 and XL, by the file that they write."""
  theirs, model, weights, _, _ = load('sd1')
  ddim = draw_theirs(theirs)
  scheduler = getattr(diffusers, kind)(**TABLE, **config)
  values = json.loads(scheduler.to_json_string())
  sample = sample_config(read_scheduler(values, 'scheduler_config.json'))
  pipeline = diffusers.StableDiffusionPipeline(
    **theirs.components | {'scheduler': scheduler}, requires_safety_checker=False
  )
  pipeline.set_progress_bar_config(disable=True)
  wanted = draw_theirs(pipeline)
  assert_same(draw(model, weights, sample), wanted, kind)
  assert np.abs(wanted - ddim).max() > 5e-4


def test_lora(load, tmp_path):
  peft = pytest.importorskip('peft')
  _, model, weights, sample, _ = load('sd1')
  source, theirs = small.make('sd1'), small.make('sd1')
  states = {}
  for role, targets in (('unet', ['to_q', 'conv1']), ('text_encoder', ['q_proj', 'fc2'])):
    network = getattr(source, role)
    config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=targets, init_lora_weights=False)
    # Not by transformers' add_adapter, some of whose releases want a PEFT that is not yet out.
    peft.inject_adapter_in_model(config, network)
    network.peft_config, network._hf_peft_config_loaded = {'default': config}, True
    states[role] = peft.get_peft_model_state_dict(network)
  configs = {f'{role}_lora_adapter_metadata': getattr(source, role).peft_config['default'].to_dict()
             for role in states}
  source.save_lora_weights(
    tmp_path, unet_lora_layers=states['unet'], text_encoder_lora_layers=states['text_encoder'],
    **configs,
  )
  plain = draw_theirs(theirs)
  theirs.load_lora_weights(tmp_path)
  wanted = draw_theirs(theirs)
  assert np.abs(wanted - plain).max() > 1e-2
  found = draw(model, add_lora(model, weights, str(tmp_path)), sample)
  assert_same(found, wanted, 'lora')


def test_image_to_image_with_clip_skip(load):
  theirs, *ours, _ = load('sd1')
  # The towers of transformers 5 lack the attribute by which diffusers finds the final norm.
  norm = theirs.text_encoder.final_layer_norm
  theirs.text_encoder.__dict__['text_model'] = types.SimpleNamespace(final_layer_norm=norm)
  pipeline = diffusers.StableDiffusionImg2ImgPipeline(
    **theirs.components, requires_safety_checker=False
  )
  pipeline.set_progress_bar_config(disable=True)
  noise = torch_noise(*[(2, 4, *OBLONG_LATENT)] * 2)[1]  # The first is the encoder's.
  plain, wanted = (draw_theirs(
    pipeline, noise=None, image=pictures(OBLONG_IMAGES), strength=0.6, clip_skip=skip,
    generator=torch.Generator().manual_seed(0),
  ) for skip in (0, 1))
  assert np.abs(wanted - plain).max() > 1e-2
  found = draw(*ours, noise=noise, inputs=Inputs(OBLONG_IMAGES, 0.6), clip_skip=1, size=OBLONG)
  assert_same(found, wanted, 'image to image')


@pytest.fixture(scope='module')
def with_word(load, tmp_path_factory):
  """Stable Diffusion XL, theirs and ours, with a word learned for both encoders."""
  folder = tmp_path_factory.mktemp('words')
  theirs, model, weights, sample, source = load('sdxl')
  rows = np.random.default_rng(1).normal(size=(2, 2, small.WIDTH)).astype(np.float32)
  embeddings = dict(zip(FILES, rows, strict=True))
  for role, value in embeddings.items():
    path = folder / 'word' / FILES[role]
    write_textual_inversion(path, TextualInversion('<h>', {role: value}))
    suffix = role.removeprefix('text_encoder')
    theirs.load_textual_inversion(
      str(path), text_encoder=getattr(theirs, role),
      tokenizer=getattr(theirs, f'tokenizer{suffix}'),
    )
  a1111 = folder / '<h>.safetensors'
  write_textual_inversion(a1111, TextualInversion('<h>', embeddings), 'a1111')
  other = load_model(str(source))
  again = add_textual_inversion(*other[:2], str(a1111))
  told = add_textual_inversion(model, weights, str(folder / 'word'))
  for role in embeddings:
    np.testing.assert_array_equal(told[role][EXTRA], again[role][EXTRA])
  return theirs, model, told, sample, other[0]


def test_two_encoders(with_word):
  theirs, *ours, _ = with_word
  assert_same(draw(*ours), draw_theirs(theirs), 'sdxl')
  nothing = draw_theirs(theirs, negative=None)
  assert_same(draw(*ours, negative=''), nothing, 'sdxl, no negative prompt')
  assert np.abs(nothing - draw_theirs(theirs, negative='')).max() > 1e-2


def test_a_word_learned_for_two_encoders(with_word):
  """From a directory with a file for each, as is trained here, and from one of AUTOMATIC1111."""
  theirs, *ours, other = with_word
  prompts = ['cab <h> a', '<h>']
  np.testing.assert_array_equal(ours[0].text.tokens(prompts), other.text.tokens(prompts))
  wanted = draw_theirs(theirs, prompts=prompts)
  assert_same(draw(*ours, prompts=prompts), wanted, 'words')
  assert np.abs(wanted - draw_theirs(theirs, prompts=['cab h a', 'h'])).max() > 1e-2


def test_variations_of_a_picture(load):
  """CLIP's view of it in place of a text."""
  theirs, *ours, _ = load('variation')
  wanted = draw_theirs(theirs, negative=None, prompts=None, image=pictures(SMALL))
  inputs = Inputs(reference=SMALL)
  assert_same(draw(*ours, inputs=inputs), wanted, 'variation')
  other = draw(*ours, inputs=Inputs(reference=SMALL[::-1]))
  assert np.abs(other - wanted).max() > 1e-2
