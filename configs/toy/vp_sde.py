"""Score-based model of the variance-preserving SDE, sampled by Euler-Maruyama in reverse."""

from ml_collections import ConfigDict

from configs.toy import ddpm


def get_config() -> ConfigDict:
  config = ddpm.get_config()
  with config.unlocked():
    config.settings = ConfigDict({
      'process': 'linear', 'process_options': {'start': 0.1, 'end': 20.0},
      'objective': {'prediction': 'score', 'weighting': 'snr'},
      'sample': {'sampler': 'euler_maruyama', 'steps': 200, 'spacing': 'trailing'},
    })
  return config
