"""The decoder of DALL-E 2 (Ramesh et al. 2022, section 2.1): pictures of CLIP's embedding of one.

A diffusion model of 32 x 32 pixels that is conditioned on the embedding of the very picture it is
to draw, a tenth of the time on none, for guidance. It makes variations of a given picture
(`--reference FILE`, section 3.1), which keep what CLIP sees and change what it does not; and it
draws what the prior of `dalle2_prior` says.

The paper: 3.5 billion parameters at 64 x 64 pixels, then two enlargements to 1024; the embedding is
added to the time's and becomes four tokens beside the text's, of which it finds little use. Here it
is the embedding alone, and one size.
"""

from diffusion_jax.configs.base import base
from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  config = base('diffusion')
  config.data.size = 32
  config.data.transforms = (('random_flip', {'keep_sided': False}), ('normalize', {}))
  config.settings = ConfigDict({
    'space': {'type': 'pixels', 'patch': 4},
    'conditioners': {'image_embedding': {'path': 'asset:clip-openmoji-64'}},
    'denoiser': {
      'type': 'unet', 'sample_size': 8, 'in_channels': 48, 'out_channels': 48,
      'block_out_channels': (96, 128), 'layers_per_block': 1, 'norm_num_groups': 16,
      'down_block_types': ('CrossAttnDownBlock2D', 'CrossAttnDownBlock2D'),
      'up_block_types': ('CrossAttnUpBlock2D', 'CrossAttnUpBlock2D'),
      'cross_attention_dim': 128, 'attention_head_dim': 4, 'use_linear_projection': True,
    },
    'schedule': {'beta_schedule': 'squaredcos_cap_v2'},
    'objective': {'prediction': 'v_prediction'},
    'sample': {'sampler': 'ddim', 'steps': 25, 'guidance': 2.0},
    'preview_captions': tuple(map(str, range(16))),
  })
  config.optimizer.update({
    'learning_rate': 1e-3, 'schedule': 'cosine', 'warmup_steps': 60, 'b2': 0.99,
    'weight_decay': 0.01,
  })
  config.loop.update({
    'total_steps': 2000, 'batch_size': 32, 'ema_halflife_images': 4000.0,
    'checkpoint_every_steps': 500, 'sample_every_steps': 1000, 'evaluate_samples': 0,
  })
  return config
