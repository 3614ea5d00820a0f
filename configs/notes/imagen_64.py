"""Imagen's second super-resolution model: 32 pixels to 64; see imagen_32.py.

Another level where places are four times as many, and narrow ones there.
"""

from diffusion_jax.configs.notes import imagen_32
from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  config = imagen_32.get_config()
  config.data.size = 64
  config.settings.denoiser.update({
    'sample_size': 32, 'block_out_channels': (32, 64, 96), 'layers_per_block': (1, 1, 2),
    'down_block_types': ('DownBlock2D', 'DownBlock2D', 'CrossAttnDownBlock2D'),
    'up_block_types': ('CrossAttnUpBlock2D', 'UpBlock2D', 'UpBlock2D'),
  })
  config.loop.total_steps = 900
  return config
