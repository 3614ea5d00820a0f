"""What a config says is judged before anything is built: what is absurd is one sentence."""

import json
import time

import numpy as np
import pytest

from diffusion_jax import registry
from diffusion_jax.errors import UserError
from diffusion_jax.formats.convert import convert
from diffusion_jax.formats.networks import load_params, network_format, save_params
from diffusion_jax.formats.tensors import write_json
from diffusion_jax.models.text.clip import CLIPTextConfig, CLIPVisionConfig

LEVELS = dict(block_out_channels=(4, 8), layers_per_block=1, norm_num_groups=2)
DOWN, UP = ('DownBlock2D', 'CrossAttnDownBlock2D'), ('CrossAttnUpBlock2D', 'UpBlock2D')
ENCODER = LEVELS | dict(down_block_types=DOWN, cross_attention_dim=8, attention_head_dim=1)
TOWER = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
TEXT = TOWER | dict(vocab_size=9, max_position_embeddings=5)
VISION = TOWER | dict(image_size=8, patch_size=4)
HEADS = dict(num_attention_heads=2, attention_head_dim=4, num_layers=1, sample_size=4)
SMALL = {
  'autoencoder': LEVELS, 'vq': LEVELS | dict(num_vq_embeddings=8),
  'fsq': LEVELS | dict(levels=(3, 3)), 'dvae': LEVELS | dict(num_vq_embeddings=8, vq_embed_dim=4),
  'unet': ENCODER | dict(up_block_types=UP), 'controlnet': ENCODER,
  'unet2d': LEVELS | dict(
    down_block_types=('DownBlock2D', 'AttnDownBlock2D'), attention_head_dim=4,
    up_block_types=('AttnUpBlock2D', 'UpBlock2D'),
  ),
  'clip': dict(text_config=CLIPTextConfig(**TEXT), vision_config=CLIPVisionConfig(**VISION)),
  'clip_text': TEXT, 'clip_text_projection': TEXT, 'clip_vision': VISION,
  'clip_vision_projection': VISION,
  'dinov2': dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, image_size=28),
  't5': dict(vocab_size=9, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2),
  'autoencoder_tiny': dict(
    encoder_block_out_channels=(4, 4), decoder_block_out_channels=(4, 4),
    num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1),
  ),
  'dit': HEADS | dict(shared_embedding=False),
  'mmdit': HEADS | dict(
    caption_projection_dim=8, joint_attention_dim=8, pooled_projection_dim=8, pos_embed_max_size=4
  ),
  'flux': dict(
    in_channels=4, num_attention_heads=2, attention_head_dim=8, num_layers=1, num_single_layers=1,
    joint_attention_dim=8, pooled_projection_dim=8, axes_dims_rope=(2, 2, 4),
  ),
  'pixart': HEADS | dict(cross_attention_dim=8, caption_channels=8),
  'classifier': dict(block_out_channels=(8,), class_names=('a', 'b'), image_size=8),
  'mlp': dict(width=8),
  'prior': dict(
    num_attention_heads=1, attention_head_dim=8, num_layers=1, embedding_dim=8, num_embeddings=4
  ),
  'embedding_tokens': dict(embedding_dim=8, components=2, intervals=4),
  'token_transformer': dict(
    hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=9,
    text_length=4, image_vocab_size=8, rows=2, columns=2,
  ),
}
NAN, LONG = float('nan'), 'x' * 10**5
NO_SIZE = [10**9, -1, 0, NAN, 1.5, '1', True, [10**9], [[1]], [1] * 10**5, {}]


@pytest.fixture(params=registry.NETWORKS)
def saved(request, tmp_path):
  """(kind, its directory, its config.json as a table), of a network with a few parameters."""
  kind = network_format(request.param)
  config = kind.config(**SMALL[request.param])
  shapes = kind.shapes(config)
  save_params(tmp_path, config, {n: np.ones(p.shape, np.float32) for n, p in shapes.items()})
  load_params(request.param, tmp_path)
  return request.param, tmp_path, json.loads((tmp_path / 'config.json').read_text())


def sizes(values):
  """Keys of what counts: whole numbers, and lists of them."""
  for key, value in values.items():
    first = value[0] if isinstance(value, list) and value else value
    if type(first) is int and not key.endswith('_token_id'):
      yield key


