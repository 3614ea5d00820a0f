"""LoRA of Flux.1 and Stable Diffusion 3 in the names of others, against diffusers' converters."""

import dataclasses

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline
from diffusers.loaders import single_file_utils
from safetensors.torch import load_file, save_file

from diffusion_jax.errors import UserError
from diffusion_jax.formats.adapter_names import layers
from diffusion_jax.formats.adapters import LoRAWeights, read_lora, write_lora
from diffusion_jax.formats.dit import FLUX, MMDIT, TRANSFORMERS

# Of the published width, which diffusers' converters know; nothing of that size is computed.
WIDE = FLUX.shapes(dataclasses.replace(
  TRANSFORMERS['flux_dev'], num_layers=1, num_single_layers=1
))
TINY = MMDIT.shapes(dataclasses.replace(
  TRANSFORMERS['sd35_medium'], num_layers=2, num_attention_heads=1, attention_head_dim=8,
  caption_projection_dim=8, dual_attention_layers=(0,), joint_attention_dim=12,
  pooled_projection_dim=6, pos_embed_max_size=4,
))
RANK, ALPHA = 2, 3.0
FUSED = {
  'double_blocks.0.img_attn.qkv': (3072, 9216), 'double_blocks.0.txt_attn.qkv': (3072, 9216),
  'double_blocks.0.img_attn.proj': (3072, 3072), 'double_blocks.0.txt_mlp.0': (3072, 12288),
  'double_blocks.0.img_mod.lin': (3072, 18432), 'single_blocks.0.linear1': (3072, 21504),
  'single_blocks.0.linear2': (15360, 3072), 'single_blocks.0.modulation.lin': (3072, 9216),
}


def random_pair(i, o, rank=RANK):
  return torch.randn(rank, i), torch.randn(o, rank)


def spelt(tensors, path, start, ends=('.lora_down.weight', '.lora_up.weight'), alpha=True,
          joint='.'):
  """A file with these layers; start, and what joins their names."""
  values = {}
  for layer, (a, b) in tensors.items():
    stem = start + layer.replace('.', joint)
    values |= {stem + ends[0]: a, stem + ends[1]: b}
    values |= {f'{stem}.alpha': torch.tensor(ALPHA)} if alpha else {}
  save_file(values, path)
  return path


def change_of(weights, columns=7):
  """{layer: some columns of (alpha / r) A B, as published}."""
  return {
    name: (one.alpha / one.a.shape[-1] * one.a[:columns] @ one.b).T
    for name, one in weights.items()
  }


def change_in(state, columns=7):
  """The same of diffusers' state, in which alpha is a part of the matrices."""
  stems = [n.removesuffix('.lora_A.weight') for n in state if n.endswith('.lora_A.weight')]
  return {
    stem.removeprefix('transformer.'): (
      state[f'{stem}.lora_B.weight'] @ state[f'{stem}.lora_A.weight'][:, :columns]
    ).numpy() for stem in stems
  }


def assert_same(found, wanted):
  assert found.keys() == wanted.keys()
  for name, value in wanted.items():
    np.testing.assert_allclose(found[name], value, rtol=1e-5, atol=1e-5, err_msg=name)


KOHYA = dict(start='lora_unet_', joint='_')


@pytest.mark.parametrize('layout', [
  KOHYA, dict(start='diffusion_model.'),
  dict(start='diffusion_model.', ends=('.lora_A.weight', '.lora_B.weight'), alpha=False),
  dict(start='base_model.model.', ends=('.lora_A.weight', '.lora_B.weight'), alpha=False),
], ids=['kohya', 'comfyui', 'original', 'bare'])
def test_flux_as_diffusers_reads_kohya(layout, tmp_path):
  torch.manual_seed(0)
  tensors = {layer: random_pair(*shape) for layer, shape in FUSED.items()}
  path = spelt(tensors, tmp_path / 'x.safetensors', **layout)
  found = read_lora(path, {'transformer': WIDE})['transformer']
  if layout.get('alpha', True):
    reference = path
  else:  # Which diffusers reads of whole models alone; its alpha is the rank.
    reference = spelt(tensors, tmp_path / 'kohya.safetensors', **KOHYA)
    found = {name: one._replace(alpha=ALPHA) for name, one in found.items()}
  wanted = change_in(FluxPipeline.lora_state_dict(str(reference)))
  assert len(wanted) == 15
  assert_same(change_of(found), wanted)
  assert {one.a.shape[-1] for one in found.values()} == {RANK}


