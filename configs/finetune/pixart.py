"""All of PixArt-sigma's transformer on captioned pictures of 1024 pixels."""

from diffusion_jax.configs.finetune.base import finetune_base
from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  config = finetune_base('pixart_sigma', 1024)
  config.dtype = 'bfloat16'
  config.settings.sample = ConfigDict({'sampler': 'dpmpp_2m', 'steps': 20, 'guidance': 4.5})
  config.optimizer.learning_rate = 2e-5
  config.loop.update({
    'total_steps': 10_000, 'batch_size': 8, 'checkpoint_every_steps': 1000,
  })
  return config
