"""The model of CelebA at 64 x 64 of Song, Meng & Ermon (2021), drawn by DDIM.

DDPM's U-Net with five resolutions and attention at 16 x 16, with the widths, the learning rate and
the batches of the released configuration; the paper names no number of steps, which is that of
CIFAR-10 here. DDIM draws from it in 10 to 1000 steps (table 1), `--sampler ddim --steps N`.
"""

from diffusion_jax.configs.papers.base import levels, pixels_base
from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  config = pixels_base('folder:data/celeba', 64, 128)
  config.settings.denoiser.update({
    'block_out_channels': (128, 256, 256, 256, 512), **levels(5, 2),
  })
  config.settings.sample.update({'sampler': 'ddim', 'steps': 100})
  config.loop.total_steps = 800_000
  return config
