"""LoRA on the attentions of Stable Diffusion 3.5 medium, on captioned pictures of 1024 pixels."""

from diffusion_jax.configs.finetune import sd35_medium
from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  config = sd35_medium.get_config()
  # diffusers' examples/dreambooth/train_dreambooth_lora_sd3: rank 4, both streams' attentions.
  config.settings.lora = ConfigDict({'rank': 4, 'alpha': 4.0, 'targets': (
    'to_q', 'to_k', 'to_v', 'to_out.0', 'add_q_proj', 'add_k_proj', 'add_v_proj', 'to_add_out',
  )})
  config.settings.update({'train': 'lora', 'caption_dropout': 0.0})
  config.optimizer.update({'learning_rate': 1e-4, 'schedule': 'cosine'})
  config.loop.update({'total_steps': 2000, 'batch_size': 4, 'checkpoint_every_steps': 500})
  return config
