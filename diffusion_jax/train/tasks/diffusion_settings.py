"""Settings of the tasks that train a diffusion model of images."""

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from diffusion_jax.diffusion.noise import NoiseConfig
from diffusion_jax.diffusion.objective import ObjectiveConfig
from diffusion_jax.diffusion.samplers import sampler
from diffusion_jax.errors import UserError
from diffusion_jax.formats.networks import config_of
from diffusion_jax.limits import ByType, FileDtype, Fraction, Positive
from diffusion_jax.models.unet import UNetConfig
from diffusion_jax.pipelines.rules import output_channels
from diffusion_jax.pipelines.sampling import SampleConfig
from diffusion_jax.registry import (
  CONDITIONERS,
  EXTRACTORS,
  METRICS,
  NETWORKS,
  SPACES,
  check,
  check_paths,
  load,
)
from diffusion_jax.train.tasks.text_training import TextTrainingConfig

FEATURES_KEY, METRICS_KEY = 'settings.evaluation.features', 'settings.evaluation.metrics'


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
  """Scores while training.

  features: KIND:PATH each, as for the command evaluate; () for the task's CLIP. metrics: names of
  `registry.METRICS`.
  """

  features: tuple[str, ...] = ()
  metrics: tuple[str, ...] = ('fd', 'kid', 'clip_score', 'retrieval')

  def __post_init__(self):
    check_paths(EXTRACTORS, self.features, FEATURES_KEY)
    for name in self.metrics:
      check(METRICS, name, METRICS_KEY)
    if not self.metrics:
      raise UserError(f'{METRICS_KEY} is empty; name one at least, or set loop.evaluate_samples 0.')


@dataclasses.dataclass(frozen=True)
class SharedConfig(TextTrainingConfig):
  """Settings of all tasks that train a diffusion model of images.

  clip: a CLIP with both towers, or 'asset:NAME'; it scores samples unless `evaluation` has
  features. caption_dropout: fraction of conditions replaced by the null, for classifier-free
  guidance. encoder_dropout: the same of what each text encoder gives, by itself, one fraction for
  each; () for none. preview_captions: of the sample grids. preview_sizes: (height,
  width) of those, which captions take in turn; () for that of `data.size` nearest to a square.

  cache: encode all images and captions once, into memory, or with 'disk' into files that every
  later start goes on with. cache_dir: their folder, '' for WORKDIR/cache. cache_dtype: of means and
  log-variances; cache_text_dtype: of texts. cache_views: of each picture, by random transforms.
  """

  clip: str = 'asset:clip-openmoji-64'
  objective: ObjectiveConfig = ObjectiveConfig()
  caption_dropout: Fraction = 0.1
  encoder_dropout: tuple[Fraction, ...] = ()
  cache: bool | Literal['disk'] = False
  cache_dir: str = ''
  cache_dtype: Literal['float32', 'bfloat16'] = 'float32'
  cache_text_dtype: FileDtype = 'float16'
  cache_views: Positive = 1
  sample: SampleConfig = SampleConfig()
  evaluation: EvaluationConfig = EvaluationConfig()
  preview_captions: tuple[str, ...] = ()
  preview_sizes: tuple[tuple[int, int], ...] = ()
  export_dtype: FileDtype = 'float16'

  def __post_init__(self):
    self.check_text_training(self.cache)
    sampler(self.sample.sampler, **self.sample.own_options)  # UserError for an option it has not.
    if self.objective.data_std != 1:
      raise UserError(
        f'objective.data_std is {self.objective.data_std}, but latents are scaled to unit '
        'deviation; leave it at 1.'
      )
    if self.cache_dir and self.cache != 'disk':
      raise UserError("settings.cache_dir needs settings.cache to be 'disk'; leave one out.")
    if not self.preview_captions:
      raise UserError('settings.preview_captions is empty; give at least one caption to draw.')


@dataclasses.dataclass(frozen=True, kw_only=True)
class DiffusionTaskConfig(SharedConfig):
  """A new denoiser in an existing space.

  space: a row of `registry.SPACES`. denoiser: a row of `registry.NETWORKS`. conditioners: options
  of rows of `registry.CONDITIONERS`; None: the texts of `clip`, {}: none at all.
  """

  space: Annotated[Any, ByType(SPACES, 'latents')]
  denoiser: Annotated[Any, ByType(NETWORKS, 'unet', config_of)] = UNetConfig()
  conditioners: dict[str, Any] | None = None
  schedule: NoiseConfig = NoiseConfig()

  def __post_init__(self):
    super().__post_init__()
    kinds = self._kinds()
    for name, kind in kinds.items():
      kind.check_options(self.conditioned[name])
      if not kind.fields and not kind.usual:
        raise UserError(f'settings.conditioners.{name} needs what no data set has; leave it out.')
      if self.cache and not kind.kept and not kind.usual:
        raise UserError(
          f'settings.cache keeps what follows from images and prompts, not {name}; switch it off.'
        )
    if self.text_training != 'frozen' and 'text' not in kinds:
      raise UserError(
        f'settings.text_training {self.text_training} has no effect without '
        'settings.conditioners.text; leave it out.'
      )
    taken, given = getattr(self.denoiser, 'in_channels', None), output_channels(self.denoiser)
    wanted = (taken or 0) * (2 if self.objective.learned_variance else 1)
    if taken and given != wanted and not any(kind.channels for kind in kinds.values()):
      raise UserError(
        f'denoiser.out_channels is {given}, but objective.learned_variance '
        f'{self.objective.learned_variance} needs {wanted}; change one of them.'
      )

  @property
  def conditioned(self) -> dict[str, Any]:
    """The conditioners in use, with their options."""
    return {'text': {'path': self.clip}} if self.conditioners is None else self.conditioners

  def _kinds(self) -> dict[str, Any]:
    return {name: load(CONDITIONERS, name, 'settings.conditioners') for name in self.conditioned}

  @property
  def with_images(self) -> bool:
    """True if conditioned on images, so that captions alone cannot be sampled."""
    return any(kind.about for kind in self._kinds().values())


def upgrade_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
  """Return settings as `DiffusionTaskConfig` has them, of older recipes and runs: a U-Net in the
  latents of an autoencoder, whose keys stood by themselves."""
  out = dict(settings)
  if 'unet' in out:
    out['denoiser'] = {'type': 'unet', **out.pop('unet')}
  old = {'autoencoder': 'autoencoder', 'latent_patch_size': 'patch'}
  given = {new: out.pop(name) for name, new in old.items() if name in out}
  if given:
    out['space'] = {**out.get('space', {}), **given}
  return out
