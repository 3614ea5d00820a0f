"""config.json of U-Nets and ControlNets: what is read, what is refused, what is written."""

import json

import pytest

from diffusion_jax.errors import UserError
from diffusion_jax.formats.unet import CONTROLNET, CONTROLNETS, UNET, UNETS


@pytest.mark.parametrize(('table', 'spec'), [(UNETS, UNET), (CONTROLNETS, CONTROLNET)])
def test_what_is_written_is_read(table, spec):
  for config in table.values():
    assert spec.parse(json.loads(json.dumps(spec.describe(config))), 'here') == config


def test_the_defaults_are_those_of_diffusers():
  unet, controlnet = UNET.parse({}, 'here'), CONTROLNET.parse({}, 'here')
  assert (unet.cross_attention_dim, unet.sample_size) == (1280, None)
  assert controlnet.cross_attention_dim == 1280


def test_keys_without_effect_are_read():
  values = {
    'upcast_attention': None, 'num_attention_heads': None, 'dropout': 0.0, '_anything': 1,
    'reverse_transformer_layers_per_block': None, 'addition_embed_type_num_heads': 64,
    'encoder_hid_dim': None, 'downsample_padding': 1, 'class_embeddings_concat': False,
  }
  assert UNET.parse(values, 'here') == UNET.parse({}, 'here')


def test_heads_are_named_in_two_ways():
  assert UNET.parse({'attention_head_dim': [5, 10, 20, 20]}, 'here').heads == (5, 10, 20, 20)
  both = {'attention_head_dim': 8, 'num_attention_heads': 4}
  assert CONTROLNET.parse(both, 'here').heads == (4,) * 4
  with pytest.raises(UserError, match='here: num_attention_heads=4'):  # As in diffusers.
    UNET.parse(both, 'here')


@pytest.mark.parametrize(('key', 'value'), [
  ('time_cond_proj_dim', 3), ('encoder_hid_dim_type', 'text_proj'), ('act_fn', 'gelu'),
  ('reverse_transformer_layers_per_block', [1, 2, 3, 4]), ('dual_cross_attention', True),
  ('class_embed_type', 'simple_projection'), ('addition_embed_type', 'image'),
  ('mid_block_type', 'UNetMidBlock2DSimpleCrossAttn'), ('resnet_time_scale_shift', 'spatial'),
  ('time_embedding_dim', 512), ('transformer_layers_per_block', [[1, 2], 1, 1, 1]),
  ('cross_attention_dim', [8, 8, 8, 8]),
  ('conv_in_kernel', 1), ('unheard_of', 0),
])
def test_what_we_lack_is_refused_by_name(key, value):
  with pytest.raises(UserError, match=key):
    UNET.parse({key: value}, 'here')
