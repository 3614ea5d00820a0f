"""Train a classifier on one's own labels, whose features then compare images of its domain."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from diffusion_jax.config import TrainingConfig
from diffusion_jax.data.sources import open_data
from diffusion_jax.data.transforms import Label, build_transforms
from diffusion_jax.errors import UserError
from diffusion_jax.formats.networks import save_params
from diffusion_jax.limits import EdgeRule, FileDtype, Range, check_edges, same_size
from diffusion_jax.models.network import Network
from diffusion_jax.models.vision.classifier import Classifier, ClassifierConfig
from diffusion_jax.registry import EVALUATORS, load
from diffusion_jax.train.meter import mean_metric
from diffusion_jax.train.tasks.task import Env, Frozen, Task
from diffusion_jax.types import Params, Scores, Source


@dataclasses.dataclass(frozen=True)
class ClassifierTaskConfig:
  """label_smoothing spreads that fraction of each target over all classes (Szegedy et al. 2016,
  section 7).

  Where classifier.class_names is empty, the classes are those of the training split, by name.
  """

  classifier: ClassifierConfig = ClassifierConfig()
  label_smoothing: Annotated[float, Range(0, 1, below=True)] = 0.0
  export_dtype: FileDtype = 'float16'


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

  def __init__(self, config: ClassifierTaskConfig, test: Source, **compute: Any):
    """`compute`: as of `models.network.Compute`."""
    self.config, self.test = config, test
    self.classes = config.classifier.class_names
    self.network = self.model = Network.of(Classifier, config.classifier, **compute)
    self.frozen: Frozen = {}

  @classmethod
  def check_data(cls, config: TrainingConfig) -> None:
    classifier, data = config.settings.classifier, config.data
    several = len(data.shapes) > 1  # Of which tests, and images by their features, are one.
    for shape in data.shapes if several else ():
      check_edges(shape, EdgeRule(classifier.factor))
    size = data.shape if several else data.size
    same_size('settings.classifier.image_size', classifier.image_size, size)
    super().check_data(config)

  @classmethod
  def open_sources(cls, config: TrainingConfig, synthetic: bool) -> tuple[Source, Source]:
    if synthetic:
      return super().open_sources(config, synthetic)
    return open_data(config.data, labels_for='a classifier')

  @classmethod
  def build(cls, config: TrainingConfig, env: Env) -> ClassifierTask:
    settings = with_classes(config.settings, env.train.labels, env.test.labels)
    task = cls(settings, env.test, **cls.compute(config))
    made = build_transforms(config.data.transforms, size=config.data.shape, **task.context())
    if not any(isinstance(one, Label) for one in made):
      raise UserError('data.transforms of a classifier need label; put it before normalize.')
    return task

  def context(self) -> dict[str, Any]:
    return {'classes': self.classes}

  def initialize(self, key: jax.Array) -> Params:
    return self.network.initialize(key)

  def loss(self, params, frozen, carry, batch, key, step) -> tuple[jax.Array, tuple]:
    _, logits = self.network.bind(params)(batch['image'])
    loss = cross_entropy(logits, batch['label'], self.config.label_smoothing)
    right = logits.argmax(axis=-1) == batch['label']
    metrics = {'loss': mean_metric(loss), 'accuracy': mean_metric(right.astype(jnp.float32))}
    return loss.mean(), (metrics, ())

  def evaluators(self, mesh: Mesh) -> list[Any]:
    cache = {}
    return [
      load(EVALUATORS, name)(self.classes, self.test, mesh, cache=cache)
      for name in ('classification_preview', 'classification')
    ]

  def export(self, directory: Path, params: Params, scores: Scores) -> None:
    """Write the network with its class names, as `load_params` reads it."""
    save_params(directory, self.config.classifier, params, dtype=self.config.export_dtype)
