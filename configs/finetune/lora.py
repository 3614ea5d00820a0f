"""LoRA on the attentions of Stable Diffusion 1's U-Net, on captioned pictures of 512 pixels."""

from diffusion_jax.configs.finetune.base import finetune_base
from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  config = finetune_base('sd15', 512)
  # diffusers' examples/text_to_image/train_text_to_image_lora: rank 4, 15,000 steps at 1e-4,
  # cosine, gradient norm up to 1, no caption dropped.
  # Other kinds of adapters: --config.settings.lora.kind=lokr, loha, oft or diag_oft.
  config.settings.lora = ConfigDict({
    'rank': 4, 'alpha': 4.0, 'targets': ('to_q', 'to_k', 'to_v', 'to_out.0'),
  })
  config.settings.update({'train': 'lora', 'caption_dropout': 0.0})
  config.optimizer.update({'learning_rate': 1e-4, 'schedule': 'cosine'})
  config.loop.total_steps = 15_000
  return config
