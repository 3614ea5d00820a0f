"""Stable Diffusion 1 as a rectified flow."""

from diffusion_jax.configs.finetune import sd15
from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  config = sd15.get_config()
  # Times as Stable Diffusion 3's (Esser et al. 2024, sec. 3.1).
  config.settings.update({
    'objective': {'prediction': 'flow_prediction', 'times': 'logit_normal'},
    'schedule': {'process': 'flow', 'label': 'sigma'}, 'conversion': 'exact',
    'sample': {'sampler': 'flow_euler', 'steps': 28, 'spacing': 'linspace', 'guidance': 7.5},
  })
  return config
