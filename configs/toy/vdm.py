"""VDM: the continuous-time variational bound itself is trained, in bits per dimension."""

from diffusion_jax.configs.toy import ddpm
from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  config = ddpm.get_config()
  config.settings = ConfigDict({
    'process': 'log_linear', 'process_options': {'gamma_min': -8.0, 'gamma_max': 5.0},
    'objective': {'prediction': 'epsilon', 'loss': 'vdm', 'stratified': True},
    'sample': {'sampler': 'ddpm', 'steps': 100, 'spacing': 'trailing'},
  })
  return config
