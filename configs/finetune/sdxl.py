"""All of Stable Diffusion XL's U-Net on captioned pictures of 1024 pixels, over all devices."""

from diffusion_jax.configs.finetune.base import finetune_base
from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  config = finetune_base('sdxl', 1024)
  config.dtype = 'bfloat16'
  # Parameters and optimizer state over all devices: see docs/finetuning.md for what one needs.
  config.mesh.update({'data': 1, 'fsdp': -1})
  # diffusers' examples/text_to_image/README_sdxl: 10,000 steps at 1e-6, a fifth of the captions
  # empty.
  config.settings.update({'caption_dropout': 0.2})
  config.settings.sample.guidance = 5.0
  config.optimizer.learning_rate = 1e-6
  config.loop.update({
    'total_steps': 10_000, 'batch_size': 8, 'checkpoint_every_steps': 1000,
  })
  return config