@pytest.mark.parametrize('ranks', [(3, 3, 3), (2, 3, 1), (3, 0, 3), (4, 4, 4, 4)])
def test_parts_with_ranks_of_their_own(ranks, tmp_path):
  """As kohya's split_qkv trains them: blocks of one matrix, which are taken apart."""
  torch.manual_seed(0)
  widths = (3072, 3072, 3072, 12288)[: len(ranks)]
  layer = 'double_blocks.0.img_attn.qkv' if len(ranks) == 3 else 'single_blocks.0.linear1'
  a, b = random_pair(3072, sum(widths), sum(ranks))
  own = torch.zeros_like(b)
  for n, (rank, width) in enumerate(zip(ranks, widths, strict=True)):
    rows, columns = sum(widths[:n]), sum(ranks[:n])
    own[rows : rows + width, columns : columns + rank] = 1
  path = spelt({layer: (a, b * own)}, tmp_path / 'x.safetensors', **KOHYA)
  found = read_lora(path, {'transformer': WIDE})['transformer']
  assert [one.a.shape[-1] for one in found.values()] == [rank for rank in ranks if rank]
  wanted = change_in(FluxPipeline.lora_state_dict(str(path)))
  assert_same(change_of(found), {n: v for n, v in wanted.items() if n in found})
  assert all(not v.any() for n, v in wanted.items() if n not in found)
  write_lora(tmp_path / 'y.safetensors', {'transformer': found}, networks={'transformer': WIDE})
  old, new = load_file(path), load_file(tmp_path / 'y.safetensors')
  assert old.keys() == new.keys()
  assert all(torch.equal(old[n], new[n]) for n in old)


def xlabs(tensors, path):
  names = {'img_attn.qkv': 'processor.qkv_lora1', 'txt_attn.qkv': 'processor.qkv_lora2',
           'img_attn.proj': 'processor.proj_lora1', 'single.qkv': 'processor.qkv_lora'}
  values = {}
  for layer, (a, b) in tensors.items():
    block, _, end = layer.partition('.0.')
    stem = f'{block}.0.{names[end]}'
    values |= {f'{stem}.down.weight': a, f'{stem}.up.weight': b}
  save_file(values, path)
  return path


def test_flux_of_xlabs(tmp_path):
  torch.manual_seed(0)
  tensors = {n: random_pair(*FUSED[n]) for n in (*FUSED,)[:3]}
  tensors |= {'single_blocks.0.single.qkv': random_pair(3072, 9216)}
  path = xlabs(tensors, tmp_path / 'x.safetensors')
  found = read_lora(path, {'transformer': WIDE})['transformer']
  wanted = change_in(FluxPipeline.lora_state_dict(str(path)))
  assert len(wanted) == 10
  assert_same(change_of(found), wanted)


def lora_of(shapes, seed=0):
  """Adapters of every layer, with ranks 1 to 3 and one alpha / rank."""
  rng, out = np.random.default_rng(seed), {}
  for number, (name, (*window, i, o)) in enumerate(layers(shapes).items()):
    rank = 1 + number % 3
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
    b = draw(*(1 for _ in window), rank, o)
    out[name] = LoRAWeights(draw(*window, i, rank), b, 1.5 * rank)
  return out


def whole(state):
  """{layer: change} of kohya's file, with the names of an original file's tensors."""
  stems = [n.removesuffix('.lora_down.weight') for n in state if n.endswith('down.weight')]
  out = {}
  for stem in stems:
    a, b = state[f'{stem}.lora_down.weight'], state[f'{stem}.lora_up.weight']
    out[stem] = float(state[f'{stem}.alpha']) / a.shape[0] * (b.flatten(1) @ a.flatten(1))
  return out


