"""A classifier of OpenMoji's groups (flag, people, person, body, other) at 64 pixels."""

from diffusion_jax.configs.base import base
from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  config = base('classifier')
  config.data.transforms = (
    ('random_resized_crop', {'scale': (0.6, 1.0), 'ratio': (0.8, 1.25)}),
    ('random_flip', {'keep_sided': False}),
    ('label', {}),
    ('normalize', {}),
  )
  config.settings = ConfigDict({
    'classifier': {
      'block_out_channels': (40, 80, 160), 'layers_per_block': 1, 'norm_num_groups': 8,
      'image_size': 64, 'patch_size': 4, 'class_names': (),
    },
    'label_smoothing': 0.05,
    'export_dtype': 'float16',
  })
  config.optimizer.update({
    'learning_rate': 2e-3, 'schedule': 'cosine', 'warmup_steps': 50, 'b2': 0.98,
    'weight_decay': 0.1,
  })
  config.loop.update({
    'total_steps': 400, 'batch_size': 64, 'ema_halflife_images': 4_000.0,
    'checkpoint_every_steps': 200, 'sample_every_steps': 200, 'evaluate_every_steps': 100,
    'evaluate_samples': 379,
  })
  return config
