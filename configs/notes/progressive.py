"""Progressive distillation (Salimans & Ho 2022): each round halves the steps of DDIM.

Two steps of the teacher end where one of the student must: the target is the x_0 whose single step
of DDIM leads there, weighted by the truncated signal-to-noise ratio, max(alpha^2 / sigma^2, 1).
The first round takes the package's model, guided by 2, from 8 steps to 4; each later one takes the
round before it as its teacher:

  python -m benchmarks.notes run progressive progressive2 progressive1

The paper: CIFAR-10 FID 3.00 in four steps, 4.51 in two, 9.12 in one (table 2).
"""

from diffusion_jax.configs.notes import lcm
from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  config = lcm.get_config()
  config.settings.distill = ConfigDict({
    'method': 'progressive', 'steps': 4, 'guidance': (2.0, 2.0),
  })
  config.settings.sample.sampler = 'ddim'
  config.loop.total_steps = 400
  return config