def test_stable_diffusion_3_written_for_kohya(tmp_path):
  """Its changes are those of diffusers' conversion of a whole model, swapped layers included."""
  lora = lora_of(TINY)
  path = tmp_path / 'x.safetensors'
  write_lora(path, {'transformer': lora}, networks={'transformer': TINY})
  stored = whole(load_file(path))
  assert all(name.startswith('lora_unet_') for name in stored)
  assert 'lora_unet_joint_blocks_1_context_block_adaLN_modulation_1' in stored
  found = read_lora(path, {'transformer': TINY})['transformer']
  assert found.keys() == lora.keys()
  for name, one in lora.items():
    for left, right in zip(found[name], one, strict=True):
      np.testing.assert_array_equal(left, right)
  # The changes as an original file, what is no kernel made up.
  state = original(TINY)
  kernels = {name.replace('.', '_'): name for name in state}
  for name, value in stored.items():
    key = kernels[name.removeprefix('lora_unet_') + '_weight']
    state[key] = value.reshape(state[key].shape)
  wanted = single_file_utils.convert_sd3_transformer_checkpoint_to_diffusers(state)
  for name, one in lora.items():
    change = one.alpha / one.a.shape[-1] * (
      one.a.reshape(-1, one.a.shape[-1]) @ one.b.reshape(one.b.shape[-2:])
    )
    published = wanted[f'{name}.weight'].numpy()
    if published.ndim == 4:
      published = published.transpose(2, 3, 1, 0).reshape(change.shape)
    else:
      published = published.T
    np.testing.assert_allclose(change, published, rtol=1e-5, atol=1e-5, err_msg=name)


def original(shapes):
  """Zeros by the names of an original file of Stable Diffusion 3."""
  from diffusion_jax.formats.published import published_name, published_shape
  from diffusion_jax.formats.single_file_names import to_stored
  from diffusion_jax.formats.tensors import Tensor
  from diffusion_jax.formats.transformer_names import transformer_rules

  zeros = lambda shape: Tensor(np.dtype('float32'), shape, lambda: np.zeros(shape, np.float32))
  tensors = {published_name(n): zeros(published_shape(n, t.shape)) for n, t in shapes.items()}
  stored = to_stored(transformer_rules(tensors, 'mmdit'), tensors, 'x')
  return {name: torch.tensor(tensor.make()) for name, tensor in stored.items()}


def test_the_last_modulation_of_flux(tmp_path):
  """diffusers leaves its alpha out and the names without transformer."""
  torch.manual_seed(0)
  a, b = random_pair(3072, 6144)
  path = spelt({'final_layer.adaLN_modulation.1': (a, b), 'img_in': random_pair(64, 3072)},
               tmp_path / 'x.safetensors', **KOHYA, alpha=False)
  found = read_lora(path, {'transformer': WIDE})['transformer']
  state = FluxPipeline.lora_state_dict(str(path))
  assert_same(change_of(found), change_in(state))
  assert torch.equal(state['norm_out.linear.lora_B.weight'], torch.roll(b, 3072, 0))


@pytest.mark.parametrize(('extra', 'words'), [
  ({'lora_unet_double_blocks_1_img_attn_qkv.alpha': ()}, r'no part .*double_blocks_1_img_attn_qkv'),
  ({'lora_unet_double_blocks_0_img_attn_qk.lora_up.weight': (2, 2)}, 'img_attn_qk.lora_up'),
  ({'transformer.transformer_blocks.0.attn.to_q.lora_A.weight': (2, 3072),
    'transformer.transformer_blocks.0.attn.to_q.lora_B.weight': (3072, 2)},
   r'more than one adapter of transformer transformer_blocks\.0\.attn\.to_q'),
  ({'lora_unet_double_blocks_0_txt_attn_qkv.lora_down.weight': (2, 3072),
    'lora_unet_double_blocks_0_txt_attn_qkv.lora_up.weight': (9215, 2)},
   r'of a wrong shape: transformer double_blocks\.0\.txt_attn\.qkv'),
  ({'lora_te3_encoder_block_0_layer_0_SelfAttention_q.lora_down.weight': (2, 4)}, 'lora_te3_'),
])
def test_what_does_not_fit_is_named(extra, words, tmp_path):
  path = spelt({'double_blocks.0.img_attn.qkv': random_pair(3072, 9216)},
               tmp_path / 'x.safetensors', **KOHYA)
  save_file(load_file(path) | {n: torch.ones(shape) for n, shape in extra.items()}, path)
  with pytest.raises(UserError, match=words) as error:
    read_lora(path, {'transformer': WIDE})
  assert '\n' not in str(error.value)


def test_parts_of_other_strengths_are_not_one_layer(tmp_path):
  lora = lora_of(TINY)
  name = 'transformer_blocks.0.attn.to_k'
  lora[name] = lora[name]._replace(alpha=9.0)
  with pytest.raises(UserError, match=r'to_k and .*to_v are scaled by 1\.5 and .* layout peft'):
    write_lora(tmp_path / 'x.safetensors', {'transformer': lora}, networks={'transformer': TINY})