def test_sizes_of_every_kind_of_network(saved):
  name, folder, values = saved
  unused = {'freq_shift', 'latent_magnitude', 'downsample_padding'}  # Of which 0 is one.
  unused |= {'projection_dim'} if name in ('clip_text', 'clip_vision') else set()
  places = [(values, key) for key in sizes(values)]
  if name == 'clip':
    towers = [values[f'{tower}_config'] for tower in ('text', 'vision')]
    places += [(tower, key) for tower in towers for key in sizes(tower) if key != 'projection_dim']
  assert len(places) >= 3
  for table, key in places:
    if key in unused:
      continue
    before = table[key]
    for bad in NO_SIZE:
      table[key] = bad
      (folder / 'config.json').write_text(json.dumps(values))
      start = time.process_time()
      with pytest.raises(UserError) as error:
        load_params(name, folder)
      assert time.process_time() - start < 3, (key, bad)
      assert len(str(error.value)) < 400 and str(folder) in str(error.value), (key, bad)
    table[key] = before


def test_other_fields_have_their_types(saved):
  name, folder, values = saved
  for key, value in values.items():
    bad = {bool: ['false', 1, [True]], float: [NAN, '1', -1e300, []], str: [LONG, 3, ['a'], {}]}
    for other in bad.get(type(value), []):
      if key in ('dtype', 'model_type', 'dense_act_fn', 'norm_type', 'is_encoder_decoder'):
        continue  # Without effect on the network.
      (folder / 'config.json').write_text(json.dumps(values | {key: other}))
      if key in ('is_gated_act',):
        continue
      with pytest.raises(UserError) as error:
        load_params(name, folder)
      assert len(str(error.value)) < 400, (key, other)


@pytest.mark.parametrize('text', [
  '[' * 10**5 + ']' * 10**5, '{"a":' * 10**5 + '1' + '}' * 10**5, f'{{"a": {"1" * 10**5}}}', '[]',
  'null', '', '{"_class_name": "MLP", "_class_name": "MLP"}', '\ud800',
], ids=['lists', 'objects', 'digits', 'list', 'null', 'empty', 'twice', 'surrogate'])
def test_texts_that_are_no_config(text, tmp_path):
  (tmp_path / 'config.json').write_bytes(text.encode('utf-8', 'surrogatepass'))
  with pytest.raises(UserError, match=r'config\.json'):
    load_params('mlp', tmp_path)
  with pytest.raises(UserError, match=r'config\.json'):
    convert(tmp_path, tmp_path / 'out', 'native')


def test_a_config_of_a_hundred_megabytes(tmp_path):
  with (tmp_path / 'config.json').open('wb') as file:
    file.truncate(10**8)
  start = time.process_time()
  with pytest.raises(UserError, match='bytes'):
    load_params('mlp', tmp_path)
  assert time.process_time() - start < 2


def test_convert_counts_no_layers_that_are_not_there(tmp_path):
  """A single file is written along its config: whatever that says is bounded before."""
  for kind, name in (('unet', 'unet'), ('autoencoder', 'vae'), ('clip_text', 'text_encoder')):
    spec = network_format(kind)
    config = spec.config(**SMALL[kind])
    shapes = spec.shapes(config)
    params = {n: np.ones(p.shape, np.float32) for n, p in shapes.items()}
    save_params(tmp_path / name, config, params)
  write_json(tmp_path / 'model_index.json', {
    'unet': ['d', 'UNet2DConditionModel'], 'vae': ['d', 'AutoencoderKL'],
    'text_encoder': ['t', 'CLIPTextModel'],
  })
  convert(tmp_path, tmp_path / 'good.safetensors', 'single-file')
  for part, key in (
    ('unet', 'layers_per_block'), ('unet', 'transformer_layers_per_block'),
    ('vae', 'layers_per_block'), ('text_encoder', 'num_hidden_layers'),
  ):
    path = tmp_path / part / 'config.json'
    before = path.read_text()
    for bad in (10**9, -1, 'x', None if key != 'layers_per_block' else []):
      write_json(path, json.loads(before) | {key: bad})
      start = time.process_time()
      try:
        convert(tmp_path, tmp_path / 'bad.safetensors', 'single-file')
      except UserError as error:
        assert part in str(error)
      else:
        assert bad is None
      (tmp_path / 'bad.safetensors').unlink(missing_ok=True)
      assert time.process_time() - start < 3
    path.write_text(before)
