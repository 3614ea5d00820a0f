"""LoRA on the attentions of Stable Diffusion XL's U-Net, on captioned pictures of 1024 pixels."""

from diffusion_jax.configs.finetune import lora
from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  config = lora.get_config()  # The same rank and rate as in diffusers' example for XL.
  config.dtype = 'bfloat16'
  config.data.size = 1024
  config.settings.architecture = 'sdxl'
  config.settings.sample.guidance = 5.0
  return config
