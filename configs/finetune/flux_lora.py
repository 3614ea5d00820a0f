"""LoRA on the attentions of Flux.1 dev, on captioned pictures of 1024 pixels."""

from diffusion_jax.configs.finetune import sd35_medium_lora
from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  config = sd35_medium_lora.get_config()
  config.settings.architecture = 'flux_dev'
  # Its guidance is distilled: the network is told 3.5, and nothing is drawn twice.
  config.settings.sample.update({
    'guidance': 1.0, 'fractional': True, 'places': {
      'base_shift': 0.5, 'max_shift': 1.15, 'base_image_seq_len': 256, 'max_image_seq_len': 4096,
    },
  })
  return config
