"""The simplest decoder: a network that learns to enlarge a down-sampled picture, 16 pixels to 32.

It is imagen_32.py without diffusion: the picture itself is predicted in one step, of noise that
says next to nothing of it. The least squared error is the mean of all large pictures that the small
one may be of: right where they agree, blurred where they do not. A diffusion model draws one of
them, with a larger error and edges that are sharp.
"""

from diffusion_jax.configs.notes import imagen_32
from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  config = imagen_32.get_config()
  config.settings.update({
    # Two levels, both all but noise: alpha^2 is 1e-3, then 1e-6.
    'schedule': {
      'beta_schedule': 'linear', 'beta_start': 0.999, 'beta_end': 0.999, 'num_train_timesteps': 2,
    },
    'caption_dropout': 0.0,
  })
  config.settings.conditioners.upscale.update({'beta_start': 1e-9, 'beta_end': 1e-9})  # No noise.
  config.settings.sample.update({'sampler': 'ddim', 'steps': 1, 'threshold': 'none'})
  return config
