"""EDM: preconditioned network, log-normal noise levels, Heun's method on Karras's grid."""

from diffusion_jax.configs.toy import ddpm
from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  config = ddpm.get_config()
  config.settings = ConfigDict({
    'process': 'karras', 'process_options': {'sigma_min': 0.002, 'sigma_max': 80.0},
    'objective': {
      'prediction': 'edm', 'weighting': 'edm', 'weighting_options': {'data_std': 1.0},
      'times': 'log_normal',
    },
    'sample': {'sampler': 'heun', 'steps': 18, 'spacing': 'karras'},
  })
  return config
