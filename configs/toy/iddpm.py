"""Improved DDPM: a learned variance by the hybrid loss, timesteps drawn by their loss."""

from ml_collections import ConfigDict

from configs.toy import ddpm


def get_config() -> ConfigDict:
  config = ddpm.get_config()
  with config.unlocked():
    config.settings.objective = ConfigDict({
      'prediction': 'epsilon', 'loss': 'hybrid', 'learned_variance': True, 'times': 'importance',
    })
  return config
