"""The quickstart, wider and longer: for a machine with more time or an accelerator."""

from ml_collections import ConfigDict

from configs.openmoji import quickstart


def get_config() -> ConfigDict:
  config = quickstart.get_config()
  config.settings.unet.block_out_channels = (48, 96, 160)
  config.loop.update({
    'total_steps': 4000, 'batch_size': 64, 'ema_halflife_images': 10_000.0,
    'checkpoint_every_steps': 500, 'sample_every_steps': 1000, 'evaluate_samples': 379,
  })
  return config
