"""Mean flow (Geng et al. 2025): a network that gives the mean velocity between two times.

A flow model says how x moves at a moment, so a step must be short. The mean velocity u from r to t
takes x from one to the other at once, and obeys u = v - (t - r) du/dt, by which it is trained, with
the derivative along the path. The student is the DiT of `configs/openmoji/dit_flow.py`, told t - r
besides t, and begins as that model; v is its teacher's, guided by 2. One step draws:

  python -m benchmarks.notes run latent_diffusion
  python -m diffusion_jax train --config configs/notes/mean_flow.py --workdir runs/notes/mean_flow
  python -m diffusion_jax sample --workdir runs/notes/mean_flow --prompt 'red heart' --out drawn

The paper: ImageNet 256 FID 3.43 in one step, 2.93 in two (MeanFlow-XL/2, table 2).
"""

from diffusion_jax.configs.notes import lcm
from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  config = lcm.get_config()
  config.settings.model = 'runs/notes/latent_diffusion/model'
  config.settings.objective.prediction = 'flow_prediction'
  config.settings.distill = ConfigDict({'method': 'mean_flow', 'guidance': (2.0, 2.0)})
  config.settings.sample.update({'sampler': 'flow_euler', 'steps': 1})
  config.optimizer.learning_rate = 0.0005
  return config
