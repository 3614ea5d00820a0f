"""VDM whose noise schedule is learned beside the network, so that the bound varies least."""

from diffusion_jax.configs.toy import vdm
from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  config = vdm.get_config()
  config.settings.process = 'learned'
  return config
