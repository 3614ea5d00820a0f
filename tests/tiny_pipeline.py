"""Pipelines of a few channels in the layout of diffusers, written by us without PyTorch.

Every weight is random, so that no layer hides another.
"""

import pathlib

import numpy as np
import transformers
from PIL import Image

from diffusion_jax.formats.networks import format_of, save_params
from diffusion_jax.formats.published import published_name, to_published_layout
from diffusion_jax.formats.tensors import write_json
from diffusion_jax.models.autoencoder import AutoencoderKLConfig
from diffusion_jax.models.text.clip import CLIPTextConfig, CLIPTextProjectionConfig
from diffusion_jax.models.unet import UNetConfig

SIZE = 16
LETTERS = 'abcdefghijklmnopqrstuvwxyz'
TOKENS = [*LETTERS, *(f'{c}</w>' for c in LETTERS), 'ca', 'cat</w>', '<|startoftext|>',
          '<|endoftext|>']
TEXT = dict(
  vocab_size=len(TOKENS), hidden_size=8, intermediate_size=8, num_attention_heads=2,
  max_position_embeddings=10, bos_token_id=len(TOKENS) - 2, eos_token_id=2,
  pad_token_id=len(TOKENS) - 1,
)
UNET = dict(
  sample_size=8, block_out_channels=(8,), layers_per_block=1, norm_num_groups=4,
  attention_head_dim=2, down_block_types=('DownBlock2D',), up_block_types=('UpBlock2D',),
)
AUTOENCODER = AutoencoderKLConfig(
  block_out_channels=(4, 4), layers_per_block=1, norm_num_groups=2, sample_size=SIZE,
  scaling_factor=0.18215,
)
SD = {
  'vae': AUTOENCODER, 'text_encoder': CLIPTextConfig(**TEXT, num_hidden_layers=1),
  'unet': UNetConfig(**UNET, cross_attention_dim=8),
}
SDXL = {
  'vae': AUTOENCODER, 'text_encoder': CLIPTextConfig(**TEXT, num_hidden_layers=2),
  'text_encoder_2': CLIPTextProjectionConfig(**TEXT, num_hidden_layers=2, projection_dim=6),
  'unet': UNetConfig(
    **UNET, cross_attention_dim=16, use_linear_projection=True, addition_embed_type='text_time',
    addition_time_embed_dim=4, projection_class_embeddings_input_dim=6 * 4 + 6,
  ),
}
CLASSES = {
  'vae': ('diffusers', 'AutoencoderKL'), 'unet': ('diffusers', 'UNet2DConditionModel'),
  'scheduler': ('diffusers', 'DDIMScheduler'), 'tokenizer': ('transformers', 'CLIPTokenizer'),
  'tokenizer_2': ('transformers', 'CLIPTokenizer'),
  'text_encoder': ('transformers', 'CLIPTextModel'),
  'text_encoder_2': ('transformers', 'CLIPTextModelWithProjection'),
}


def published(params) -> dict[str, np.ndarray]:
  """The same parameters by published names, in the published layout."""
  layout = lambda name, value: np.ascontiguousarray(to_published_layout(name, value))
  return {published_name(name): layout(name, value) for name, value in params.items()}


def random_params(config, seed: int = 0) -> dict[str, np.ndarray]:
  """Every parameter of the network with this config."""
  shapes = format_of(config).shapes(config)
  rng = np.random.default_rng(seed)
  draw = lambda name, shape: 0.2 * rng.normal(size=shape) + name.endswith('scale')
  return {name: draw(name, leaf.shape).astype(np.float32) for name, leaf in shapes.items()}


def write_tiny_pipeline(folder: pathlib.Path, parts: dict, prediction: str = 'epsilon') -> None:
  """SD or SDXL as diffusers' from_pretrained and our read_pipeline open it."""
  for seed, (name, config) in enumerate(parts.items()):
    save_params(folder / name, config, random_params(config, seed))
  names = [name.replace('text_encoder', 'tokenizer') for name in parts if 'text' in name]
  tokenizer = transformers.CLIPTokenizer(
    vocab={token: i for i, token in enumerate(TOKENS)}, merges=[('c', 'a'), ('ca', 't</w>')],
    model_max_length=TEXT['max_position_embeddings'],
  )
  for name in names:
    tokenizer.save_pretrained(folder / name)
  write_json(folder / 'scheduler' / 'scheduler_config.json', {
    '_class_name': 'DDIMScheduler', 'beta_start': 0.00085, 'beta_end': 0.012,
    'beta_schedule': 'scaled_linear', 'num_train_timesteps': 1000, 'clip_sample': False,
    'set_alpha_to_one': False, 'steps_offset': 1, 'prediction_type': prediction,
  })
  xl = 'text_encoder_2' in parts
  index = {'_class_name': f'StableDiffusion{"XL" * xl}Pipeline', '_diffusers_version': '0.30.0'}
  index |= {name: CLASSES[name] for name in (*parts, *names, 'scheduler')}
  absent = ('image_encoder', 'feature_extractor') + ('safety_checker',) * (not xl)
  write_json(folder / 'model_index.json', index | dict.fromkeys(absent, (None, None)))


def write_pictures(folder: pathlib.Path, count: int = 8, captions: bool = True) -> None:
  """Squares of one colour on another, of several sizes, captioned in files beside them or not."""
  rng = np.random.default_rng(0)
  folder.mkdir(parents=True, exist_ok=True)
  for i in range(count):
    pixels = np.full((18 + i, 26 - i, 3), rng.integers(256, size=3), np.uint8)
    pixels[5:12, 6:13] = rng.integers(256, size=3)
    Image.fromarray(pixels).save(folder / f'{i}.png')
    if captions:
      (folder / f'{i}.txt').write_text(f'a cat {LETTERS[i]}\n')
