"""Score-based model of the sub-VP SDE (Song et al. 2021, eq. 27 and 29): see `notes/score_vp`.

alpha is that of the VP SDE and sigma = 1 - alpha^2, at most as large as there. It is sampled along
the probability flow, by Heun's method.
"""

from diffusion_jax.configs.notes import score_vp
from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  config = score_vp.get_config()
  config.settings.schedule.sub_vp = True
  config.settings.sample = ConfigDict({'sampler': 'heun', 'steps': 20, 'guidance': 2.0})
  return config
