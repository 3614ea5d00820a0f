"""A ControlNet for Stable Diffusion 1 that follows edges, on captioned pictures of 512 pixels."""

from diffusion_jax.configs.finetune.base import finetune_base
from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  config = finetune_base('sd15', 512)
  # Zhang et al. 2023, sec. 3.3: half of the captions empty, so that the edges alone say enough;
  # rate 1e-5. Steps as in diffusers' examples/controlnet.
  config.settings.update({'train': 'controlnet', 'caption_dropout': 0.5})
  config.data.transforms = (
    ('random_flip', {}), ('edges', {}), ('choose_caption', {}), ('tokenize', {}),
    ('normalize', {}),
  )
  config.settings.controlnet = ''
  config.optimizer.learning_rate = 1e-5
  config.loop.update({'total_steps': 15_000, 'checkpoint_every_steps': 1000})
  return config
