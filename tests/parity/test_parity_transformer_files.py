"""Single files of Stable Diffusion 3 and Flux.1: diffusers' own converters, and there and back."""

import json
import shutil

import diffusers
import numpy as np
import pytest
import torch
from diffusers.loaders import single_file_utils
from safetensors.torch import load_file, save_file

from diffusion_jax.errors import UserError
from diffusion_jax.formats.convert import convert
from diffusion_jax.formats.dit import FLUX
from diffusion_jax.formats.published import published_name, published_shape
from diffusion_jax.formats.single_file_names import from_stored, to_stored
from diffusion_jax.formats.tensors import open_tensors
from diffusion_jax.formats.transformer_names import transformer_rules
from diffusion_jax.models.flux import FluxConfig
from tests.parity import small_pipelines as small
from tests.parity import tiny_pipelines as tiny
from tests.parity.test_parity_single_file import assert_same_tensors

SCHEDULERS = {
  'sd35': {'shift': 3.0}, 'flux_schnell': {'shift': 1.0},
  'flux_dev': {'shift': 3.0, 'use_dynamic_shifting': True},
}
VAES = {'sd35': (1.5305, 0.0609), 'flux_dev': (0.3611, 0.1159), 'flux_schnell': (0.3611, 0.1159)}


def autoencoder(name):
  scale, shift = VAES[name]
  return diffusers.AutoencoderKL(
    block_out_channels=(32, 64), layers_per_block=1, latent_channels=16, scaling_factor=scale,
    shift_factor=shift, use_quant_conv=False, use_post_quant_conv=False,
    down_block_types=['DownEncoderBlock2D'] * 2, up_block_types=['UpDecoderBlock2D'] * 2,
  )


def sd35(clip, t5, words):
  transformer = diffusers.SD3Transformer2DModel(
    patch_size=2, num_layers=3, attention_head_dim=64, num_attention_heads=1,
    joint_attention_dim=small.T5_WIDTH, caption_projection_dim=64, pooled_projection_dim=128,
    pos_embed_max_size=6, qk_norm='rms_norm', dual_attention_layers=(0, 1),
  )
  second = tiny.text_encoder(128, 2, 'gelu', projection=64)
  first = tiny.text_encoder(64, 2, 'quick_gelu', projection=64)
  return diffusers.StableDiffusion3Pipeline(
    transformer, diffusers.FlowMatchEulerDiscreteScheduler(**SCHEDULERS['sd35']),
    autoencoder('sd35'), first, clip, second, clip, t5, words,
  )


def flux(name):
  def make(clip, t5, words):
    transformer = diffusers.FluxTransformer2DModel(
      num_layers=2, num_single_layers=2, attention_head_dim=32, num_attention_heads=1,
      joint_attention_dim=small.T5_WIDTH, pooled_projection_dim=64, axes_dims_rope=(4, 14, 14),
      guidance_embeds=name == 'flux_dev',
    )
    return diffusers.FluxPipeline(
      diffusers.FlowMatchEulerDiscreteScheduler(**SCHEDULERS[name]), autoencoder(name),
      tiny.text_encoder(64, 2, 'quick_gelu'), clip, t5, words, transformer,
    )
  return make


MAKE = {'sd35': sd35, 'flux_dev': flux('flux_dev'), 'flux_schnell': flux('flux_schnell')}


@pytest.fixture(scope='module')
def made(tmp_path_factory):
  """made(name): (pipeline, its directory, the single file that convert made of it)."""
  done = {}

  def make(name):
    if name not in done:
      folder = tmp_path_factory.mktemp(name)
      torch.manual_seed(0)
      t5 = small.t5()
      t5.config.relative_attention_max_distance = 128
      pipe = MAKE[name](tiny.tokenizer(folder / 'clip'), t5, small.t5_tokenizer())
      for module in tiny.networks(pipe).values():
        tiny.randomize(module)
      if name == 'sd35':
        pipe.text_encoder.text_projection.weight.data = torch.eye(64)
      pipe.save_pretrained(folder / 'diffusers')
      assert convert(folder / 'diffusers', folder / 'x.safetensors', 'single-file') == []
      done[name] = pipe, folder / 'diffusers', folder / 'x.safetensors'
    return done[name]

  return make


def test_diffusers_reads_our_single_files(made):
  """Whole; of Flux the width that its converter wants stands in the way."""
  pipe, folder, file = made('sd35')
  other = type(pipe).from_single_file(str(file), config=str(folder), local_files_only=True)
  for name, module in tiny.networks(pipe).items():
    wanted, found = module.state_dict(), getattr(other, name).state_dict()
    assert wanted.keys() == found.keys()
    for key, value in wanted.items():  # It leaves T5's second name of the tokens without values.
      assert key == 'encoder.embed_tokens.weight' or torch.equal(value, found[key]), (name, key)


