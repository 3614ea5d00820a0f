"""The quickstart, conditioned on the texts of the frozen T5 in the package (openmoji/t5).

Another one: --config.settings.conditioners.text.path=DIR, with --config.settings.unet.
cross_attention_dim at its d_model.
"""

from diffusion_jax.configs.openmoji import quickstart
from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  config = quickstart.get_config()
  # The longest caption has about so many tokens; the padding of others is masked.
  config.settings.conditioners = ConfigDict({'text': {'path': 'asset:t5-wordnet', 'length': 48}})
  config.settings.unet.cross_attention_dim = 256
  config.loop.total_steps = 1200
  return config
