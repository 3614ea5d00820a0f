"""Train a KL autoencoder as a generative model, scored by what it draws and by its likelihood."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any

from jax.sharding import Mesh

from diffusion_jax.config import TrainingConfig
from diffusion_jax.limits import Range
from diffusion_jax.pipelines.spaces import AUTOENCODER
from diffusion_jax.pipelines.vae import VAE, VAESampleConfig
from diffusion_jax.registry import EVALUATORS, load
from diffusion_jax.train.bottlenecks.kl import KL
from diffusion_jax.train.tasks.autoencoder import AutoencoderTask, AutoencoderTaskConfig
from diffusion_jax.train.tasks.diffusion_settings import EvaluationConfig
from diffusion_jax.train.tasks.task import Env, Frozen
from diffusion_jax.types import Params, Weights


@dataclasses.dataclass(frozen=True)
class VAETaskConfig(AutoencoderTaskConfig):
  """The loss is the evidence lower bound per pixel value, but for a constant, where reconstruction
  is gaussian and bottleneck.weight the number of latent values for each pixel value.

  clip: of the features, if evaluation names none.
  """

  bottleneck: KL = KL()
  adversarial_weight: Annotated[float, Range(0)] = 0.0
  sample: VAESampleConfig = VAESampleConfig()
  evaluation: EvaluationConfig = EvaluationConfig(metrics=('fd', 'kid'))
  clip: str = 'asset:clip-openmoji-64'
  previews: Annotated[int, Range(1, 256)] = 16


class VAETask(AutoencoderTask):
  """As `AutoencoderTask`; its directory is drawn from as any other model's."""

  Config = VAETaskConfig
  name = 'vae'
  captioned = True

  @classmethod
  def build(cls, config: TrainingConfig, env: Env) -> VAETask:
    task = super().build(config, env)
    task.train, task.model = env.train, VAE(task.autoencoder, config.data.shape)
    return task

  def weights(self, params: Params, frozen: Frozen) -> Weights:
    return {AUTOENCODER: super().weights(params, frozen)}

  def evaluators(self, mesh: Mesh) -> list[Any]:
    config = self.config
    features = config.evaluation.features or (f'clip:{config.clip}',)
    preview = load(EVALUATORS, 'caption_preview')(
      ('',) * config.previews, config.sample, mesh, about='Drawn from the same latents each time.'
    )
    return [
      preview, load(EVALUATORS, 'elbo')(train=self.train, test=self.test, mesh=mesh, draws=8),
      load(EVALUATORS, 'generated_images')(
        features, config.evaluation.metrics, config.sample, self.train, self.test, mesh
      ),
    ]
