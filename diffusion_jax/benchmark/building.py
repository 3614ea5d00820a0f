"""What a config trains, without what a run does beside training."""

from typing import Any

from diffusion_jax.build import build
from diffusion_jax.train.training import Training

SILENT = {'evaluate_every_steps': 0, 'evaluate_samples': 0, 'keep_best': '', 'wandb_project': ''}


def built(config: dict[str, Any], workdir: str, synthetic: bool) -> Training:
  """As `build`, of a resolved config; networks that only score the model are not loaded."""
  return build({**config, 'loop': {**config['loop'], **SILENT}}, workdir, synthetic)
