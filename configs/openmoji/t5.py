"""The small T5 v1.1 in the package: WordNet's dictionary, and OpenMoji's captions."""

from diffusion_jax.configs.base import base
from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  config = base('t5')
  with config.unlocked():
    config.data.update({'dataset': 'wordnet', 'test_fraction': 0.02})
    config.settings = ConfigDict({
      't5': {
        'vocab_size': 4096, 'd_model': 256, 'd_kv': 64, 'd_ff': 512, 'num_layers': 4,
        'num_decoder_layers': 2, 'num_heads': 4, 'feed_forward_proj': 'gated-gelu',
      },
      'captions': 'openmoji',
      'length': 96,
      'export_dtype': 'float16',
    })
  # By the size of each parameter: T5 begins with embeddings of size 1 and queries of 0.01.
  config.optimizer.update({
    'name': 'adafactor', 'learning_rate': 2e-2, 'schedule': 'cosine', 'warmup_steps': 60,
    'weight_decay': 0.0,
  })
  config.loop.update({
    'total_steps': 1200, 'batch_size': 64, 'ema_halflife_images': 10_000.0,
    'checkpoint_every_steps': 100, 'sample_every_steps': 0, 'evaluate_every_steps': 400,
    'evaluate_samples': 1024,
  })
  return config
