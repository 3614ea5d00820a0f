"""Score-based model of the variance-exploding SDE (Song et al. 2021, eq. 30): see `notes/score_vp`.

x stays as it is and noise is added, sigma from 0.01 to 50, evenly in ln sigma: NCSN's levels in
continuous time. 50 is the paper's for CIFAR-10, about the largest distance of two of its pictures
(Song & Ermon 2020, technique 1), so that at the end hardly anything of them can be told. The
network is given x / sqrt(1 + sigma^2) and predicts what is left of the picture beside c_skip x
(Karras et al. 2022, table 1), with the weight sigma^2 on the score's error, as in the paper. The
paper's sampler is predictor_corrector.
"""

from diffusion_jax.configs.notes import score_vp
from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  config = score_vp.get_config()
  settings = config.settings
  settings.schedule = ConfigDict({
    'process': 'exponential', 'process_options': {'sigma_min': 0.01, 'sigma_max': 50.0},
    'label': 'log_snr',
  })
  settings.objective = ConfigDict({'prediction': 'edm', 'weighting': 'snr'})
  settings.sample = ConfigDict({
    'sampler': 'predictor_corrector', 'steps': 30, 'spacing': 'trailing', 'guidance': 2.0,
  })
  return config
