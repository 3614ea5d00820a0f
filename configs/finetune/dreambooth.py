"""DreamBooth with prior preservation: one subject in a few pictures, and pictures of its class."""

from diffusion_jax.configs.finetune.base import finetune_base
from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  config = finetune_base('sd15', 512)
  # diffusers' examples/dreambooth: all of the U-Net, 800 steps at 5e-6, 200 pictures of the class.
  # With LoRA instead: --config.settings.train=lora --config.optimizer.learning_rate=1e-4.
  config.settings.prior = ConfigDict({
    'folder': 'data/class', 'prompt': 'a photo of dog', 'images': 200, 'weight': 1.0,
  })
  config.data.update({  # Few pictures: all are trained on.
    'dataset': 'folder:data/subject', 'caption': 'a photo of sks dog', 'test_fraction': 0.0,
  })
  config.settings.update({
    'caption_dropout': 0.0,
    'preview_captions': ('a photo of sks dog', 'a photo of sks dog in a bucket', 'a photo of dog'),
  })
  config.optimizer.learning_rate = 5e-6
  config.loop.update({
    'total_steps': 800, 'batch_size': 2, 'checkpoint_every_steps': 400, 'sample_every_steps': 200,
  })
  return config