def test_stable_diffusion_3_as_diffusers_converts_it(made):
  pipe, _, file = made('sd35')
  state = {n: t for n, t in load_file(file).items() if n.startswith('model.diffusion_model.')}
  found = single_file_utils.convert_sd3_transformer_checkpoint_to_diffusers(state)
  wanted = pipe.transformer.state_dict()
  assert found.keys() == wanted.keys()
  assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_flux_as_diffusers_converts_it(tmp_path):
  """At full height, which its converter knows, and a width of 2."""
  config = FluxConfig(guidance_embeds=True, num_layers=2, num_single_layers=2)
  names = {published_name(n): published_shape(n, t.shape) for n, t in FLUX.shapes(config).items()}
  torch.manual_seed(0)
  save_file({n: torch.randn(s[0], *(2 for _ in s[1:])) for n, s in names.items()},
            tmp_path / 'x.safetensors')
  tensors, rules = open_tensors(tmp_path / 'x.safetensors'), transformer_rules(names, 'flux')
  stored = to_stored(rules, tensors, 'x')
  state = {f'model.diffusion_model.{n}': torch.tensor(t.make()) for n, t in stored.items()}
  assert 'model.diffusion_model.single_blocks.1.norm.query_norm.scale' in state
  found = single_file_utils.convert_flux_transformer_checkpoint_to_diffusers(state)
  assert not state and found.keys() == names.keys()
  again = from_stored(rules, stored, 'x')
  for name, tensor in tensors.items():
    np.testing.assert_array_equal(found[name].numpy(), tensor.make())
    np.testing.assert_array_equal(again[name].make(), tensor.make())


def said(folder, part):
  values = json.loads((folder / part / 'config.json').read_text())
  usual = ('_', 'sample_size', 'dtype', 'architectures', 'transformers_version')
  return {key: value for key, value in values.items() if not key.startswith(usual)}


@pytest.mark.parametrize('name', MAKE)
def test_back_from_a_single_file(made, tmp_path, name):
  pipe, folder, file = made(name)
  assert convert(file, tmp_path / 'back', 'diffusers', tokenizers=folder) == []
  assert_same_tensors(folder, tmp_path / 'back')
  other = diffusers.DiffusionPipeline.from_pretrained(tmp_path / 'back')
  assert type(other) is type(pipe)
  for part in ('transformer', 'vae'):
    has, found = said(folder, part), said(tmp_path / 'back', part)
    assert {key: has[key] for key in found} == found
  for key, value in pipe.scheduler.config.items():
    assert key.startswith('_') or other.scheduler.config[key] == value, key
  last = 'tokenizer_3' if name == 'sd35' else 'tokenizer_2'
  ids = lambda one: getattr(one, last)('cab').input_ids
  assert ids(other) == ids(pipe)
  convert(tmp_path / 'back', tmp_path / 'again.safetensors', 'single-file')
  assert (tmp_path / 'again.safetensors').read_bytes() == file.read_bytes()


def without(file, path, *starts, rename=lambda name: name):
  values = {rename(n): t for n, t in load_file(file).items() if not n.startswith(starts)}
  save_file(values, path)
  return path


@pytest.mark.parametrize(('name', 'network'), [('sd35', 'mmdit'), ('flux_schnell', 'flux')])
def test_a_transformer_alone(made, tmp_path, name, network):
  """As Black Forest Labs publish it, the other parts apart; and by itself, both ways."""
  _, folder, file = made(name)
  bare = without(
    file, tmp_path / 'bare.safetensors', 'vae.', 'first_stage_model.', 'text_encoders.',
    rename=lambda n: n.removeprefix('model.diffusion_model.'),
  )
  convert(bare, tmp_path / 'back', 'diffusers', tokenizers=folder)
  assert_same_tensors(folder, tmp_path / 'back')
  diffusers.DiffusionPipeline.from_pretrained(tmp_path / 'back')
  for source in (bare, file):
    convert(source, tmp_path / source.stem, 'diffusers', kind=network)
    assert_same = load_file(tmp_path / source.stem / 'diffusion_pytorch_model.safetensors')
    wanted = load_file(folder / 'transformer' / 'diffusion_pytorch_model.safetensors')
    assert assert_same.keys() == wanted.keys()
    assert all(torch.equal(wanted[n], assert_same[n]) for n in wanted)
  convert(folder / 'transformer', tmp_path / 'again.safetensors', 'single-file')
  wanted, found = load_file(bare), load_file(tmp_path / 'again.safetensors')
  assert wanted.keys() == found.keys() and all(torch.equal(wanted[n], found[n]) for n in wanted)
  with pytest.raises(UserError, match=r'holds no text_encoder and no .* give --tokenizer DIR') as e:
    convert(bare, tmp_path / 'x', 'diffusers')
  assert 'vae/' in str(e.value) and '\n' not in str(e.value)


