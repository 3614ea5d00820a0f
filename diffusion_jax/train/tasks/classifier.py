"""Train a classifier on one's own labels: its features compare images of its domain.

One that is trained on noised images or latents guides samples to its classes.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from diffusion_jax.backend.xla import jit
from diffusion_jax.config import TrainingConfig
from diffusion_jax.data.sources import open_data
from diffusion_jax.data.transforms import Label, build_transforms
from diffusion_jax.diffusion.losses import add_noise
from diffusion_jax.diffusion.noise import NoiseConfig, NoiseSchedule
from diffusion_jax.diffusion.objective import uniform
from diffusion_jax.errors import UserError
from diffusion_jax.formats.networks import save_params
from diffusion_jax.limits import ByType, EdgeRule, FileDtype, Range, check_edges, same_size
from diffusion_jax.models.network import Network
from diffusion_jax.models.vision.classifier import Classifier, ClassifierConfig
from diffusion_jax.pipelines.guides import GUIDING_CLASSIFIER, of_space, told_noise
from diffusion_jax.pipelines.spaces import Space
from diffusion_jax.pixels import to_float
from diffusion_jax.registry import EVALUATORS, SPACES, load
from diffusion_jax.train.meter import mean_metric
from diffusion_jax.train.tasks.task import Env, Frozen, Task
from diffusion_jax.types import Params, Scores, Source, Weights

RATIOS = (0.5, 1.0, 2.0, 4.0)
"""Noise levels sigma / alpha at which one of noised z is scored, besides without noise."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class NoisedConfig:
  """space: a row of `registry.SPACES`. schedule: of the levels in training, at uniform times; the
  network is told sigma / alpha, so that it serves every process."""

  space: Annotated[Any, ByType(SPACES, 'latents')]
  schedule: NoiseConfig = NoiseConfig()


@dataclasses.dataclass(frozen=True)
class ClassifierTaskConfig:
  """label_smoothing spreads that fraction of each target over all classes (Szegedy et al. 2016,
  section 7).

  Where classifier.class_names is empty, the classes are those of the training split, by name.
  noised: what of an image it sees under noise, to guide samples; None for clean images.
  """

  classifier: ClassifierConfig = ClassifierConfig()
  label_smoothing: Annotated[float, Range(0, 1, below=True)] = 0.0
  export_dtype: FileDtype = 'float16'
  noised: NoisedConfig | None = None


def with_classes(
  config: ClassifierTaskConfig, train: list[str], test: list[str]
) -> ClassifierTaskConfig:
  """The config with the classes of these labels, unless it has its own.

  UserError: fewer than two classes, or an unknown label.
  """
  names = config.classifier.class_names or tuple(sorted(set(train)))
  if len(names) < 2:
    raise UserError(f'there is one class, {", ".join(names)}; give pictures of two at least.')
  for split, labels in (('training', train), ('test', test)):
    unknown = sorted(set(labels) - set(names))
    if unknown:
      raise UserError(
        f'the {split} split has the label {unknown[0]!r}, which is no class ({", ".join(names)}); '
        'add training pictures of it, or leave settings.classifier.class_names empty.'
      )
  classifier = dataclasses.replace(config.classifier, class_names=names)
  return dataclasses.replace(config, classifier=classifier)


def cross_entropy(logits: jax.Array, labels: jax.Array, label_smoothing: float = 0.0) -> jax.Array:
  """In nats, float32: logits [b k], labels int [b] -> [b]."""
  log = jax.nn.log_softmax(logits.astype(jnp.float32))
  right = jnp.take_along_axis(log, labels[:, None], axis=-1)[:, 0]
  return -(1 - label_smoothing) * right - label_smoothing * log.mean(axis=-1)


