"""Score-based model of the variance-exploding SDE, sampled by Euler-Maruyama in reverse."""

from diffusion_jax.configs.toy import ddpm
from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  config = ddpm.get_config()
  config.settings = ConfigDict({
    'process': 'exponential', 'process_options': {'sigma_min': 0.01, 'sigma_max': 20.0},
    'objective': {'prediction': 'score', 'weighting': 'snr'},
    'sample': {'sampler': 'euler_maruyama', 'steps': 200, 'spacing': 'trailing'},
  })
  return config
