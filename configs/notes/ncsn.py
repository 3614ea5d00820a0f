"""Noise conditional score networks (Song & Ermon 2019), sampled by annealed Langevin dynamics.

Where there are no data a score cannot be learned, and Langevin dynamics goes nowhere. So noise is
added at geometric levels, and one network learns the score of all of them,
E |sigma s(x + sigma z, sigma) + z|^2 (eq. 5 and 6 with lambda = sigma^2). Sampling begins at the
largest and at each level takes steps x += a score / 2 + sqrt(a) z with a in proportion to sigma^2
(algorithm 1), then a denoising step (Jolicoeur-Martineau et al. 2021).

The network is that of `notes/score_ve`, and is trained at all levels between the ends, of which
twelve are visited. The paper has ten, from 1 to 0.01, and takes 100 steps at each, as the sampler
does by itself.
"""

from diffusion_jax.configs.notes import score_ve
from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  config = score_ve.get_config()
  config.settings.sample = ConfigDict({
    'sampler': 'annealed_langevin', 'steps': 12, 'spacing': 'exponential', 'guidance': 2.0,
    'options': {'steps': 5},
  })
  return config
