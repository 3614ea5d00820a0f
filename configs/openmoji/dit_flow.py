"""A DiT of texts by rectified flow, with the compute of the quickstart's U-Net and its latents."""

from diffusion_jax.configs.base import base
from diffusion_jax.configs.openmoji.quickstart import CAPTIONS
from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  config = base('diffusion')
  config.settings = ConfigDict({
    'space': {'type': 'latents', 'autoencoder': 'asset:autoencoder-openmoji-64'},
    'clip': 'asset:clip-openmoji-64',
    'denoiser': {
      'type': 'dit', 'sample_size': 16, 'patch_size': 2, 'in_channels': 4, 'out_channels': 4,
      'num_layers': 5, 'num_attention_heads': 4, 'attention_head_dim': 32,
      'num_embeds_ada_norm': None, 'cross_attention_dim': 128,
      'positions': 'rotary', 'qk_norm': 'rms_norm', 'long_skips': True,
    },
    'schedule': {'process': 'flow'},
    'objective': {'prediction': 'flow_prediction', 'times': 'logit_normal'},
    'caption_dropout': 0.1,
    'cache': True,
    'sample': {'sampler': 'flow_heun', 'steps': 8, 'guidance': 2.0},
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
