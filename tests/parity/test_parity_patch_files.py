"""Files of PixArt and DiT in the names of their publishers: there, back, and as diffusers' scripts
convert them."""

import json
import re

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from diffusion_jax.errors import UserError
from diffusion_jax.formats.convert import convert
from diffusion_jax.formats.networks import load
from diffusion_jax.types import Condition
from tests.parity.test_parity_pixart import batch, theirs_of

torch = pytest.importorskip('torch')
diffusers = pytest.importorskip('diffusers')

PIXART = dict(
  num_attention_heads=3, attention_head_dim=64, in_channels=3, out_channels=6, num_layers=2,
  sample_size=8, patch_size=2, cross_attention_dim=192, caption_channels=7,
)
CONFIGS = {
  'alpha': PIXART | dict(use_additional_conditions=True, interpolation_scale=2),
  'sigma': PIXART | dict(use_additional_conditions=False, interpolation_scale=0.5),
  'dit': dict(
    num_attention_heads=1, attention_head_dim=64, in_channels=3, out_channels=6, num_layers=2,
    sample_size=8, patch_size=2, num_embeds_ada_norm=5,
  ),
}
MLP = [('0', 'linear_1'), ('2', 'linear_2')]
ENDS = {
  'pixart': {
    'x_embedder.proj': 'pos_embed.proj', 't_block.1': 'adaln_single.linear',
    'y_embedder.y_proj.fc1': 'caption_projection.linear_1',
    'y_embedder.y_proj.fc2': 'caption_projection.linear_2', 'final_layer.linear': 'proj_out',
    **{f'{a}_embedder.mlp.{n}': f'adaln_single.emb.{b}_embedder.{m}' for n, m in MLP for a, b in (
      ('t', 'timestep'), ('csize', 'resolution'), ('ar', 'aspect_ratio')
    )},
  },
  'dit': {
    'x_embedder.proj': 'pos_embed.proj', 'final_layer.linear': 'proj_out_2',
    'final_layer.adaLN_modulation.1': 'proj_out_1',
  },
}
SHARED = {
  't_embedder.mlp.0': 'timestep_embedder.linear_1',
  't_embedder.mlp.2': 'timestep_embedder.linear_2',
  'y_embedder.embedding_table': 'class_embedder.embedding_table',
}
BLOCK = {
  'attn.qkv': 'attn1.to_q attn1.to_k attn1.to_v', 'attn.proj': 'attn1.to_out.0',
  'cross_attn.q_linear': 'attn2.to_q', 'cross_attn.kv_linear': 'attn2.to_k attn2.to_v',
  'cross_attn.proj': 'attn2.to_out.0', 'mlp.fc1': 'ff.net.0.proj', 'mlp.fc2': 'ff.net.2',
  'adaLN_modulation.1': 'norm1.linear',
}


def as_published(state, kind):
  """An original file's tensors by diffusers' names, as its scripts relate them."""
  found = {}
  for name, value in state.items():
    layer, _, leaf = name.rpartition('.')
    block = re.match(r'blocks\.(\d)(?:\.(.+))?$', layer)
    if name == 'pos_embed':
      continue
    if leaf == 'scale_shift_table':
      found[f'transformer_blocks.{block[1]}.{leaf}' if block else leaf] = value
    elif block:
      targets = BLOCK[block[2]].split()
      for target, piece in zip(targets, value.chunk(len(targets)), strict=True):
        found[f'transformer_blocks.{block[1]}.{target}.{leaf}'] = piece
    elif layer in SHARED and kind == 'dit':
      found |= {f'transformer_blocks.{n}.norm1.emb.{SHARED[layer]}.{leaf}': value for n in '01'}
    else:
      found[f'{ENDS[kind][layer]}.{leaf}'] = value
  return found


def drawn(name):
  torch.manual_seed(0)
  kind = 'dit' if name == 'dit' else 'pixart'
  model = {'dit': diffusers.DiTTransformer2DModel, 'pixart': diffusers.PixArtTransformer2DModel}
  model = model[kind](**CONFIGS[name])
  with torch.no_grad():
    for parameter in model.parameters():
      parameter.add_(0.1 * torch.randn_like(parameter))
    if kind == 'dit':
      first, second = model.transformer_blocks
      second.norm1.emb.load_state_dict(first.norm1.emb.state_dict())
  return kind, model.eval()


