"""What the recipes for fine-tuning share: captioned pictures, and AdamW as diffusers has it."""

from diffusion_jax.configs.base import base
from ml_collections import ConfigDict

PROMPTS = ('a photo of a red apple on a table', 'a castle by the sea, oil painting')


def finetune_base(architecture: str, size: int) -> ConfigDict:
  """`model` and `dataset` are for the user to give; a folder's captions are beside its pictures."""
  config = base('finetune')
  config.data.update({
    'dataset': 'folder:data/pictures', 'size': size,
    'transforms': (
      ('random_flip', {}), ('choose_caption', {}), ('tokenize', {}), ('normalize', {}),
    ),
  })
  config.settings = ConfigDict({
    'model': '', 'architecture': architecture, 'train': 'denoiser', 'inputs': 'none',
    'objective': {'prediction': 'epsilon'}, 'caption_dropout': 0.1, 'cache': False,
    'sample': {'sampler': 'dpmpp_2m', 'steps': 25, 'guidance': 7.5},
    'evaluation': {'features': (), 'metrics': ('fd', 'kid', 'clip_score', 'retrieval')},
    'preview_captions': PROMPTS, 'export_dtype': 'float16',
  })
  config.loop.update({
    'batch_size': 4, 'checkpoint_every_steps': 500, 'sample_every_steps': 500,
    'evaluate_samples': 0,
  })
  return config
