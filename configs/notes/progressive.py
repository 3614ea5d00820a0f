"""Progressive distillation (Salimans & Ho 2022): each round halves the steps of DDIM.

Two steps of the teacher end where one of the student must: the target is the x_0 whose single step
of DDIM leads there, weighted by the truncated signal-to-noise ratio, max(alpha^2 / sigma^2, 1).
The first round takes the package's model, guided by 2, from 8 steps to 4; each later one takes the
round before it as its teacher:

  python -m benchmarks.notes run progressive progressive2 progressive1

The paper: CIFAR-10 FID 3.00 in four steps, 4.51 in two, 9.12 in one (table 2).
"""

from diffusion_jax.configs.base import base
from diffusion_jax.configs.openmoji.quickstart import CAPTIONS
from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  config = base('distillation')
  config.settings = ConfigDict({
    'model': 'asset:text-to-image-openmoji-64',
    'clip': 'asset:clip-openmoji-64',
    'objective': {'prediction': 'v_prediction'},
    'distill': {'method': 'progressive', 'steps': 4, 'guidance': (2.0, 2.0)},
    'cache': True,
    'sample': {'sampler': 'ddim', 'steps': 4, 'guidance': 1.0},
    'evaluation': {'features': (), 'metrics': ('fd', 'kid', 'clip_score', 'retrieval')},
    'preview_captions': CAPTIONS,
  })
  config.optimizer.update({
    'learning_rate': 0.0003, 'schedule': 'cosine', 'warmup_steps': 30, 'b2': 0.99,
  })
  config.loop.update({
    'total_steps': 400, 'batch_size': 32, 'ema_halflife_images': 1000.0,
    'checkpoint_every_steps': 200, 'sample_every_steps': 200, 'evaluate_samples': 128,
  })
  return config