def outputs(kind, model, config, network):
  """Of diffusers' network and of ours."""
  x, t, condition = batch(PIXART | config | {'patch_size': 2})
  if kind == 'pixart':
    return theirs_of(model, x, t, condition).detach(), network(x, t, condition)
  x, labels = x[:, :, :4], np.array([1, 5])  # Its reference reads squares alone.
  theirs = model(torch.tensor(x.transpose(0, 3, 1, 2)), torch.tensor(t), torch.tensor(labels))
  ours = network(jnp.asarray(x), jnp.asarray(t), Condition(labels=jnp.asarray(labels)))
  return theirs.sample.permute(0, 2, 3, 1).detach(), ours


@pytest.mark.parametrize('name', CONFIGS)
def test_there_and_back(name, tmp_path):
  kind, model = drawn(name)
  model.save_pretrained(tmp_path / 'there')
  file = tmp_path / 'x.safetensors'
  assert convert(tmp_path / 'there', file, 'single-file') == []
  state, wanted = load_file(file), model.state_dict()
  published = as_published(state, kind)
  assert published.keys() == wanted.keys()
  assert all(torch.equal(published[key], value) for key, value in wanted.items())
  table = model.pos_embed.pos_embed
  np.testing.assert_allclose(state['pos_embed'], table, atol=1e-6)

  assert convert(file, tmp_path / 'back', 'diffusers', kind=kind) == []
  back, network = type(model).from_pretrained(tmp_path / 'back'), load(kind, tmp_path / 'back')
  assert all(torch.equal(back.state_dict()[key], value) for key, value in wanted.items())
  assert {key: back.config[key] for key in CONFIGS[name]} == CONFIGS[name]
  theirs, ours = outputs(kind, model, CONFIGS[name], network)
  np.testing.assert_allclose(ours, theirs, atol=1e-3)
  again, _ = outputs(kind, back, CONFIGS[name], network)
  assert torch.equal(again, theirs)


def test_files_of_training(tmp_path):
  """With what only training has, half as exact; without positions they are told in a sentence."""
  kind, model = drawn('sigma')
  model.save_pretrained(tmp_path / 'there')
  convert(tmp_path / 'there', tmp_path / 'x.safetensors', 'single-file')
  state = {k: v.half() for k, v in load_file(tmp_path / 'x.safetensors').items()}
  extra = {'y_embedder.y_embedding': torch.ones(3, 7)}
  torch.save({'state_dict': state | extra, 'epoch': 3}, tmp_path / 'x.pth')
  [note] = convert(tmp_path / 'x.pth', tmp_path / 'a', 'diffusers', kind=kind)
  assert 'y_embedder.y_embedding' in note
  back = type(model).from_pretrained(tmp_path / 'a')
  assert back.config.interpolation_scale == 0.5 and back.config.sample_size == 8
  for key, value in model.state_dict().items():
    assert torch.equal(back.state_dict()[key], value.half().float())

  del state['pos_embed']
  save_file(state, tmp_path / 'bare.safetensors')
  notes = convert(tmp_path / 'bare.safetensors', tmp_path / 'b', 'diffusers', kind=kind)
  assert all(word in note for word, note in zip(('sample_size', 'scale'), notes, strict=True))
  assert json.loads((tmp_path / 'b' / 'config.json').read_text())['sample_size'] == 128


def test_what_a_file_cannot_hold(tmp_path):
  _, model = drawn('dit')
  model.save_pretrained(tmp_path / 'there')
  file = tmp_path / 'x.safetensors'
  convert(tmp_path / 'there', file, 'single-file')
  with pytest.raises(UserError, match='a transformer alone; give --type dit'):
    convert(file, tmp_path / 'out', 'diffusers')
  with pytest.raises(UserError, match=r'lacks blocks.0.cross_attn.q_linear.weight'):
    convert(file, tmp_path / 'out', 'diffusers', kind='pixart')
  state = load_file(file)
  save_file(state | {'pos_embed': state['pos_embed'].flip(1)}, tmp_path / 'other.safetensors')
  with pytest.raises(UserError, match='pos_embed is not the table of sinusoids'):
    convert(tmp_path / 'other.safetensors', tmp_path / 'out', 'diffusers', kind='dit')
  with torch.no_grad():
    model.transformer_blocks[1].norm1.emb.class_embedder.embedding_table.weight.add_(1)
  model.save_pretrained(tmp_path / 'differs')
  with pytest.raises(UserError, match='copies in other blocks differ'):
    convert(tmp_path / 'differs', tmp_path / 'y.safetensors', 'single-file')
  wide = diffusers.DiTTransformer2DModel(**CONFIGS['dit'] | dict(
    num_attention_heads=4, attention_head_dim=16, num_layers=1
  ))
  wide.save_pretrained(tmp_path / 'wide')
  notes = convert(tmp_path / 'wide', tmp_path / 'z.safetensors', 'single-file')
  assert len(notes) == 2 and 'attention_head_dim 16' in notes[0] and 'to be 64' in notes[0]
