"""Imagen's first super-resolution model: 16 pixels to 32 (Saharia et al. 2022, sections 2.4, 2.5).

A diffusion model of the large picture that is shown the small one. What it is shown while sampling
is drawn, not real, so in training the small picture gets noise of a random level, the level is told
to the network, and a level is chosen when sampling (`--noise_level`). The small picture stands in
three channels beside z, and 2 x 2 pixels of the large one in each of z's places, which are so as
many as the small picture's pixels.

The efficient U-Net (appendix B) moves compute to few places: it halves them before convolutions,
and has most blocks where places are fewest. Here folding does the first, `layers_per_block` the
second.
In the paper: 600 million parameters for 64 to 256, 400 million for 256 to 1024.
"""

from diffusion_jax.configs.notes import imagen_base
from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  config = imagen_base.get_config()
  config.data.size = 32
  config.data.transforms = (('choose_caption', {}), ('tokenize', {}), ('normalize', {}))
  config.settings.conditioners.upscale = {
    'beta_schedule': 'linear', 'beta_start': 1e-4, 'beta_end': 0.02,
  }
  config.settings.space = ConfigDict({'type': 'pixels', 'patch': 2})
  config.settings.denoiser = ConfigDict({
    'type': 'unet', 'sample_size': 16, 'in_channels': 15, 'out_channels': 12,
    'down_block_types': ('DownBlock2D', 'CrossAttnDownBlock2D'),
    'up_block_types': ('CrossAttnUpBlock2D', 'UpBlock2D'),
    'block_out_channels': (48, 96), 'layers_per_block': (1, 2), 'norm_num_groups': 16,
    'num_class_embeds': 351,
    'cross_attention_dim': 256, 'attention_head_dim': 4, 'use_linear_projection': True,
  })
  # After minutes of training, what it cannot tell is blur then; with velocities it was noise.
  config.settings.objective = ConfigDict({'prediction': 'sample'})
  config.settings.cache = False
  config.settings.sample.update({'steps': 12, 'guidance': 1.0})
  config.loop.update({'total_steps': 1200, 'evaluate_samples': 0, 'batch_size': 16})
  return config
