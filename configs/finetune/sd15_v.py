"""Stable Diffusion 1 that learns to predict v down to no signal at all (zero terminal SNR)."""

from diffusion_jax.configs.finetune import sd15
from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  config = sd15.get_config()
  # Lin et al. 2024: the betas are rescaled, steps begin at the last, and guidance is rescaled.
  config.settings.update({
    'objective': {'prediction': 'v_prediction'}, 'schedule': {'rescale_betas_zero_snr': True},
    'conversion': 'exact', 'sample': {
      'sampler': 'ddim', 'steps': 50, 'spacing': 'trailing', 'guidance': 7.5,
      'guidance_rescale': 0.7,
    },
  })
  return config
