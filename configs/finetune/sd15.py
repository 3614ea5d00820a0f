"""All of Stable Diffusion 1's U-Net on captioned pictures of 512 pixels."""

from diffusion_jax.configs.finetune.base import finetune_base
from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  config = finetune_base('sd15', 512)
  # diffusers' examples/text_to_image: 15,000 steps of 4 at 1e-5, EMA 0.9999, which halves an old
  # weight's share after ln 2 / 1e-4 steps.
  config.optimizer.learning_rate = 1e-5
  config.loop.update({
    'total_steps': 15_000, 'ema_halflife_images': 27_726.0, 'checkpoint_every_steps': 1000,
  })
  return config
