"""Trains a pretrained pipeline on: all of its U-Net, or a small part beside it."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from diffusion_jax.config import TrainingConfig
from diffusion_jax.data.sources.folder import Together
from diffusion_jax.data.unreadable import Counted, some
from diffusion_jax.errors import UserError
from diffusion_jax.formats.networks import Part
from diffusion_jax.limits import OneOf
from diffusion_jax.models.lora import LoRAConfig
from diffusion_jax.models.network import Network
from diffusion_jax.models.unet import UNet
from diffusion_jax.pipelines.architectures import ARCHITECTURES, architecture_model
from diffusion_jax.pipelines.conditioners import CONCATENATED
from diffusion_jax.pipelines.conditions import Inputs
from diffusion_jax.pipelines.directory import read_model
from diffusion_jax.pipelines.model import DENOISER, Diffusion
from diffusion_jax.train.tasks.diffusion import DiffusionTask, LatentTaskConfig
from diffusion_jax.train.tasks.prior_preservation import PriorConfig, draw_prior
from diffusion_jax.train.tasks.task import Env, Frozen
from diffusion_jax.train.tasks.trainable import (
  ControlNet,
  Full,
  LoRA,
  PlaceholderConfig,
  TextualInversion,
  Trainable,
)
from diffusion_jax.types import Params, Scores, Source, Weights

TRAINED = {'unet': '', 'lora': 'lora', 'controlnet': 'controlnet', 'embeddings': 'placeholder'}
"""What can be trained, and the section of the settings that speaks of that alone."""

MOST_SAMPLED = 32
"""Images that are sampled at a time, at most."""

INPUTS = ('none', *(name for name, kind in CONCATENATED.items() if kind.fields))
"""Pictures that a denoiser can be taught to take beside z: those that can be made of a batch."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class FinetuneTaskConfig(LatentTaskConfig):
  """model: directory of a pipeline. architecture: a name of ARCHITECTURES that it must be, or ''.

  train: all of the U-Net, LoRA adapters, a ControlNet, or the embedding of a new word. inputs: what
  the U-Net is shown beside the latents; 'inpaint' gives a plain U-Net the channels for it.
  controlnet: a ControlNet to go on from; '' begins with the U-Net's weights.
  """

  model: str = ''
  architecture: Annotated[str, OneOf(('', *ARCHITECTURES))] = ''
  train: Annotated[str, OneOf(TRAINED)] = 'unet'
  inputs: Annotated[str, OneOf(INPUTS)] = 'none'
  lora: LoRAConfig = LoRAConfig()
  controlnet: str = ''
  placeholder: PlaceholderConfig = PlaceholderConfig()
  prior: PriorConfig = PriorConfig()

  def __post_init__(self):
    super().__post_init__()
    for train, section in TRAINED.items():
      untouched = getattr(type(self), section, None)
      if section and train != self.train and getattr(self, section) != untouched:
        raise UserError(
          f'settings.{section} has no effect on settings.train {self.train}; leave it out.'
        )
    if self.train == 'controlnet' and self.inputs != 'none':
      raise UserError("settings.inputs must be 'none' for a ControlNet; train one or the other.")
    if self.cache and (self.train == 'embeddings' or self.pictured):
      raise UserError('settings.cache keeps latents and texts alone; switch it off for this.')
    if self.prior.folder and self.cache:
      raise UserError('settings.cache does not know whose picture is whose; switch it off.')
    if self.prior.folder and self.pictured:
      raise UserError('settings.prior is drawn from a prompt alone; leave it out for this.')

  @property
  def pictured(self) -> bool:
    """Whether the model is told a picture beside the caption."""
    return self.train == 'controlnet' or self.inputs != 'none'

  def check_scored(self) -> None:
    """Raises a UserError for a model that cannot be scored by its captions."""
    if self.pictured:
      raise UserError('scores need a model that is told the caption alone; set evaluate_samples 0.')


def make_trainable(config: FinetuneTaskConfig, part: Part | None = None) -> Trainable:
  """What the config trains; `part` is the pretrained U-Net, needed to `start`."""
  if config.train == 'lora':
    return LoRA(config.lora)
  if config.train == 'controlnet':
    return ControlNet(config.controlnet, part)
  if config.train == 'embeddings':
    return TextualInversion(config.placeholder)
  return Full(config.model, part)


def picture_of(model: Diffusion) -> str:
  """The name in CONCATENATED of the picture that a model takes beside z, or 'none'."""
  return next((name for name in CONCATENATED if name in model.conditioners), 'none')


def with_picture(model: Diffusion, inputs: str) -> Diffusion:
  """The model with the input channels that `inputs` needs, where it has none yet."""
  found = picture_of(model)
  if found == inputs:
    return model
  if found != 'none':
    known = f'set settings.inputs to {found!r}' if found in INPUTS else 'use another model'
    raise UserError(
      f'the denoiser is made for {found}, but settings.inputs is {inputs!r}; {known}.'
    )
  picture = CONCATENATED[inputs](model.space)
  channels = model.space.channels + picture.channels(model.space)
  config = dataclasses.replace(model.denoiser.config, in_channels=channels)
  denoiser = Network.of(UNet, config, model.denoiser.compute)
  return model.replaced({DENOISER: denoiser}).with_conditioner(inputs, picture)


def abstract_parameters(config: FinetuneTaskConfig) -> Params:
  """Shapes of what a recipe trains, at the size of its architecture; nothing is read or made."""
  model = with_picture(architecture_model(config.architecture), config.inputs)
  trainable = make_trainable(config)
  trainable.adapted(model)
  return trainable.shapes


