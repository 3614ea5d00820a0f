"""The quickstart, wider and longer: for a machine with more time or an accelerator."""

from diffusion_jax.configs.openmoji import quickstart
from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  config = quickstart.get_config()
  config.settings.unet.block_out_channels = (96, 160)
  config.optimizer.learning_rate = 1e-3
  config.loop.update({
    'total_steps': 2400, 'batch_size': 64, 'ema_halflife_images': 5_000.0,
    'checkpoint_every_steps': 200, 'sample_every_steps': 400, 'evaluate_samples': 379,
  })
  return config
