"""Every layout of LoRA that diffusers reads, read by diffusers and by us: the same merged weights.

One LoRA, with matrices of its own for each layer, is spelt in all ways. Nothing is compiled.
"""

import functools

import numpy as np
import pytest

from diffusion_jax.formats.adapter_names import layers
from diffusion_jax.formats.adapters import read_lora, to_params
from diffusion_jax.formats.networks import network_format
from diffusion_jax.formats.published import published_name
from diffusion_jax.formats.single_file_names import unet_names
from diffusion_jax.models.lora import merge_lora

torch = pytest.importorskip('torch')
diffusers = pytest.importorskip('diffusers')
peft = pytest.importorskip('peft')
transformers = pytest.importorskip('transformers')

from diffusers.loaders import StableDiffusionXLLoraLoaderMixin as Loader  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

ALPHA, RANK = 2.0, 3
TEXT = dict(
  hidden_size=12, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8, vocab_size=20,
  max_position_embeddings=6, eos_token_id=7, bos_token_id=6, projection_dim=10,
)
UNET = dict(
  sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
  cross_attention_dim=12, attention_head_dim=2,
  down_block_types=('DownBlock2D', 'CrossAttnDownBlock2D'),
  up_block_types=('CrossAttnUpBlock2D', 'UpBlock2D'),
)
MAKE = {
  'unet': ('unet', lambda: diffusers.UNet2DConditionModel(**UNET)),
  'text_encoder': (
    'clip_text', lambda: transformers.CLIPTextModel(transformers.CLIPTextConfig(**TEXT))
  ),
  'text_encoder_2': ('clip_text_projection', lambda: transformers.CLIPTextModelWithProjection(
    transformers.CLIPTextConfig(**TEXT)
  )),
}
ATTENTION = ('to_q', 'to_k', 'to_v', 'to_out.0', 'q_proj', 'k_proj', 'v_proj', 'out_proj')


@pytest.fixture(scope='module')
def networks(tmp_path_factory):
  """By role: (a function that makes theirs anew, our network, its parameters)."""
  from diffusion_jax.formats.networks import load_params

  found = {}
  for role, (kind, make) in MAKE.items():
    torch.manual_seed(len(role))
    path = tmp_path_factory.mktemp(role)
    make().save_pretrained(path)
    config, params = load_params(kind, path)
    again = lambda make=make, path=path: type(make()).from_pretrained(path)
    found[role] = again, network_format(kind).network(config), params
  return found


@pytest.fixture(scope='module')
def lora(networks):
  """{role: {layer: (A [r i ...], B [o r ...]) as published}} of every attention and others."""
  generator = torch.Generator().manual_seed(0)
  draw = lambda *shape: 0.3 * torch.randn(shape, generator=generator)
  others = ('fc1', 'ff.net.2', 'text_projection', 'proj_in', 'conv1', 'conv_shortcut',
            'time_emb_proj')
  out = {}
  for role, (_, network, _) in networks.items():
    out[role] = {}
    for layer, (*window, i, o) in layers(network.shapes).items():
      if layer.endswith((*ATTENTION, *others)):
        out[role][layer] = (
          draw(RANK, i, *window), draw(o, RANK, *(1 for _ in window))
        )
  return out


def theirs(networks, path, role):
  """Weights of diffusers' or transformers' network with the file merged into them, by our names."""
  model = networks[role][0]()
  state, alphas, metadata = Loader.lora_state_dict(
    str(path), unet_config=networks['unet'][0]().config, return_lora_metadata=True
  )
  if role == 'unet':
    Loader.load_lora_into_unet(state, alphas, model, adapter_name='x', metadata=metadata)
  else:
    Loader.load_lora_into_text_encoder(
      state, alphas, model, prefix=role, adapter_name='x', metadata=metadata
    )
  adapted = [m for m in model.modules() if isinstance(m, peft.tuners.tuners_utils.BaseTunerLayer)]
  assert adapted
  for module in adapted:
    module.merge()
  weights = {n.replace('.base_layer', ''): t.detach().numpy() for n, t in model.named_parameters()}
  return weights


def ours(networks, path, roles):
  """Merged weights by published names, by role."""
  found = read_lora(path, {role: networks[role][1].shapes for role in roles})
  assert found.keys() == set(roles)
  out = {}
  for role, weights in found.items():
    sizes, params = to_params(weights)
    merged = merge_lora({**networks[role][2], **params}, sizes)
    out[role] = {name: np.asarray(value) for name, value in merged.items()}
  return out