class FinetuneTask(DiffusionTask):
  """Parameters are those of a `Trainable`."""

  Config = FinetuneTaskConfig
  as_today = staticmethod(dict)
  name, title = 'finetune', 'Fine-tuned text-to-image model'

  @classmethod
  def check_size(cls, config: TrainingConfig) -> None:
    settings, size = config.settings, config.data.size
    if not settings.model:
      return  # Which says more when it is opened.
    model = read_model(settings.model)[0]
    if (size, size) != model.trained_size:
      edge = max(model.trained_size)
      raise UserError(
        f'data.size is {size}, but {settings.model} draws {edge} pixels (sample_size of its '
        f'denoiser is {model.denoiser.config.sample_size}); set data.size to {edge}.'
      )

  @classmethod
  def build(cls, config: TrainingConfig, env: Env) -> 'FinetuneTask':
    if config.loop.evaluate_samples:
      config.settings.check_scored()
    return make_finetune_task(
      config.settings, env.train, env.test, env.mesh, getattr(jnp, config.dtype), config.remat,
      config.attention, config.products,
    )

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
    prior = draw_prior(self, env.mesh)
    return {'prior': Counted(prior, most, env.damage, 'records of the prior')}

  def examples(self, config: TrainingConfig, env: Env) -> tuple[Source, list[Callable]]:
    if 'prior' in env.more:
      both = Together(env.train, env.more['prior'], self.config.prior.weight)
      env = dataclasses.replace(env, train=both)
    return super().examples(config, env)

  def __init__(
    self, config: FinetuneTaskConfig, trainable: Trainable, model: Diffusion, frozen: Frozen,
    train: Sequence, test: Sequence, remat: str = 'none', products: str = 'plain',
  ):
    super().__init__(config, model, frozen, train, test, remat, products)
    self.trainable = trainable
    if config.prior.folder:
      self.batch_fields = (*self.batch_fields, 'weight')

  def initialize(self, key: jax.Array) -> Params:
    return self.trainable.initialize(key)

  def start(self, mesh: Mesh) -> Params | None:
    return self.trainable.start(self.frozen, mesh)

  def weights(self, params: Params, frozen: Frozen) -> Weights:
    return self.trainable.weights(params, frozen)

  @property
  def sample_batch(self) -> dict[str, int]:
    return {'batch_size': min(MOST_SAMPLED, len(self.config.preview_captions))}

  def preview_inputs(self) -> Inputs:
    """Pictures of the test split: their edges, or themselves with the middle to be painted."""
    if not self.config.pictured:
      return Inputs()
    count = len(self.config.preview_captions)
    records = some(self.test, count)
    images = np.stack([records[i % len(records)]['image'] for i in range(count)])
    shown = [conditioner.examples(images) for conditioner in self.model.conditioners.values()]
    return Inputs(**{name: array for one in shown for name, array in one.items()})

  def preview(self, mesh: Mesh) -> Any:
    about = next((c.shows for c in self.model.conditioners.values() if c.shows), '')
    known = {'inputs': self.preview_inputs, 'about': about} if about else {}
    return dataclasses.replace(super().preview(mesh), **known)

  def evaluators(self, mesh: Mesh) -> list[Any]:
    return [self.preview(mesh)] if self.config.pictured else super().evaluators(mesh)

  def export(self, directory: Path, params: Params, scores: Scores) -> None:
    """What was trained, in the layout of diffusers."""
    self.trainable.export(directory, params, self.config.export_dtype)


def make_finetune_task(
  config: FinetuneTaskConfig, train, test, mesh: Mesh, dtype, remat: str = 'none',
  attention: str = 'auto', products: str = 'plain',
) -> FinetuneTask:
  """The task with its frozen networks on the mesh. UserError where something does not fit."""
  if not config.model:
    raise UserError(
      'settings.model is empty; give the directory of a pretrained pipeline, such as '
      '--config.settings.model=models/stable-diffusion-v1-5.'
    )
  model, parts, _ = read_model(config.model, dtype)
  model = model.with_attention(attention)
  if model.text is None:
    raise UserError(f'{config.model} reads no prompts; only models that do can be trained on.')
  if config.objective.prediction != model.parameterization.name:
    raise UserError(
      f'objective.prediction is {config.objective.prediction!r}, but {config.model} predicts '
      f'{model.parameterization.name!r}; set it to that.'
    )
  if config.architecture:
    _check_architecture(config, model)
  trainable = make_trainable(config, parts[DENOISER])
  if config.train != 'unet' and picture_of(model) != config.inputs:
    raise UserError(
      f'settings.inputs is {config.inputs!r}, but {config.model} is made for '
      f'{picture_of(model)!r}; set it to that, or settings.train to unet, which can teach it.'
    )
  model = trainable.adapted(with_picture(model, config.inputs))
  if config.train == 'unet':
    del parts[DENOISER]
  # What is not trained is kept as it is computed with.
  frozen = {role: part.load(dtype=dtype, mesh=mesh) for role, part in parts.items()}
  return FinetuneTask(config, trainable, model, frozen, train, test, remat, products)


def _check_architecture(config: FinetuneTaskConfig, model: Diffusion) -> None:
  wanted = architecture_model(config.architecture)
  for role, network in wanted.networks.items():
    found = model.networks.get(role)
    if found is None or found.shapes != network.shapes:
      raise UserError(
        f"the {role} of {config.model} is not that of {config.architecture}; set "
        "settings.architecture to what it is, or to ''."
      )

