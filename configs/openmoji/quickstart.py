"""Text to image on OpenMoji within minutes on two CPU cores: frozen parts, latents encoded once."""

from diffusion_jax.configs.base import base
from ml_collections import ConfigDict

CAPTIONS = (
  'grinning face', 'red heart', 'man farmer medium-light skin tone', 'cat face', 'flag of Japan',
  'woman doctor dark skin tone', 'red apple', 'thumbs up', 'blue circle', 'sun', 'tree', 'clock',
  'house', 'automobile', 'blue book', 'person running',
)


def get_config() -> ConfigDict:
  config = base('diffusion')
  config.settings = ConfigDict({
    'autoencoder': 'asset:autoencoder-openmoji-64',
    'clip': 'asset:clip-openmoji-64',
    # Folded 2 x 2, the latents are 8 x 8 x 16: a quarter of the places, the same information.
    'latent_patch_size': 2,
    'unet': {
      'sample_size': 8, 'in_channels': 16, 'out_channels': 16,
      'down_block_types': ('DownBlock2D', 'CrossAttnDownBlock2D'),
      'up_block_types': ('CrossAttnUpBlock2D', 'UpBlock2D'),
      'block_out_channels': (64, 128), 'layers_per_block': 1, 'norm_num_groups': 16,
      'cross_attention_dim': 128, 'attention_head_dim': 4, 'use_linear_projection': True,
    },
    'schedule': {'beta_schedule': 'scaled_linear', 'rescale_betas_zero_snr': True},
    'objective': {'prediction': 'v_prediction'},
    'caption_dropout': 0.1,
    'cache': True,
    'sample': {'sampler': 'dpmpp_2m', 'steps': 12, 'guidance': 2.0},
    'evaluation': {'features': (), 'metrics': ('fd', 'kid', 'clip_score', 'retrieval')},
    'preview_captions': CAPTIONS,
  })
  config.optimizer.update({
    'learning_rate': 1.5e-3, 'schedule': 'cosine', 'warmup_steps': 60, 'b2': 0.99,
    'weight_decay': 0.01,
  })
  config.loop.update({
    'total_steps': 800, 'batch_size': 32, 'ema_halflife_images': 2000.0,
    'checkpoint_every_steps': 400, 'sample_every_steps': 400, 'evaluate_samples': 128,
  })
  return config
