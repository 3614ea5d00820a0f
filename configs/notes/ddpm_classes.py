"""DDPM by class: `notes/ddpm_unconditional` with a table of OpenMoji's five groups.

The embedding of the class is added to that of the time (Dhariwal & Nichol 2021, section 3.1); the
last row of the table is that of no class, for guidance without a classifier (Ho & Salimans 2022).
"""

from diffusion_jax.configs.notes import ddpm_unconditional
from diffusion_jax.configs.openmoji.class_conditional import CLASSES
from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  config = ddpm_unconditional.get_config()
  settings = config.settings
  settings.conditioners = ConfigDict({'class': {'classes': CLASSES}})
  settings.denoiser.num_class_embeds = len(CLASSES) + 1
  settings.sample.guidance = 2.0
  settings.evaluation = ConfigDict({
    'features': ('clip:asset:clip-openmoji-64', 'classifier:asset:classifier-openmoji-64'),
    'metrics': ('fd', 'kid', 'class_accuracy'),
  })
  settings.preview_captions = CLASSES
  return config
