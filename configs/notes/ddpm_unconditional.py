"""DDPM without a condition, as Ho, Jain & Abbeel (2020) trained it: see `notes/ddpm`.

The network is the paper's kind: residual blocks told of the time, and attention of all positions to
each other at one resolution and in the middle. There is nothing to guide by.
"""

from diffusion_jax.configs.notes import ddpm
from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  config = ddpm.get_config()
  settings = config.settings
  settings.conditioners = ConfigDict()
  settings.space.patch = 2
  settings.denoiser = ConfigDict({
    'type': 'unet2d', 'sample_size': 16, 'in_channels': 12, 'out_channels': 12,
    'down_block_types': ('DownBlock2D', 'AttnDownBlock2D'),
    'up_block_types': ('AttnUpBlock2D', 'UpBlock2D'), 'attention_head_dim': 32,
    'block_out_channels': (64, 128), 'layers_per_block': 1, 'norm_num_groups': 16,
  })
  settings.sample.guidance = 1.0
  config.optimizer.learning_rate = 1e-3
  settings.evaluation.metrics = ('fd', 'kid')
  settings.preview_captions = ('',) * 16
  return config
