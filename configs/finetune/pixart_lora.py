"""LoRA on the attentions of PixArt-sigma, on captioned pictures of 1024 pixels."""

from diffusion_jax.configs.finetune import pixart
from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  config = pixart.get_config()
  config.settings.lora = ConfigDict({
    'rank': 4, 'alpha': 4.0, 'targets': ('to_q', 'to_k', 'to_v', 'to_out.0')
  })
  config.settings.train = 'lora'
  config.optimizer.update({'learning_rate': 1e-4, 'schedule': 'cosine'})
  config.loop.update({'total_steps': 2000, 'batch_size': 4, 'checkpoint_every_steps': 500})
  return config
