"""DDPM on CelebA-HQ at 256 x 256 (Ho, Jain & Abbeel 2020, appendix B): 114 million parameters.

Six resolutions, attention at 16 x 16; Adam at 2e-5, since larger steps were unstable, batches of
64, 500,000 steps.
"""

from diffusion_jax.configs.papers.base import levels, pixels_base
from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  config = pixels_base('folder:data/celebahq', 256, 64)
  widths = (128, 128, 256, 256, 512, 512)
  config.settings.denoiser.update({'block_out_channels': widths, **levels(6, 4)})
  config.optimizer.learning_rate = 2e-5
  config.loop.total_steps = 500_000
  return config
