"""NCSN: scores at geometric noise levels by score matching, annealed Langevin dynamics."""

from diffusion_jax.configs.toy import ddpm
from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  config = ddpm.get_config()
  config.settings = ConfigDict({
    'process': 'exponential', 'process_options': {'sigma_min': 0.01, 'sigma_max': 5.0},
    'objective': {'prediction': 'score', 'weighting': 'snr'},
    'sample': {'sampler': 'annealed_langevin', 'steps': 12, 'spacing': 'exponential',
               'options': {'steps': 30}},
  })
  return config