def assert_merged(networks, path, roles):
  from diffusion_jax.formats.published import to_published_layout

  for role, merged in ours(networks, path, roles).items():
    reference, changed = theirs(networks, path, role), 0
    for name, value in merged.items():
      key = published_name(name)
      key = key if key in reference else key.removeprefix('text_model.')
      value = to_published_layout(name, value)
      np.testing.assert_allclose(value, reference[key], atol=1e-5, err_msg=name)
      changed += not np.array_equal(merged[name], networks[role][2][name])
    assert changed > 5


def peft_names(lora):
  return {
    f'{role}.{layer}.lora_{part}.weight': value
    for role, of in lora.items() for layer, pair in of.items()
    for part, value in zip('AB', pair, strict=True)
  }


def training_scripts(lora):
  """As diffusers' scripts wrote them, with a name of their own for text encoders."""
  end = lambda role: 'lora' if role == 'unet' else 'lora_linear_layer'
  return {
    f'{role}.{layer}.{end(role)}.{part}.weight': value
    for role, of in lora.items() for layer, pair in of.items()
    for part, value in zip(('down', 'up'), pair, strict=True)
  }


def processors(lora):
  """As the attention processors were saved; what is no attention as the scripts wrote it."""
  renamed = {'q_proj': 'to_q', 'k_proj': 'to_k', 'v_proj': 'to_v', 'out_proj': 'to_out'}
  out = {}
  for name, value in training_scripts(lora).items():
    stem, _, end = name.replace('.lora_linear_layer.', '.lora.').partition('.lora.')
    module, _, leaf = stem.removesuffix('.0').rpartition('.')
    if not stem.endswith(ATTENTION):
      out[name] = value
    elif name.startswith('unet.'):
      out[f'{module}.processor.{leaf}_lora.{end}'] = value
    else:
      out[f'{module}.{renamed[leaf]}_lora.{end}'] = value
  return out


def kohya(lora, rename=lambda role, layer: layer):
  starts = {'unet': 'lora_unet_', 'text_encoder': 'lora_te1_', 'text_encoder_2': 'lora_te2_'}
  if 'text_encoder_2' not in lora:
    starts['text_encoder'] = 'lora_te_'
  out = {}
  for role, of in lora.items():
    for layer, (a, b) in of.items():
      stem = starts[role] + rename(role, layer).replace('.', '_')
      out |= {f'{stem}.lora_down.weight': a, f'{stem}.lora_up.weight': b,
              f'{stem}.alpha': torch.tensor(ALPHA)}
  return out


def magnitudes(lora):
  """DoRA of diffusers and PEFT in the U-Net, with the norms of each output."""
  out = peft_names(lora)
  for layer, (_, b) in lora['unet'].items():
    norms = 1 + b.flatten(1).abs().sum(1)
    norms = norms[None, :, None, None] if b.ndim == 4 else norms
    out[f'unet.{layer}.lora_magnitude_vector'] = norms
  return out


@functools.cache
def block_numbers():
  """Layers of the U-Net -> their names in a single file."""
  modules = diffusers.UNet2DConditionModel(**UNET).named_modules()
  names = [n for n, m in modules if isinstance(m, torch.nn.Linear | torch.nn.Conv2d)]
  return unet_names(names)


def numbered(lora):
  """kohya's files of Stable Diffusion XL, with the block numbers of a single file."""
  stored = block_numbers()
  return kohya(lora, lambda role, layer: stored[layer] if role == 'unet' else layer)


@pytest.mark.parametrize('spell', [
  peft_names, training_scripts, processors, kohya, numbered, magnitudes,
])
def test_each_layout_merges_as_in_diffusers(spell, lora, networks, tmp_path):
  tensors = spell(lora)
  save_file(tensors, tmp_path / 'x.safetensors')
  assert_merged(networks, tmp_path / 'x.safetensors', lora)


def test_one_text_encoder_of_kohya(lora, networks, tmp_path):
  part = {role: lora[role] for role in ('unet', 'text_encoder')}
  save_file(kohya(part), tmp_path / 'x.safetensors')
  assert_merged(networks, tmp_path / 'x.safetensors', part)


