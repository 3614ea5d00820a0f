"""Textual inversion: the embedding of a new word for what a few pictures show."""

from diffusion_jax.configs.finetune.base import finetune_base
from ml_collections import ConfigDict

# Some of the neutral captions of Gal et al. 2022.
CAPTIONS = (
  'a photo of a <concept>', 'a rendering of a <concept>', 'the photo of a <concept>',
  'a photo of the <concept>', 'a close-up photo of a <concept>', 'a photo of one <concept>',
  'a cropped photo of the <concept>', 'a good photo of a <concept>', 'a depiction of a <concept>',
)


def get_config() -> ConfigDict:
  config = finetune_base('sd15', 512)
  config.settings.placeholder = ConfigDict({
    'token': '<concept>', 'vectors': 1, 'initializer': 'object',
  })
  config.data.update({  # Few pictures: all are trained on.
    'dataset': 'folder:data/concept', 'caption': '\n'.join(CAPTIONS), 'test_fraction': 0.0,
  })
  config.settings.update({
    'train': 'embeddings', 'caption_dropout': 0.0,
    'preview_captions': ('a photo of a <concept>', 'a <concept> on the beach'),
  })
  # diffusers' examples/textual_inversion: 3,000 steps of 4 at 5e-4 for each picture of the batch.
  config.optimizer.learning_rate = 2e-3
  config.loop.update({'total_steps': 3000, 'sample_every_steps': 250})
  return config
