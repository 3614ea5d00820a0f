"""Rectified flow: the velocity of straight paths, logit-normal times, Heun's method."""

from diffusion_jax.configs.toy import ddpm
from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  config = ddpm.get_config()
  config.settings = ConfigDict({
    'process': 'flow',
    'objective': {'prediction': 'flow_prediction', 'times': 'logit_normal'},
    'sample': {'sampler': 'flow_heun', 'steps': 25, 'spacing': 'trailing'},
  })
  return config
