"""Inpainting: Stable Diffusion 1's U-Net with five channels more, on pictures of 512 pixels."""

from diffusion_jax.configs.finetune import sd15
from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  config = sd15.get_config()
  # As the published inpainting model was made from the plain one: the new channels begin at zero, a
  # tenth of the captions empty, a quarter of the masks whole (its model card). Rate and EMA are
  # those of sd15, as a batch of 4 bears no more.
  config.settings.inputs = 'inpaint'
  return config
