"""The decoder of DALL-E 2 (Ramesh et al. 2022, section 2.1): pictures of CLIP's embedding of one.

A diffusion model of 32 x 32 pixels that is conditioned on the embedding of the very picture it is
to draw, a tenth of the time on none, for guidance. It makes variations of a given picture
(`--reference FILE`, section 3.1), which keep what CLIP sees and change what it does not; and it
draws what the prior of `dalle2_prior` says.

The paper: 3.5 billion parameters at 64 x 64 pixels, then two enlargements to 1024; the embedding is
added to the time's and becomes four tokens beside the text's, of which it finds little use. Here it
is the embedding alone, and one size.
"""

from diffusion_jax.configs.notes import ddpm
from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  config = ddpm.get_config()
  config.data.transforms = (('random_flip', {'keep_sided': False}), ('normalize', {}))
  settings = config.settings
  del settings.clip
  settings.update(ConfigDict({
    'conditioners': {'image_embedding': {'path': 'asset:clip-openmoji-64'}},
    'schedule': {'beta_schedule': 'squaredcos_cap_v2', 'beta_start': 1e-4, 'beta_end': 0.02},
    'objective': {'prediction': 'v_prediction'},
    'cache': False,
    'sample': {'sampler': 'ddim', 'steps': 25, 'guidance': 2.0},
    'preview_captions': tuple(map(str, range(16))),
  }))
  config.loop.update({'total_steps': 1200, 'evaluate_samples': 0})
  return config
