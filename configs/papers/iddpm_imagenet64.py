"""Improved DDPM on ImageNet at 64 x 64 (Nichol & Dhariwal 2021): 121 million parameters.

4000 steps of the cosine schedule, a learned variance by the hybrid loss; three residual blocks at
each of four resolutions, four heads of attention at 16 x 16 and 8 x 8, the time scales and shifts
norms; Adam at 1e-4, batches of 128, 1.5 million steps, as in the released code.
"""

from diffusion_jax.configs.papers.base import levels, pixels_base
from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  config = pixels_base('folder:data/imagenet64', 64, 128)
  widths = (128, 256, 384, 512)
  config.settings.denoiser.update({
    'block_out_channels': widths, 'layers_per_block': 3, 'out_channels': 6, 'norm_eps': 1e-5,
    'attention_head_dim': tuple(width // 4 for width in widths), 'downsample_padding': 1,
    'resnet_time_scale_shift': 'scale_shift', 'flip_sin_to_cos': True, 'freq_shift': 0,
    **levels(4, 2, 3),
  })
  config.settings.schedule = ConfigDict({
    'beta_schedule': 'cosine', 'beta_start': 0.0, 'beta_end': 0.999, 'num_train_timesteps': 4000,
  })
  config.settings.objective = ConfigDict({
    'prediction': 'epsilon', 'loss': 'hybrid', 'learned_variance': True, 'decoder': 'discretized',
  })
  config.settings.sample.update({'sampler': 'ddpm', 'steps': 4000})
  config.data.transforms = (('normalize', {}),)
  config.optimizer.update({'learning_rate': 1e-4, 'warmup_steps': 0, 'clip_norm': 0.0})
  config.loop.total_steps = 1_500_000
  return config
