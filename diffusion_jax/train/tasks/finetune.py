"""Train a pretrained pipeline on: all of its denoiser, or a small part with it frozen."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar

import jax
import jax.numpy as jnp
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from PIL import Image

from diffusion_jax.config import TrainingConfig
from diffusion_jax.data.finding import Left, find_files, with_suffixes
from diffusion_jax.data.sources.folder import Alternating, open_all
from diffusion_jax.data.sources.pictures import PictureSource
from diffusion_jax.data.unreadable import Counted
from diffusion_jax.diffusion.noise import LEARNED, NoiseConfig
from diffusion_jax.errors import UserError
from diffusion_jax.files import say
from diffusion_jax.formats.networks import format_of
from diffusion_jax.formats.pipeline import is_pipeline
from diffusion_jax.limits import OneOf, Positive, Range, check_edges
from diffusion_jax.models.lora import LoRAConfig
from diffusion_jax.pipelines.architectures import ARCHITECTURES, architecture_model
from diffusion_jax.pipelines.conditioners import Context
from diffusion_jax.pipelines.directory import read_model, save_conversion
from diffusion_jax.pipelines.distilled import DistilledGuidance, Scale
from diffusion_jax.pipelines.image_conditioners import CONCATENATED
from diffusion_jax.pipelines.model import DENOISER, Diffusion
from diffusion_jax.train.tasks.diffusion import DiffusionTask
from diffusion_jax.train.tasks.diffusion_settings import SharedConfig
from diffusion_jax.train.tasks.task import Env
from diffusion_jax.train.tasks.text_training import with_texts
from diffusion_jax.train.tasks.trainable import (
  ControlNet,
  Full,
  LoRA,
  PlaceholderConfig,
  TextualInversion,
  Trainable,
)
from diffusion_jax.types import Params, Scores, Source
from diffusion_jax.viz.grids import save_png

TRAINED: dict[str, type[Trainable]] = {
  'denoiser': Full, 'lora': LoRA, 'controlnet': ControlNet, 'embeddings': TextualInversion,
}
"""Trainable parts by name."""
INPUTS = ('none', *(name for name, kind in CONCATENATED.items() if kind.fields))
"""Images that a denoiser can be taught to take with z: those that can be made of a batch."""
CONVERSIONS = ('exact', 'raw')
"""How a network begins that is to predict what it was not trained for."""
MOST_SAMPLED = 32
"""Images that are sampled at a time, at most."""
PRIOR_BATCH = 4
"""The same for those of a prior, so that 1024 pixels fit beside the weights."""


@dataclasses.dataclass(frozen=True)
class PriorConfig:
  """Prior preservation of DreamBooth (Ruiz et al. 2023, eq. 2).

  folder: pictures of the class; what is missing of `images` is sampled by the model itself, with
  `prompt`, before training. weight: of their loss. An empty folder is no prior.
  """

  folder: str = ''
  prompt: str = ''
  images: Positive = 200
  weight: Annotated[float, Range(0)] = 1.0

  def __post_init__(self):
    if self.folder and not self.prompt.strip():
      raise UserError('settings.prior needs a prompt for the class; give settings.prior.prompt.')


@dataclasses.dataclass(frozen=True, kw_only=True)
class FinetuneTaskConfig(SharedConfig):
  """model: directory of a pipeline. architecture: a name of ARCHITECTURES that it must be, or ''.

  train: all of the denoiser, LoRA adapters, a ControlNet, or the embedding of a new word. inputs:
  what the denoiser takes with z; 'inpaint' gives a plain one the channels for it. controlnet: a
  ControlNet to go on from; '' begins with the denoiser's weights. distilled_guidance: the scale
  that a distilled denoiser is told; None: the model's own, which is also for sampling.

  objective.prediction and schedule (None: the model's) may be others than the model's. conversion:
  'exact' makes the new prediction of what the network says, so that training begins with the same
  model; 'raw' reads the network's output as the new prediction, which it has yet to learn, and is
  for train 'denoiser' alone.
  """

  model: str = ''
  architecture: Annotated[str, OneOf(('', *ARCHITECTURES))] = ''
  train: Annotated[str, OneOf(TRAINED)] = 'denoiser'
  schedule: NoiseConfig | None = None
  conversion: Annotated[str, OneOf(CONVERSIONS)] = 'exact'
  inputs: Annotated[str, OneOf(INPUTS)] = 'none'
  lora: LoRAConfig = LoRAConfig()
  controlnet: str = ''
  placeholder: PlaceholderConfig = PlaceholderConfig()
  prior: PriorConfig = PriorConfig()
  distilled_guidance: Scale | None = None

  def __post_init__(self):
    super().__post_init__()
    for train, kind in TRAINED.items():
      untouched = getattr(type(self), kind.section, None)
      if kind.section and train != self.train and getattr(self, kind.section) != untouched:
        raise UserError(
          f'settings.{kind.section} has no effect on settings.train {self.train}; leave it out.'
        )
    for wrong, text in (
      (self.text_training != 'frozen' and self.train in ('controlnet', 'embeddings'),
       f'settings.text_training must be frozen with settings.train {self.train}; train one or the '
       'other.'),
      (self.train == 'controlnet' and self.inputs != 'none',
       "settings.inputs must be 'none' for a ControlNet; train one or the other."),
      (self.cache and (self.train == 'embeddings' or self.with_images),
       'settings.cache keeps latents and texts alone; switch it off for this.'),
      (self.prior.folder and self.cache,
       'settings.cache does not know whose picture is whose; switch it off.'),
      (self.prior.folder and self.with_images,
       'settings.prior is drawn from a prompt alone; leave it out for this.'),
      (self.conversion == 'raw' and self.train != 'denoiser',
       f'settings.conversion raw changes what the denoiser means, but settings.train is '
       f'{self.train}; set conversion to exact, or train to denoiser.'),
      (self.schedule is not None and self.schedule.process == LEARNED,
       'settings.schedule.process learned is of no pretrained model; choose another.'),
    ):
      if wrong:
        raise UserError(text)

  @property
  def with_images(self) -> bool:
    """True if conditioned on images, so that captions alone cannot be sampled."""
    return self.train == 'controlnet' or self.inputs != 'none'


def image_input(model: Diffusion) -> str:
  """Return the name in CONCATENATED of what a denoiser takes with z, or 'none'."""
  return next((name for name in CONCATENATED if name in model.conditioners), 'none')


def with_image_input(model: Diffusion, inputs: str) -> Diffusion:
  """Return the model with the input channels that `inputs` needs, where it has none yet."""
  found = image_input(model)
  if found == inputs:
    return model
  if found != 'none':
    known = f'set settings.inputs to {found!r}' if found in INPUTS else 'use another model'
    raise UserError(
      f'the denoiser is made for {found}, but settings.inputs is {inputs!r}; {known}.'
    )
  conditioner, _ = CONCATENATED[inputs].build({}, Context(model.space))
  config = dataclasses.replace(
    model.denoiser.config, in_channels=model.space.channels + conditioner.channels
  )
  conditioner.check(config)
  denoiser = format_of(config).network(config, compute=model.denoiser.compute)
  return model.replaced({DENOISER: denoiser}).with_conditioner(inputs, conditioner)


def upgrade_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
  """Return settings with today's name of the denoiser, of older recipes and runs."""
  return {**settings, 'train': 'denoiser'} if settings.get('train') == 'unet' else dict(settings)


class FinetuneTask(DiffusionTask):
  """Parameters are those of a `Trainable`."""

  Config = FinetuneTaskConfig
  upgrade_settings = staticmethod(upgrade_settings)
  name, title = 'finetune', 'Fine-tuned text-to-image model'
  trained: ClassVar[Mapping[str, type[Trainable]]] = TRAINED

  @classmethod
  def check_data(cls, config: TrainingConfig) -> None:
    if config.settings.prior.folder and config.data.mixture:
      raise UserError(
        'settings.prior has its own half of the examples; make its pictures a part of data.mixture '
        'instead, or leave that out.'
      )
    super().check_data(config)

  @classmethod
  def check_size(cls, config: TrainingConfig) -> None:
    path, size = config.settings.model, config.data.size
    if not path:
      raise UserError(
        'settings.model is empty; give the directory of a pretrained pipeline, such as '
        '--config.settings.model=models/stable-diffusion-v1-5.'
      )
    model = read_model(path)[0]
    if not isinstance(size, int):
      for shape in config.data.shapes:
        check_edges(shape, model.edges)
      return
    own, known = model.trained_size, getattr(model.denoiser.config, 'sample_size', None)
    wanted = own[0] if own[0] == own[1] else own
    if known and size != wanted:
      raise UserError(
        f'data.size is {size}, but {path} draws {wanted} pixels (sample_size of its denoiser is '
        f'{known}); give a height and a width for another size, or set data.size to {wanted}.'
      )
    check_edges(size, model.edges)

  @classmethod
  def build(cls, config: TrainingConfig, env: Env) -> 'FinetuneTask':
    """UserError where the model and what is to be trained do not fit together."""
    settings, dtype = config.settings, getattr(jnp, config.dtype)
    model, parts, _ = read_model(settings.model, dtype)
    model = dataclasses.replace(
      model.with_compute(attention=config.attention), size=config.data.shape
    )
    _check_model(settings, model)
    predicted = model.parameterization.name
    changed = _terms(settings, model) != (predicted, model.noise.config)
    if changed:
      model = model.in_terms(*_terms(settings, model), settings.conversion == 'exact')
    if settings.distilled_guidance is not None:
      told = DistilledGuidance(settings.distilled_guidance)
      model = model.with_conditioner(told.name, told)
    trainable = cls.trained[settings.train](settings, parts[DENOISER])
    trainable = with_texts(trainable, settings, model, parts)
    model = trainable.adapted(with_image_input(model, settings.inputs))
    # What is not trained is kept as it is computed with.
    frozen = trainable.rest(parts, dtype=dtype, mesh=env.mesh)
    task = cls(
      settings, model, frozen, env.train, env.test, config.remat, config.products, trainable
    )
    task.changed = changed
    if changed and jax.process_index() == 0:
      say(f'{settings.model} predicts {predicted}; it is converted to '
          f'{_terms(settings, model)[0]} on the schedule of this config (settings.conversion '
          f'{settings.conversion})')
    if settings.prior.folder:
      task.batch_fields += ('weight',)
    return task

  @property
  def begins_with(self) -> str:
    return self.config.model

  def more_data(self, config: TrainingConfig, env: Env) -> dict[str, Source]:
    """Prior preservation's images of the class, sampled now where they are not there yet."""
    if not self.config.prior.folder:
      return {}
    if env.synthetic:
      return {'prior': env.train}
    most = config.data.most_unreadable
    prior = sample_prior(self, env.mesh)
    return {'prior': Counted(prior, most, env.damage, 'records of the prior')}

  def examples(self, config: TrainingConfig, env: Env) -> tuple[Source, list[Callable]]:
    if 'prior' in env.more:
      both = Alternating(env.train, env.more['prior'], self.config.prior.weight)
      env = dataclasses.replace(env, train=both)
    return super().examples(config, env)

  @property
  def sample_batch(self) -> dict[str, int]:
    return {'batch_size': min(MOST_SAMPLED, len(self.config.preview_captions))}

  def export(self, directory: Path, params: Params, scores: Scores) -> None:
    """Write what was trained, in the layout of diffusers."""
    self.trainable.export(directory, params, self.config.export_dtype)
    if self.changed and is_pipeline(directory):
      save_conversion(directory, self.model, self.config.sample)


def _terms(settings: FinetuneTaskConfig, model: Diffusion) -> tuple[str, NoiseConfig]:
  """The prediction and the noise that are to be trained."""
  return settings.objective.prediction, settings.schedule or model.noise.config


def _check_model(settings: FinetuneTaskConfig, model: Diffusion) -> None:
  """Raise UserError where the model is not what the settings say."""
  path, own = settings.model, (model.parameterization.name, model.noise.config)
  if model.text is None:
    raise UserError(f'{path} reads no prompts; only models that do can be trained on.')
  if settings.conversion == 'raw' and _terms(settings, model) == own:
    raise UserError(
      f'settings.conversion is raw, but {path} predicts {own[0]!r} on this schedule already; leave '
      'it at exact, or change objective.prediction or settings.schedule.'
    )
  if settings.distilled_guidance is not None and DistilledGuidance.name not in model.conditioners:
    raise UserError(
      f'settings.distilled_guidance is {settings.distilled_guidance:g}, but the denoiser of {path} '
      'is told of none; leave it out.'
    )
  found = image_input(model)
  if settings.train != 'denoiser' and found != settings.inputs:
    raise UserError(
      f'settings.inputs is {settings.inputs!r}, but {path} is made for {found!r}; set it to that, '
      'or settings.train to denoiser, which can teach it.'
    )
  if not settings.architecture:
    return
  for role, network in architecture_model(settings.architecture).networks.items():
    same = model.networks.get(role)
    if same is None or same.shapes != network.shapes:
      raise UserError(
        f'the {role} of {path} is not that of {settings.architecture}; set settings.architecture '
        "to what it is, or to ''."
      )


def sample_prior(task: FinetuneTask, mesh: Mesh) -> PictureSource:
  """The pictures of the class, after sampling missing ones, also of an interrupted start.

  All processes sample the same and see the folder; the first writes.
  """
  prior, model = task.config.prior, task.model
  folder = Path(prior.folder)
  folder.mkdir(parents=True, exist_ok=True)
  found = {str(path.relative_to(folder)) for path in with_suffixes(find_files(folder, Left()))}
  missing = prior.images - len(found)
  if missing > 0:
    names = (f'{i:05d}.png' for i in range(prior.images + len(found)))
    free = (name for name in names if name not in found)
    params = task.beginning(mesh, jax.random.key(0))
    batches = model.generate(
      task.weights(params, task.frozen), [prior.prompt] * missing, task.config.sample, seed=1,
      first=len(found), mesh=mesh, batch_size=PRIOR_BATCH,
    )
    for name, image in zip(free, (image for batch in batches for image in batch), strict=False):
      if jax.process_index() == 0:
        save_png(Image.fromarray(image), folder / name, {'prompt': prior.prompt})
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices('prior')  # All pictures are written before any is read.
  return open_all(folder, model.trained_size, prior.prompt)
