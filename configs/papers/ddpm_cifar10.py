"""DDPM on CIFAR-10 (Ho, Jain & Abbeel 2020, appendix B): 35.7 million parameters, FID 3.17.

Four resolutions from 32 x 32, attention at 16 x 16; Adam at 2e-4, batches of 128, 800,000 steps,
weights averaged with 0.9999, horizontal flips, variances beta_t.
"""

from diffusion_jax.configs.papers.base import levels, pixels_base
from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  config = pixels_base('folder:data/cifar10', 32, 128)
  config.settings.denoiser.update({'block_out_channels': (128, 256, 256, 256), **levels(4, 1)})
  config.loop.total_steps = 800_000
  return config
