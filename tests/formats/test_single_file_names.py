"""Names in single files of Stable Diffusion, and configs from shapes. Exactness: tests/parity."""

import pytest

from diffusion_jax.formats.adapter_names import kohya_names
from diffusion_jax.formats.published import published_name, published_shape
from diffusion_jax.formats.single_file_names import unet_config, unet_names
from diffusion_jax.formats.unet import UNET, UNETS

ATTENTION = 'transformer_blocks.0.attn1.to_q'
# Stable Diffusion XL: three levels of two layers, attention in the lower two.
XL = [
  *(f'down_blocks.{i}.resnets.{j}.{c}' for i in range(3) for j in range(2)
    for c in ('conv1', 'conv2', 'time_emb_proj', 'conv_shortcut')),
  *(f'down_blocks.{i}.attentions.{j}.{ATTENTION}' for i in (1, 2) for j in range(2)),
  *(f'down_blocks.{i}.downsamplers.0.conv' for i in range(2)),
  *(f'mid_block.{block}.conv1' for block in ('resnets.0', 'resnets.1')),
  f'mid_block.attentions.0.{ATTENTION}',
  *(f'up_blocks.{i}.resnets.{j}.conv1' for i in range(3) for j in range(3)),
  *(f'up_blocks.{i}.attentions.{j}.{ATTENTION}' for i in (0, 1) for j in range(3)),
  *(f'up_blocks.{i}.upsamplers.0.conv' for i in range(2)),
  'conv_in', 'conv_out', 'time_embedding.linear_1', 'add_embedding.linear_2',
]


@pytest.mark.parametrize(('stored', 'layer'), [  # As in published files.
  ('input_blocks.4.1.transformer_blocks.0.attn1.to_q', f'down_blocks.1.attentions.0.{ATTENTION}'),
  ('input_blocks.8.1.transformer_blocks.0.attn1.to_q', f'down_blocks.2.attentions.1.{ATTENTION}'),
  ('middle_block.1.transformer_blocks.0.attn1.to_q', f'mid_block.attentions.0.{ATTENTION}'),
  ('output_blocks.0.1.transformer_blocks.0.attn1.to_q', f'up_blocks.0.attentions.0.{ATTENTION}'),
  ('output_blocks.5.1.transformer_blocks.0.attn1.to_q', f'up_blocks.1.attentions.2.{ATTENTION}'),
  ('input_blocks.0.0', 'conv_in'), ('out.2', 'conv_out'),
  ('time_embed.0', 'time_embedding.linear_1'), ('label_emb.0.2', 'add_embedding.linear_2'),
  ('input_blocks.1.0.in_layers.2', 'down_blocks.0.resnets.0.conv1'),
  ('input_blocks.3.0.op', 'down_blocks.0.downsamplers.0.conv'),
  ('input_blocks.4.0.skip_connection', 'down_blocks.1.resnets.0.conv_shortcut'),
  ('input_blocks.5.0.emb_layers.1', 'down_blocks.1.resnets.1.time_emb_proj'),
  ('input_blocks.6.0.op', 'down_blocks.1.downsamplers.0.conv'),
  ('input_blocks.7.0.out_layers.3', 'down_blocks.2.resnets.0.conv2'),
  ('middle_block.0.in_layers.2', 'mid_block.resnets.0.conv1'),
  ('middle_block.2.in_layers.2', 'mid_block.resnets.1.conv1'),
  ('output_blocks.8.0.in_layers.2', 'up_blocks.2.resnets.2.conv1'),
  ('output_blocks.2.2.conv', 'up_blocks.0.upsamplers.0.conv'),
  ('output_blocks.5.2.conv', 'up_blocks.1.upsamplers.0.conv'),
])
def test_block_numbers(stored, layer):
  assert unet_names(XL)[layer] == stored
  names = kohya_names(XL)
  assert names[stored.replace('.', '_')] == names[layer.replace('.', '_')] == layer


def test_an_upsampling_follows_what_its_level_has():
  """Stable Diffusion 1 and 2 have no attention where the way up begins."""
  names = [*(f'up_blocks.0.resnets.{j}.conv1' for j in range(3)), 'up_blocks.0.upsamplers.0.conv']
  assert unet_names(names)['up_blocks.0.upsamplers.0.conv'] == 'output_blocks.2.1.conv'


def test_block_numbers_are_all_different():
  found = unet_names(XL)
  assert sorted(found) == sorted(XL) and len(set(found.values())) == len(XL)
  assert unet_names(['text_model.encoder.layers.0.mlp.fc1']) == {}


@pytest.mark.parametrize(('architecture', 'count', 'some'), [
  ('sd15', 686, ['output_blocks.2.1.conv.weight', 'output_blocks.5.2.conv.weight',
                 'output_blocks.11.1.proj_out.weight', 'input_blocks.11.0.out_layers.3.bias']),
  ('sd21', 686, ['middle_block.1.transformer_blocks.0.attn2.to_k.weight']),
  ('sd_x4_upscaler', 687, ['label_emb.weight', 'input_blocks.10.0.skip_connection.bias']),
  ('sdxl', 1680, ['label_emb.0.2.bias', 'input_blocks.8.1.transformer_blocks.9.norm3.weight',
                  'output_blocks.2.2.conv.bias', 'output_blocks.8.0.skip_connection.weight']),
])
def test_published_u_nets_have_their_names_and_counts(architecture, count, some):
  published = [published_name(name) for name in UNET.shapes(UNETS[architecture])]
  found = unet_names(published)
  assert len(set(found.values())) == len(found) == len(set(published)) == count
  assert set(some) <= set(found.values())


def test_the_config_of_a_published_u_net_follows_from_its_shapes():
  """Stable Diffusion 2: all that its family does not tell."""
  config = UNETS['sd21_base']
  shapes = UNET.shapes(config)
  published = {published_name(n): published_shape(n, t.shape) for n, t in shapes.items()}
  stored = {name: published[own] for own, name in unet_names(published).items()}
  found = unet_config(stored, 'here', heads=None, pooled=None)
  assert UNET.parse(found | {'sample_size': 64}, 'here') == config
