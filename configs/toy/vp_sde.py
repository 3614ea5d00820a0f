"""Score-based model of the variance-preserving SDE, sampled along its probability-flow ODE."""

from diffusion_jax.configs.toy import ddpm
from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  config = ddpm.get_config()
  config.settings = ConfigDict({
    'process': 'linear', 'process_options': {'start': 0.1, 'end': 20.0},
    'objective': {'prediction': 'score', 'weighting': 'snr'},
    'sample': {'sampler': 'probability_flow', 'steps': 200, 'spacing': 'trailing'},
  })
  return config
