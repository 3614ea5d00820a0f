"""Consistency distillation with guidance inside (Luo et al. 2023): four steps, two, or one.

A consistency function f(x, t) leads from any point of the teacher's path to its end (Song et al.
2023). Two neighbouring points of one path, the second made of the first by a step of the teacher,
must have the same end; at no noise f is the identity. Here the teacher is the package's model with
classifier-free guidance, its path a DDIM of 16 steps, and the student, the same U-Net, is told the
scale by its time embedding ("w-embedding"), drawn from 1 to 4 in training. To sample it runs
without guidance: one call a step, where the teacher needs two.

  python -m diffusion_jax sample --workdir runs/notes/lcm --prompt 'red heart' --steps 1 --out drawn

and with another scale by `--distilled_guidance 3`.

The papers: CIFAR-10 FID 3.55 in one step, 2.93 in two (Song et al. 2023, table 1).
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
    'distill': {'method': 'consistency', 'steps': 16, 'guidance': (1.0, 4.0)},
    'cache': True,
    'sample': {'sampler': 'lcm', 'steps': 4, 'guidance': 1.0},
    'evaluation': {'features': (), 'metrics': ('fd', 'kid', 'clip_score', 'retrieval')},
    'preview_captions': CAPTIONS,
  })
  config.optimizer.update({
    'learning_rate': 0.0003, 'schedule': 'cosine', 'warmup_steps': 30, 'b2': 0.99,
  })
  config.loop.update({
    'total_steps': 600, 'batch_size': 32, 'ema_halflife_images': 1000.0,
    'checkpoint_every_steps': 200, 'sample_every_steps': 200, 'evaluate_samples': 128,
  })
  return config
