"""Trains the denoiser of a latent diffusion model; autoencoder and text encoder stay frozen."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from diffusion_jax.data.sources import ImageSource
from diffusion_jax.diffusion.levels import TableLevels
from diffusion_jax.diffusion.schedules import ScheduleConfig
from diffusion_jax.diffusion.training import Losses, Objective, ObjectiveConfig
from diffusion_jax.errors import UserError
from diffusion_jax.evaluation.job import (
  DRAW_BATCH,
  Evaluation,
  evaluate_text_to_image,
  fresh_weights,
)
from diffusion_jax.models.unet_config import UNetConfig
from diffusion_jax.pipelines.directory import save_text_to_image
from diffusion_jax.pipelines.text_to_image import SampleConfig, TextToImage, Weights
from diffusion_jax.train.tasks.noising import NoisingTask, history_of
from diffusion_jax.train.tasks.task import Frozen, Memory, Scores
from diffusion_jax.types import Latents, Params, Text


@dataclasses.dataclass(frozen=True)
class DiffusionTaskConfig:
  """autoencoder and clip are model directories, or 'asset:NAME' for those in the package.

  caption_dropout: share of captions replaced by the null caption, for classifier-free guidance.
  latent_patch_size: p folds p x p positions of the latents into channels, so that the U-Net sees
  fewer positions. cache: encode all images and captions once before training. preview_captions:
  what the grids show over time.
  """

  autoencoder: str
  clip: str
  unet: UNetConfig = UNetConfig()
  schedule: ScheduleConfig = ScheduleConfig()
  objective: ObjectiveConfig = ObjectiveConfig()
  latent_patch_size: int = 1
  caption_dropout: float = 0.1
  cache: bool = False
  sample: SampleConfig = SampleConfig()
  preview_captions: tuple[str, ...] = ()
  export_dtype: str = 'float16'

  def __post_init__(self):
    if not 0 <= self.caption_dropout <= 1:
      raise UserError(f'task.caption_dropout is {self.caption_dropout}; give a share from 0 to 1.')
    if self.latent_patch_size < 1:
      raise UserError(f'task.latent_patch_size is {self.latent_patch_size}; give 1 or more.')
    if self.objective.data_std != 1:
      raise UserError(
        f'objective.data_std is {self.objective.data_std}, but latents are scaled to unit '
        'deviation; leave it at 1.'
      )
    wanted = self.unet.in_channels * (2 if self.objective.learned_variance else 1)
    if self.unet.out_channels != wanted:
      raise UserError(
        f'unet.out_channels is {self.unet.out_channels}, but objective.learned_variance '
        f'{self.objective.learned_variance} needs {wanted}; change one of them.'
      )
    if not self.preview_captions:
      raise UserError('task.preview_captions is empty; give at least one caption to draw.')


class DiffusionTask(NoisingTask):
  """Parameters are the U-Net's."""

  name = 'diffusion'

  def __init__(
    self, config: DiffusionTaskConfig, model: TextToImage, frozen: Frozen,
    train: ImageSource, test: ImageSource,
  ):
    config.sample.check(model.schedule, config.objective.prediction)
    self.config, self.model, self.train, self.test = config, model, train, test
    self.objective = Objective(config.objective, TableLevels(model.schedule))
    null = jax.jit(model.encode_text)(frozen['clip'], model.tokens(['']))
    self.frozen: Frozen = {**frozen, 'null_text': {'bias': np.asarray(null)[0]}}
    self.batch_fields = ('mean', 'std', 'text') if config.cache else ('image', 'tokens')
    self._evaluation: Evaluation | None = None

  def initialize(self, key: jax.Array) -> Params:
    return self.model.unet.initialize(key)

  def _encode(self, frozen: Frozen, batch: dict, key: jax.Array) -> tuple[Latents, Text]:
    """Sampled, scaled latents [b h w c] and text [b l d] of a batch, cached or not."""
    if 'mean' in batch:
      mean, std, text = batch['mean'], batch['std'], batch['text']
    else:
      mean, logvar = self.model.autoencoder.bind(frozen['autoencoder']).encode(batch['image'])
      mean, std = mean.astype(jnp.float32), jnp.exp(logvar.astype(jnp.float32) / 2)
      text = self.model.encode_text(frozen['clip'], batch['tokens'])
    z = mean + std * jax.random.normal(key, mean.shape)
    return self.model.latents(z), text

  def drop_captions(self, text: Text, null: jax.Array, key: jax.Array) -> Text:
    """Replaces a share of the texts [b l d] by the null caption's embedding [l d]."""
    drop = jax.random.bernoulli(key, self.config.caption_dropout, (text.shape[0], 1, 1))
    return jnp.where(drop, null, text)

  def losses(self, params, frozen, memory: Memory, batch, key) -> Losses:
    """Losses of each example, and the noise level it was given."""
    key_z, key_drop, key = jax.random.split(key, 3)
    x0, text = self._encode(frozen, batch, key_z)
    text = self.drop_captions(text, frozen['null_text']['bias'], key_drop)
    unet = self.model.unet.bind(params)
    return self.objective.losses(lambda x, t: unet(x, t, text), x0, key, history_of(memory))

  def loss(self, params, frozen, memory, batch, key, step) -> tuple[jax.Array, tuple]:
    return self.summary(self.losses(params, frozen, memory, batch, key), memory)

  def _weights(self, params: Params, frozen: Frozen) -> Weights:
    return Weights(params, frozen['autoencoder'], frozen['clip'])

  def preview(self, params, frozen, mesh: Mesh) -> tuple[np.ndarray, list[str]]:
    """The preview captions with the same noise every time."""
    captions = list(self.config.preview_captions)
    images = self.model.generate(
      self._weights(params, frozen), captions, self.config.sample, seed=0, mesh=mesh,
      batch_size=DRAW_BATCH,  # The evaluation's, so that both share one compiled program.
    )
    return np.concatenate(list(images)), captions

  def evaluate(self, params, frozen, mesh, *, samples: int, final: bool) -> Scores:
    """CLIP-space metrics of images drawn for the test captions."""
    if self._evaluation is None:
      self._evaluation = Evaluation.prepare(
        self.model, frozen['clip'], self.train, self.test, mesh=mesh
      )
    weights = self._weights(params, frozen)
    return evaluate_text_to_image(
      self._evaluation, weights, fresh_weights(self.model, weights, mesh) if final else None,
      self.config.sample, samples=samples, seed=0, real=final,
    )

  def export(self, directory: Path, params: Params, scores: Scores) -> None:
    """The whole model as a directory that `sample --model` reads."""
    save_text_to_image(
      directory, self.model, params, autoencoder=self.config.autoencoder, clip=self.config.clip,
      sample=self.config.sample, dtype=self.config.export_dtype,
    )
