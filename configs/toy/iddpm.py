"""Improved DDPM: a learned variance by the hybrid loss, timesteps drawn by their loss."""

from diffusion_jax.configs.toy import ddpm
from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  config = ddpm.get_config()
  config.settings.objective = ConfigDict({
    'prediction': 'epsilon', 'loss': 'hybrid', 'learned_variance': True, 'times': 'importance',
  })
  return config