def test_what_diffusers_read_from_bin(lora, networks, tmp_path):
  torch.save(processors(lora), tmp_path / 'pytorch_lora_weights.bin')
  assert_merged(networks, tmp_path / 'pytorch_lora_weights.bin', lora)
  again = read_lora(tmp_path, {role: networks[role][1].shapes for role in lora})
  assert {role: len(of) for role, of in again.items()} == {r: len(of) for r, of in lora.items()}


def comfyui(lora):
  """Block numbers with dots for the U-Net, and each encoder by its name in ComfyUI."""
  stored = block_numbers()
  starts = {'text_encoder': 'text_encoders.clip_l.transformer.',
            'text_encoder_2': 'text_encoders.clip_g.transformer.'}
  out = {}
  for role, of in lora.items():
    for layer, (a, b) in of.items():
      stem = starts[role] + layer if role in starts else f'diffusion_model.{stored[layer]}'
      out |= {f'{stem}.lora_down.weight': a, f'{stem}.lora_up.weight': b}
  return out


def renamed(change):
  return lambda lora: {change(name): value for name, value in peft_names(lora).items()}


@pytest.mark.parametrize('spell', [
  comfyui,
  renamed(lambda n: n.replace('.weight', '.default.weight')),  # The state of a PEFT model.
  renamed(lambda n: n.replace('unet.', 'base_model.model.unet.')),
  renamed(lambda n: n.replace('unet.', 'unet.base_model.model.')),
  renamed(lambda n: n.replace('.weight', '')),
  renamed(lambda n: n.replace('text_model.', '')),  # As transformers 5 calls its layers.
  renamed(lambda n: n.replace('unet.', 'diffusion_model.')),
], ids=['comfyui', 'adapter', 'base', 'inner', 'bare', 'towerless', 'diffusion_model'])
def test_layouts_of_others_give_the_same_lora(spell, lora, networks, tmp_path):
  shapes = {role: networks[role][1].shapes for role in lora}
  found = []
  for make in (spell, peft_names):
    tensors = {n: t.contiguous().clone() for n, t in make(lora).items()}
    save_file(tensors, tmp_path / 'x.safetensors')
    found.append(read_lora(tmp_path / 'x.safetensors', shapes))
  assert found[0].keys() == found[1].keys()
  for role, of in found[1].items():
    assert found[0][role].keys() == of.keys() == lora[role].keys()
    for layer, one in of.items():
      for part, wanted in zip(found[0][role][layer], one, strict=True):
        np.testing.assert_array_equal(part, wanted)


def test_a_unet_alone_without_its_name(lora, networks, tmp_path):
  """As unet.save_attn_procs wrote it, and SimpleTuner's names for one network."""
  shapes = {'unet': networks['unet'][1].shapes}
  only = {'unet': lora['unet']}
  bare = {n.removeprefix('unet.'): t for n, t in processors(only).items()}
  lycoris = {n.replace('lora_unet_', 'lycoris_'): t for n, t in kohya(only).items()}
  for tensors in (bare, lycoris):
    save_file(tensors, tmp_path / 'x.safetensors')
    assert read_lora(tmp_path / 'x.safetensors', shapes)['unet'].keys() == lora['unet'].keys()


def test_the_third_matrix_of_lycoris_convolutions(networks, tmp_path):
  """Three convolutions one after the other are one, with the window of the middle one."""
  torch.manual_seed(0)
  name, layer = 'lora_unet_down_blocks_0_resnets_0_conv1', 'down_blocks.0.resnets.0.conv1'
  down, up = torch.randn(RANK, 8, 1, 1), torch.randn(8, RANK, 1, 1)
  mid = torch.randn(RANK, RANK, 3, 3)
  save_file({
    f'{name}.lora_down.weight': down, f'{name}.lora_mid.weight': mid, f'{name}.lora_up.weight': up,
    f'{name}.alpha': torch.tensor(ALPHA),
  }, tmp_path / 'x.safetensors')
  merged = ours(networks, tmp_path / 'x.safetensors', ['unet'])['unet'][f'{layer}.kernel']
  change = merged - networks['unet'][2][f'{layer}.kernel']
  x = torch.randn(2, 8, 5, 5)
  conv = torch.nn.functional.conv2d
  wanted = ALPHA / RANK * conv(conv(conv(x, down), mid, padding=1), up)
  found = conv(x, torch.tensor(np.asarray(change).transpose(3, 2, 0, 1).copy()), padding=1)
  torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
