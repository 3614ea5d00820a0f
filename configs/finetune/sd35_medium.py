"""All of Stable Diffusion 3.5 medium's transformer on captioned pictures of 1024 pixels."""

from diffusion_jax.configs.finetune.base import finetune_base
from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  config = finetune_base('sd35_medium', 1024)
  config.dtype = 'bfloat16'
  # Parameters and optimizer state over all devices: see docs/finetuning.md for what one needs.
  config.mesh.update({'data': 1, 'fsdp': -1})
  # The times of Esser et al. 2024, sec. 3.1, on a schedule that is shifted by 3 for the size.
  config.settings.objective = ConfigDict({
    'prediction': 'flow_prediction', 'times': 'logit_normal',
  })
  config.settings.sample = ConfigDict({'sampler': 'flow_euler', 'steps': 28, 'guidance': 7.0})
  config.optimizer.learning_rate = 1e-5
  config.loop.update({
    'total_steps': 10_000, 'batch_size': 8, 'checkpoint_every_steps': 1000,
  })
  return config
