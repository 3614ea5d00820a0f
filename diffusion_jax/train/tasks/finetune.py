"""Trains a pretrained pipeline on: all of its U-Net, or a small part beside it."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from PIL import Image

from diffusion_jax.data.folder import FolderSource, Together
from diffusion_jax.data.transforms import edges
from diffusion_jax.errors import UserError
from diffusion_jax.evaluation.job import DRAW_BATCH
from diffusion_jax.models.lora import LoRAConfig
from diffusion_jax.pipelines.architectures import ARCHITECTURES, architecture_model
from diffusion_jax.pipelines.conditions import Inputs, inpainting_image, kind_of_input
from diffusion_jax.pipelines.directory import load_weights, read_pipeline
from diffusion_jax.pipelines.text_to_image import TextToImage
from diffusion_jax.train.tasks.diffusion import DiffusionTask, LatentTaskConfig
from diffusion_jax.train.tasks.masks import random_masks
from diffusion_jax.train.tasks.task import Frozen, Scores
from diffusion_jax.train.tasks.trainable import (
  Adapters,
  Control,
  PlaceholderConfig,
  Trainable,
  WholeUNet,
  Words,
)
from diffusion_jax.types import Condition, Latents, Params, Weights
from diffusion_jax.viz.grids import save_png

TRAINED = ('unet', 'lora', 'controlnet', 'embeddings')
INPUTS = ('none', 'inpaint')


@dataclasses.dataclass(frozen=True)
class PriorConfig:
  """Prior preservation of DreamBooth (Ruiz et al. 2023, eq. 2).

  folder: pictures of the class; what is missing of `images` is drawn by the model itself, with
  `prompt`, before training. weight: of their loss. An empty folder is no prior.
  """

  folder: str = ''
  prompt: str = ''
  images: int = 200
  weight: float = 1.0

  def __post_init__(self):
    if self.folder and (not self.prompt.strip() or self.images < 1 or self.weight < 0):
      raise UserError(
        'settings.prior needs a prompt for the class, at least one image and a weight of 0 or more.'
      )


@dataclasses.dataclass(frozen=True, kw_only=True)
class FinetuneTaskConfig(LatentTaskConfig):
  """model: directory of a pipeline. architecture: a name of ARCHITECTURES that it must be, or ''.

  train: all of the U-Net, LoRA adapters, a ControlNet, or the embedding of a new word. inputs: what
  the U-Net is shown beside the latents; 'inpaint' gives a plain U-Net the channels for it.
  controlnet: a ControlNet to go on from; '' begins with the U-Net's weights.
  """

  model: str = ''
  architecture: str = ''
  train: str = 'unet'
  inputs: str = 'none'
  lora: LoRAConfig = LoRAConfig()
  controlnet: str = ''
  placeholder: PlaceholderConfig = PlaceholderConfig()
  prior: PriorConfig = PriorConfig()

  def __post_init__(self):
    super().__post_init__()
    for name, known in (('train', TRAINED), ('inputs', INPUTS),
                        ('architecture', ('', *ARCHITECTURES))):
      if getattr(self, name) not in known:
        raise UserError(
          f'settings.{name} is {getattr(self, name)!r}; choose one of {", ".join(known)}.'
        )
    if self.cache and (self.train in ('controlnet', 'embeddings') or self.inputs != 'none'):
      raise UserError('settings.cache keeps latents and texts alone; switch it off for this.')
    if self.prior.folder and self.cache:
      raise UserError('settings.cache does not know whose picture is whose; switch it off.')


def make_trainable(config: FinetuneTaskConfig, part=None) -> Trainable:
  """What the config trains; `part` is the pretrained U-Net."""
  if config.train == 'lora':
    return Adapters(config.lora)
  if config.train == 'controlnet':
    return Control(config.controlnet)
  if config.train == 'embeddings':
    return Words(config.placeholder)
  return WholeUNet(config.model, part)


def shown(model: TextToImage, inputs: str) -> TextToImage:
  """The model with the input channels that `inputs` needs, where it has none yet."""
  if inputs == 'none' or kind_of_input(model) == inputs:
    return model
  if kind_of_input(model) != 'none':
    raise UserError(f'the U-Net is made for {kind_of_input(model)}, not for {inputs}.')
  config = dataclasses.replace(model.unet.config, in_channels=2 * model.channels + 1)
  return model.with_unet(config)


def abstract_parameters(config: FinetuneTaskConfig) -> Params:
  """Shapes of what a recipe trains, at the size of its architecture; nothing is read or made."""
  model = shown(architecture_model(config.architecture), config.inputs)
  trainable = make_trainable(config)
  trainable.adapted(model)
  return jax.eval_shape(trainable.initialize, jax.random.key(0))


class FinetuneTask(DiffusionTask):
  """Parameters are those of a `Trainable`."""

  name = 'finetune'

  def __init__(
    self, config: FinetuneTaskConfig, trainable: Trainable, model: TextToImage, frozen: Frozen,
    train: Sequence, test: Sequence,
  ):
    super().__init__(config, model, frozen, train, test)
    self.trainable = trainable
    if not config.cache:
      more = ['sizes'] * ('sizes' in train[0]) + ['weight'] * bool(config.prior.folder)
      more += ['control'] * (config.train == 'controlnet')
      self.batch_fields = (*self.batch_fields, *more)

  def initialize(self, key: jax.Array) -> Params:
    return self.trainable.initialize(key)

  def start(self, mesh: Mesh) -> Params | None:
    return self.trainable.start(self.frozen, mesh)

  def weights(self, params: Params, frozen: Frozen) -> Weights:
    return self.trainable.weights(params, frozen)

  def _told(self, weights: Weights, batch: dict, x0: Latents, key: jax.Array) -> Condition:
    key_drop, key_mask = jax.random.split(key)
    told = super()._told(weights, batch, x0, key_drop)
    if 'control' in batch:
      ones = jnp.ones(len(x0), jnp.float32)
      told = told._replace(control=batch['control'] / jnp.float32(255), strength=ones)
    if self.config.inputs == 'inpaint':
      masks = random_masks(key_mask, batch['image'].shape[:3])
      image = inpainting_image(self.model, weights['autoencoder'], batch['image'], masks)
      told = told._replace(image=image)
    return told

  @property
  def draw_batch(self) -> int:
    return min(super().draw_batch, len(self.config.preview_captions))

  def preview_inputs(self) -> Inputs:
    """Pictures of the test split: their edges, or themselves with the middle to be painted."""
    if self.config.train != 'controlnet' and self.config.inputs != 'inpaint':
      return Inputs()
    count = len(self.config.preview_captions)
    images = np.stack([self.test[i % len(self.test)]['image'] for i in range(count)])
    if self.config.train == 'controlnet':
      return Inputs(control=np.stack([edges(image) for image in images]))
    masks = np.zeros(images.shape[:3], bool)
    quarter = images.shape[1] // 4
    masks[:, quarter:-quarter, quarter:-quarter] = True
    return Inputs(images=images, masks=masks)

  def evaluate(self, params, frozen, mesh, *, samples: int, final: bool) -> Scores:
    if self.config.train == 'controlnet' or self.config.inputs != 'none':
      raise UserError('scores need a model that is told the caption alone; set evaluate_samples 0.')
    return super().evaluate(params, frozen, mesh, samples=samples, final=final)

  def export(self, directory: Path, params: Params, scores: Scores) -> None:
    """What was trained, in the layout of diffusers."""
    self.trainable.export(directory, params, self.config.export_dtype)


def make_finetune_task(
  config: FinetuneTaskConfig, train, test, mesh: Mesh, dtype
) -> FinetuneTask:
  """The task with its frozen networks on the mesh. UserError where something does not fit."""
  if not config.model:
    raise UserError(
      'settings.model is empty; give the directory of a pretrained pipeline, such as '
      '--config.settings.model=models/stable-diffusion-v1-5.'
    )
  model, parts, _ = read_pipeline(config.model, dtype)
  if not model.text.tokenizers:
    raise UserError(f'{config.model} reads no prompts; only models that do can be trained on.')
  if config.objective.prediction != model.prediction:
    raise UserError(
      f'objective.prediction is {config.objective.prediction!r}, but {config.model} predicts '
      f'{model.prediction!r}; set it to that.'
    )
  if config.architecture:
    _check_architecture(config, model)
  trainable = make_trainable(config, parts['unet'])
  model = trainable.adapted(shown(model, config.inputs))
  if config.train == 'unet':
    del parts['unet']
  return FinetuneTask(config, trainable, model, load_weights(parts, mesh=mesh), train, test)


def _check_architecture(config: FinetuneTaskConfig, model: TextToImage) -> None:
  wanted = architecture_model(config.architecture)
  for role, network in wanted.networks.items():
    found = model.networks.get(role)
    if found is None or found.shapes != network.shapes:
      raise UserError(
        f"the {role} of {config.model} is not that of {config.architecture}; set "
        "settings.architecture to what it is, or to ''."
      )


def draw_prior(task: FinetuneTask, train: Sequence, mesh: Mesh, size: int) -> Together:
  """The subject's records beside those of its class, which are drawn first where they are missing.

  Every process draws the same pictures; the first writes them. Drawing goes on where it stopped.
  """
  prior = task.config.prior
  folder = Path(prior.folder)
  folder.mkdir(parents=True, exist_ok=True)
  names = [f'{i:05d}.png' for i in range(prior.images)]
  missing = next((i for i, name in enumerate(names) if not (folder / name).exists()), None)
  if missing is not None:
    params = task.start(mesh) or jax.jit(task.initialize)(jax.random.key(0))
    batches = task.model.generate(
      task.weights(params, task.frozen), [prior.prompt] * (prior.images - missing),
      task.config.sample, seed=1, first=missing, mesh=mesh, batch_size=DRAW_BATCH,
      inputs=Inputs(),
    )
    for name, image in zip(names[missing:], (i for b in batches for i in b), strict=True):
      if jax.process_index() == 0:
        save_png(Image.fromarray(image), folder / name, {'prompt': prior.prompt})
  return Together(train, FolderSource(folder, size, prior.prompt), prior.weight)
