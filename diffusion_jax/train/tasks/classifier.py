"""Trains a classifier on one's own labels, whose features then compare images of its domain."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from diffusion_jax.backend.xla import jit
from diffusion_jax.data.loader import Source
from diffusion_jax.data.unreadable import some
from diffusion_jax.errors import UserError
from diffusion_jax.evaluation.extractors.classifier import ClassifierExtractor
from diffusion_jax.formats.networks import save_params
from diffusion_jax.models.network import Network
from diffusion_jax.models.vision.classifier import Classifier, ClassifierConfig
from diffusion_jax.parallel.mesh import in_batches
from diffusion_jax.train.tasks.task import Frozen, Scores, Task, answer, mean_metric
from diffusion_jax.types import Params

SHOWN = 32


@dataclasses.dataclass(frozen=True)
class ClassifierTaskConfig:
  """label_smoothing spreads that share of each target over all classes (Szegedy et al. 2016,
  section 7).

  Where classifier.class_names is empty, the classes are those of the training split, by name.
  """

  classifier: ClassifierConfig = ClassifierConfig()
  label_smoothing: float = 0.0
  export_dtype: str = 'float16'

  def __post_init__(self):
    if not 0 <= self.label_smoothing < 1:
      raise UserError(
        f'settings.label_smoothing is {self.label_smoothing}; give a share from 0 to below 1.'
      )


def with_classes(
  config: ClassifierTaskConfig, train: list[str], test: list[str]
) -> ClassifierTaskConfig:
  """The config with the classes of these labels, where it names none itself.

  Raises:
    UserError: fewer than two classes, or a label that is none of them.
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
  shows = 'Test images, each with the class that the classifier gives it and the one that it is of.'

  def __init__(
    self, config: ClassifierTaskConfig, test: Source, dtype=jnp.float32, remat: str = 'none',
    attention: str = 'auto',
  ):
    self.config, self.test = config, test
    self.classes = config.classifier.class_names
    self.network = Network.of(
      Classifier, config.classifier, dtype=dtype, remat=remat, attention=attention
    )
    self.frozen: Frozen = {}
    self._logits = jit(
      lambda params, images: ClassifierExtractor(self.network, {}, '').apply(params, images)[
        'logits'
      ]
    )

  def initialize(self, key: jax.Array) -> Params:
    return self.network.initialize(key)

  def loss(self, params, frozen, carry, batch, key, step) -> tuple[jax.Array, tuple]:
    _, logits = self.network.bind(params)(batch['image'])
    loss = cross_entropy(logits, batch['label'], self.config.label_smoothing)
    right = logits.argmax(axis=-1) == batch['label']
    metrics = {'loss': mean_metric(loss), 'accuracy': mean_metric(right.astype(jnp.float32))}
    return loss.mean(), (metrics, ())

  def _tested(
    self, params: Params, mesh: Mesh, count: int
  ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(images, labels, logits) of so many test records, spread over the split."""
    count = min(count, len(self.test))
    places = np.linspace(0, len(self.test) - 1, count).round().astype(int)
    records = some(self.test, count, places)
    images = np.stack([record['image'] for record in records])
    labels = np.asarray([self.classes.index(record['label']) for record in records])
    logits = list(in_batches(self._logits, params, images, mesh=mesh))
    return images, labels, np.concatenate(logits)

  def preview(self, params, frozen, mesh: Mesh) -> tuple[np.ndarray, list[str]]:
    """Test images, each with the class that it is given and with its own."""
    images, labels, logits = self._tested(params, mesh, SHOWN)
    pairs = zip(logits.argmax(axis=-1), labels, strict=True)
    return images, [answer(self.classes[found], self.classes[true]) for found, true in pairs]

  def evaluate(self, params, frozen, mesh, *, samples: int, final: bool) -> Scores:
    """Loss without smoothing, accuracy, and its mean over classes, which all count alike there.

    Beside it, where `final`: an answer that knows nothing but how common each class is in the test.
    """
    _, labels, logits = self._tested(params, mesh, samples)
    scores = lambda logits: _scores(logits, labels)
    columns = {'test': scores(logits)}
    if final:
      shares = np.bincount(labels, minlength=len(self.classes)) / len(labels)
      known = np.log(np.maximum(shares, 1e-12)).astype(np.float32)
      columns['commonest'] = scores(np.broadcast_to(known, logits.shape))
    return columns

  def export(self, directory: Path, params: Params, scores: Scores) -> None:
    """The network with the names of its classes, as `load_params` reads it."""
    save_params(directory, self.config.classifier, params, dtype=self.config.export_dtype)


def _scores(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
  right = logits.argmax(axis=-1) == labels
  return {
    'loss': float(cross_entropy(jnp.asarray(logits), jnp.asarray(labels)).mean()),
    'accuracy': float(right.mean()),
    'accuracy_per_class': float(np.mean([right[labels == k].mean() for k in np.unique(labels)])),
    'images': float(len(labels)),
  }