def test_what_files_of_comfyui_hold_besides(made, tmp_path):
  """Another prefix of the autoencoder, a projection and scales that are not used."""
  _, folder, file = made('sd35')
  values = load_file(file)
  values = {n.replace('first_stage_model.', 'vae.'): t for n, t in values.items()}
  clip = 'text_encoders.clip_l'
  values |= {
    f'{clip}.transformer.text_projection.weight': torch.ones(64, 64),
    f'{clip}.logit_scale': torch.ones(1), 'text_encoders.t5xxl.logit_scale': torch.ones(1),
    'text_encoders.t5xxl.transformer.encoder.embed_tokens.weight': torch.ones(2, 2),
  }
  save_file(values, tmp_path / 'more.safetensors')
  [note] = convert(tmp_path / 'more.safetensors', tmp_path / 'back', 'diffusers', tokenizers=folder)
  assert '3 tensors' in note and f'{clip}.logit_scale' in note
  assert_same_tensors(folder, tmp_path / 'back')


def test_stable_diffusion_3_without_t5(made, tmp_path):
  _, folder, file = made('sd35')
  less = without(file, tmp_path / 'less.safetensors', 'text_encoders.t5xxl.')
  clips = shutil.copytree(folder, tmp_path / 'clips')
  shutil.rmtree(clips / 'text_encoder_3')
  [note] = convert(less, tmp_path / 'back', 'diffusers', tokenizers=clips)
  assert note.startswith('text_encoder_3 is left out')
  index = json.loads((tmp_path / 'back' / 'model_index.json').read_text())
  assert index['text_encoder_3'] == index['tokenizer_3'] == [None, None]
  assert convert(less, tmp_path / 'whole', 'diffusers', tokenizers=folder) == []
  assert_same_tensors(folder, tmp_path / 'whole')
  convert(tmp_path / 'back', tmp_path / 'again.safetensors', 'single-file')
  wanted, found = load_file(less), load_file(tmp_path / 'again.safetensors')
  assert wanted.keys() == found.keys() and all(torch.equal(wanted[n], found[n]) for n in wanted)


@pytest.mark.parametrize(('name', 'change', 'words'), [
  ('sd35', {'joint_blocks.1.x_block.attn.ln_q.weight': None}, r'lacks joint_blocks\.1.*ln_q'),
  ('sd35', {'joint_blocks.1.x_block.attn3.weight': 4}, r'holds joint_blocks\.1\.x_block\.attn3'),
  ('sd35', {'pos_embed': (1, 35, 64)}, '35 rows, which make no square'),
  ('sd35', {'x_embedder.proj.weight': (65, 16, 2, 2)}, 'width 65 .* a head, 64'),
  ('sd35', {'x_embedder.proj.weight': (64, 9, 2, 2)}, '9 input channels is not known; 16 are'),
  ('sd35', {'context_embedder.weight': ()}, 'too few axes'),
  ('sd35', {'joint_blocks.0.x_block.attn.qkv.weight': ()}, r'attn\.to_k\.weight has shape'),
  ('flux_dev', {'guidance_in.out_layer.bias': None}, r'lacks guidance_in\.out_layer\.bias'),
  ('flux_dev', {'guidance_in.in_layer.weight': None}, r'holds guidance_in\.in_layer\.bias'),
  ('flux_dev', {'img_in.weight': (32, 384)}, '384 input channels is not known; 64 are'),
  ('flux_dev', {'single_blocks.0.linear1.weight': (220, 32)}, 'proj_mlp.weight has shape|to_'),
  ('flux_dev', {'double_blocks.0.img_mod.lin.lora_down.weight': 4}, 'holds double_blocks|a LoRA'),
  ('flux_dev', {'distilled_guidance_layer.norms.0.scale': 4}, 'holds distilled_guidance_layer'),
])
def test_what_does_not_fit_is_named(made, tmp_path, name, change, words):
  _, folder, file = made(name)
  values = load_file(file)
  for key, shape in change.items():
    values.pop(f'model.diffusion_model.{key}', None)
    if shape is not None:
      values[f'model.diffusion_model.{key}'] = torch.ones(shape)
  save_file(values, tmp_path / 'broken.safetensors')
  with pytest.raises(UserError, match=words) as error:
    convert(tmp_path / 'broken.safetensors', tmp_path / 'back', 'diffusers', tokenizers=folder)
  assert '\n' not in str(error.value) and {p.name for p in tmp_path.iterdir()} == {
    'broken.safetensors'
  }


def test_what_a_single_file_cannot_tell(made, tmp_path):
  _, folder, file = made('sd35')
  other = shutil.copytree(folder, tmp_path / 'other')
  path = other / 'scheduler' / 'scheduler_config.json'
  path.write_text(json.dumps(json.loads(path.read_text()) | {'shift': 1.0}))
  [note] = convert(other, tmp_path / 'x.safetensors', 'single-file')
  assert note.startswith('scheduler has shift 1.0') and 'take it to be 3.0' in note
  weights = other / 'text_encoder' / 'model.safetensors'
  values = load_file(weights)
  values['text_projection.weight'] = 2 * values['text_projection.weight']
  save_file(values, weights)
  with pytest.raises(UserError, match=r'text_projection.weight is not the identity'):
    convert(other, tmp_path / 'y.safetensors', 'single-file')
  with pytest.raises(UserError, match=r"--prediction is 'epsilon', but .* predicts the flow"):
    convert(file, tmp_path / 'y', 'diffusers', tokenizers=folder, prediction='epsilon')
