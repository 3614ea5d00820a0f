"""DDPM on points in the plane: a table of 100 timesteps, epsilon, ancestral sampling."""

from diffusion_jax.configs.base import base
from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  config = base('toy')
  config.settings = ConfigDict({
    'process': 'table',
    'schedule': {'beta_schedule': 'linear', 'beta_start': 1e-3, 'beta_end': 0.1,
                 'num_train_timesteps': 100},
    'objective': {'prediction': 'epsilon'},
    'sample': {'sampler': 'ddpm', 'steps': 100},
  })
  config.data.update({'dataset': 'moons', 'size': 64})
  config.optimizer.update(
    {'learning_rate': 2e-3, 'schedule': 'cosine', 'warmup_steps': 50, 'b2': 0.99}
  )
  config.loop.update({
    'total_steps': 1000, 'batch_size': 8, 'ema_halflife_images': 800.0, 'log_every_steps': 100,
    'checkpoint_every_steps': 1000, 'sample_every_steps': 0, 'evaluate_samples': 1024,
  })
  return config
