"""The small CLIP in the package: 64 x 64 pixels and captions of up to 24 tokens."""

from diffusion_jax.configs.base import base
from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  config = base('clip')
  config.data.transforms = (
    ('random_resized_crop', {'scale': (0.6, 1.0), 'ratio': (0.8, 1.25)}),
    ('random_flip', {}),
    ('choose_caption', {}),
    ('tokenize', {}),
    ('normalize', {}),
  )
  config.settings = ConfigDict({
    'clip': {
      'text_config': {
        'vocab_size': 2048, 'hidden_size': 128, 'intermediate_size': 512,
        'num_hidden_layers': 4, 'num_attention_heads': 4, 'max_position_embeddings': 24,
      },
      'vision_config': {
        'hidden_size': 128, 'intermediate_size': 512, 'num_hidden_layers': 4,
        'num_attention_heads': 4, 'image_size': 64, 'patch_size': 8,
      },
      'projection_dim': 128,
      'logit_scale_init_value': 2.6592,
    },
    'label_smoothing': 0.05,
    'export_dtype': 'float16',
  })
  config.optimizer.update({
    'learning_rate': 1e-3, 'schedule': 'cosine', 'warmup_steps': 100, 'b2': 0.98,
    'weight_decay': 0.1,
  })
  config.loop.update({
    'total_steps': 450, 'batch_size': 128, 'ema_halflife_images': 10_000.0,
    'checkpoint_every_steps': 150, 'sample_every_steps': 225, 'evaluate_every_steps': 150,
    'evaluate_samples': 379,
  })
  return config
