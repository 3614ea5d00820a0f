"""All of Stable Diffusion 2.1's U-Net, which predicts v, on captioned pictures of 768 pixels."""

from diffusion_jax.configs.finetune import sd15
from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  config = sd15.get_config()  # The same settings as diffusers' example has for both.
  config.settings.update({'architecture': 'sd21', 'objective': {'prediction': 'v_prediction'}})
  config.data.size = 768
  return config
