"""A DiT of OpenMoji's groups as in Peebles & Xie 2023, with the preconditioning of EDM."""

from diffusion_jax.configs.openmoji import dit_flow
from ml_collections import ConfigDict

CLASSES = ('body', 'flag', 'other', 'people', 'person')


def get_config() -> ConfigDict:
  config = dit_flow.get_config()
  config.settings.update(ConfigDict({
    'conditioners': {'class': {'classes': CLASSES}},
    'schedule': {'process': 'karras', 'process_options': {'sigma_min': 0.002, 'sigma_max': 80.0}},
    'objective': {'prediction': 'edm', 'times': 'log_normal', 'weighting': 'edm',
                  'weighting_options': {'data_std': 1.0}},
    'sample': {'sampler': 'heun', 'steps': 12, 'spacing': 'karras', 'guidance': 2.0},
    'evaluation': {
      'features': ('clip:asset:clip-openmoji-64', 'classifier:asset:classifier-openmoji-64'),
      'metrics': ('fd', 'kid', 'class_accuracy'),
    },
    'preview_captions': CLASSES,
  }))
  config.settings.denoiser.update({
    'num_embeds_ada_norm': len(CLASSES), 'cross_attention_dim': None, 'positions': 'sincos',
    'qk_norm': None, 'long_skips': False,
  })
  return config
