"""The small autoencoder in the package: 64 x 64 pixels <-> latents of 16 x 16 x 4."""

from diffusion_jax.configs.base import base
from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  config = base('autoencoder')
  config.data.transforms = (
    ('random_resized_crop', {'scale': (0.7, 1.0), 'ratio': (0.8, 1.25)}),
    ('random_flip', {'keep_sided': False}),
    ('normalize', {}),
  )
  config.settings = ConfigDict({
    'autoencoder': {
      'latent_channels': 4, 'block_out_channels': (16, 32, 64), 'layers_per_block': 1,
      'norm_num_groups': 8,
    },
    'bottleneck': {'weight': 5e-3, 'warmup_steps': 1500, 'initial_logvar': -6.0},
    'reconstruction': 'l2',
    # A PatchGAN pays after many more steps than two CPU cores make in minutes; 0.5 is usual.
    'adversarial_weight': 0.0,
    'export_dtype': 'float16',
  })
  config.optimizer.update({
    'learning_rate': 1e-3, 'schedule': 'cosine', 'warmup_steps': 100, 'b2': 0.99,
    'weight_decay': 1e-4,
  })
  config.loop.update({
    'total_steps': 1400, 'batch_size': 8, 'ema_halflife_images': 1000.0,
    'checkpoint_every_steps': 300, 'sample_every_steps': 500, 'evaluate_samples': 379,
  })
  return config
