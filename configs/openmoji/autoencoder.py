"""The small autoencoder in the package: 64 x 64 pixels <-> latents of 8 x 8 x 4."""

from ml_collections import ConfigDict

from configs.base import base


def get_config() -> ConfigDict:
  config = base('autoencoder')
  with config.unlocked():
    config.data.transforms = (
      ('random_resized_crop', {'size': 64, 'scale': (0.7, 1.0), 'ratio': (0.8, 1.25)}),
      ('random_flip', {'keep_sided': False}),
      ('normalize', {}),
    )
    config.settings = ConfigDict({
      'autoencoder': {
        'latent_channels': 4, 'block_out_channels': (16, 32, 64, 96), 'layers_per_block': 1,
        'norm_num_groups': 8,
      },
      'kl_weight': 1e-3,
      'adversarial_weight': 0.3,
      'adversarial_start_step': 1500,
      'discriminator': {'base_channels': 16, 'n_layers': 2, 'norm_num_groups': 8},
      'lpips_weights': '', 'lpips_weight': 1.0, 'export_dtype': 'float16',
    })
  config.optimizer.update(
    {'learning_rate': 1e-3, 'warmup_steps': 200, 'b2': 0.99, 'weight_decay': 1e-4}
  )
  config.loop.update({
    'total_steps': 2000, 'batch_size': 16, 'ema_halflife_images': 2000.0,
    'checkpoint_every_steps': 250, 'sample_every_steps': 500,
  })
  return config