class ClassifierTask(Task):
  """A residual network from scratch; the classes of its config must be known (`with_classes`)."""

  Config = ClassifierTaskConfig
  name, title = 'classifier', 'Classifier of images'
  batch_fields = ('image', 'label')

  def __init__(
    self, config: ClassifierTaskConfig, test: Source, space: Space | None = None,
    frozen: Frozen | None = None, **compute: Any,
  ):
    """space, frozen: of the config's `noised`, and its weights. `compute`: as of
    `models.network.Compute`."""
    classifier = dataclasses.replace(config.classifier, **of_space(space)) if space else None
    self.config = dataclasses.replace(config, classifier=classifier or config.classifier)
    self.test, self.space, self.frozen = test, space, frozen or {}
    self.noise = NoiseSchedule.of(config.noised.schedule) if space else None
    self.classes = config.classifier.class_names
    self.network = self.model = Network.of(Classifier, self.config.classifier, **compute)

  @classmethod
  def check_data(cls, config: TrainingConfig) -> None:
    classifier, data = config.settings.classifier, config.data
    several = len(data.shapes) > 1  # Of which tests, and images by their features, are one.
    for shape in data.shapes if several else ():
      check_edges(shape, EdgeRule(classifier.factor))
    size = data.shape if several else data.size
    edge = 1 if config.settings.noised is None else config.settings.noised.space.factor
    same_size('settings.classifier.image_size', classifier.image_size * edge, size)
    super().check_data(config)

  @classmethod
  def open_sources(cls, config: TrainingConfig, synthetic: bool) -> tuple[Source, Source]:
    if synthetic:
      return super().open_sources(config, synthetic)
    return open_data(config.data, labels_for='a classifier')

  @classmethod
  def build(cls, config: TrainingConfig, env: Env) -> ClassifierTask:
    settings = with_classes(config.settings, env.train.labels, env.test.labels)
    space, parts = None, {}
    if settings.noised is not None:
      space, parts = settings.noised.space.build(getattr(jnp, config.dtype))
    frozen = {role: part.load(mesh=env.mesh) for role, part in parts.items()}
    task = cls(settings, env.test, space, frozen, **cls.compute(config))
    made = build_transforms(config.data.transforms, size=config.data.shape, **task.context())
    if not any(isinstance(one, Label) for one in made):
      raise UserError('data.transforms of a classifier need label; put it before normalize.')
    return task

  def context(self) -> dict[str, Any]:
    return {'classes': self.classes}

  def initialize(self, key: jax.Array) -> Params:
    return self.network.initialize(key)

  def loss(self, params, frozen, carry, batch, key, step) -> tuple[jax.Array, tuple]:
    seen = (batch['image'],) if self.space is None else self._noised(frozen, batch['image'], key)
    _, logits = self.network.bind(params)(*seen)
    loss = cross_entropy(logits, batch['label'], self.config.label_smoothing)
    right = logits.argmax(axis=-1) == batch['label']
    metrics = {'loss': mean_metric(loss), 'accuracy': mean_metric(right.astype(jnp.float32))}
    return loss.mean(), (metrics, ())

  def _noised(self, frozen: Frozen, images: jax.Array, key: jax.Array) -> tuple[jax.Array, ...]:
    """Return z of images [b h w 3] at random levels of noise, and these, as the network is given
    them."""
    key_z, key_t, key_noise = jax.random.split(key, 3)
    z = self.space.sample(self.space.moments(frozen, images), key_z)
    level = self.noise.at(uniform(key_t, len(z), stratified=True))
    noise = jax.random.normal(key_noise, z.shape)
    return told_noise(add_noise(z, noise, level.alpha, level.sigma), level.alpha, level.sigma)

  def weights(self, params: Params, frozen: Frozen) -> Weights:
    return params if self.space is None else {**frozen, GUIDING_CLASSIFIER: params}

  def logits_of(self, network: Network, ratio: float) -> Any:
    """Return a compiled (weights, uint8 images [b h w 3]) -> logits [b classes] of noised z."""
    alpha = jnp.float32(1 / np.hypot(1, ratio))

    def run(weights: Weights, images: jax.Array) -> jax.Array:
      z = self.space.encode(weights, to_float(images))
      z = alpha * (z + ratio * jax.random.normal(jax.random.key(0), z.shape))
      return network.bind(weights[GUIDING_CLASSIFIER])(*told_noise(z, alpha, ratio * alpha))[1]

    return jit(run)

  def evaluators(self, mesh: Mesh) -> list[Any]:
    how = {'cache': {}}
    preview, scores = (load(EVALUATORS, f'classification{part}') for part in ('_preview', ''))
    if self.space is None:
      return [one(self.classes, self.test, mesh, **how) for one in (preview, scores)]
    how['logits'] = self.logits_of
    return [
      preview(self.classes, self.test, mesh, **how),
      scores(self.classes, self.test, mesh, **how, ratios=RATIOS),
    ]

  def export(self, directory: Path, params: Params, scores: Scores) -> None:
    """Write the network with its class names, as `load_params` reads it."""
    save_params(directory, self.config.classifier, params, dtype=self.config.export_dtype)
