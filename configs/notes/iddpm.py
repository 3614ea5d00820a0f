"""Improved DDPM (Nichol & Dhariwal 2021): `notes/ddpm` with a learned variance, for likelihood.

  variance  the network has twice the channels; v in the second half chooses each variance between
            the two that DDPM has fixed, ln sigma_t^2 = v ln beta_t + (1 - v) ln beta~_t.
  loss      L_hybrid = L_simple + 0.001 L_vlb, where the bound trains the variance alone: its
            gradient does not reach the mean.
  betas     by a cosine (eq. 17), under which the picture fades evenly.

Fewer steps then lose little, and bits per dimension fall: `evaluate likelihood` shows the bound's
three terms and by which steps they come. With `objective.loss=bound` and
`objective.times=importance` the bound itself is trained, each step drawn in proportion to the root
of its mean squared loss.
"""

from diffusion_jax.configs.notes import ddpm
from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  config = ddpm.get_config()
  settings = config.settings
  settings.denoiser.out_channels = 6
  settings.schedule = ConfigDict({'beta_schedule': 'cosine', 'beta_start': 0.0, 'beta_end': 0.999})
  settings.objective = ConfigDict({
    'prediction': 'epsilon', 'loss': 'hybrid', 'learned_variance': True, 'decoder': 'discretized',
  })
  config.loop.total_steps = 1000
  return config
