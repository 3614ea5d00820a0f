"""What a model has learned by heart, and what it has forgotten of the one that it began with.

Both are cosine distances of features, 1 - cos: of pictures drawn for captions that were trained on
to the nearest training picture, calibrated by those of held-out pictures (as in Somepalli et al.
2023), and of pictures for unrelated prompts to those that the base model draws from the same noise.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float

from diffusion_jax.data.unreadable import first_readable
from diffusion_jax.errors import UserError
from diffusion_jax.evaluation.evaluator import EVALUATE, Cached, Value, seed_of
from diffusion_jax.evaluation.extract import Extraction
from diffusion_jax.evaluation.extractors import load_named
from diffusion_jax.evaluation.images import shuffled
from diffusion_jax.evaluation.metrics.metric import POOLED
from diffusion_jax.evaluation.options import CLIP
from diffusion_jax.pipelines.directory import read_model
from diffusion_jax.pipelines.generator import Generator
from diffusion_jax.registry import EXTRACTORS, check_paths
from diffusion_jax.types import Source, Weights

SHARE, NEAREST, RATIO = 'memorised_fraction', 'nearest_training', 'nearest_training_ratio'
DRIFT, FARTHEST = 'drift', 'drift_most'
MOST_NAMED = 3
PROMPTS = (
  'a red apple', 'a dog', 'a house by the sea', 'a portrait of a woman', 'a car in the street',
  'mountains at sunset', 'a cup of coffee on a table', 'a yellow flower',
)
_PART = 4096
"""Training pictures whose distances are in memory at a time."""
_READ = 256
"""Pictures of a split that are."""

Features = Float[np.ndarray, 'n d']


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class _OfPictures(Cached):
  """What both need. features: KIND:PATH of a network that gives one vector for each picture."""

  sample: Any
  mesh: Mesh
  features: str = f'clip:{CLIP}'
  batch_size: int = 32
  when = EVALUATE

  def __post_init__(self):
    check_paths(EXTRACTORS, (self.features,), f'features of {self.name}')

  @property
  def extraction(self) -> Extraction:
    """The network of the features; UserError where it cannot be read."""
    return self.once('extraction', lambda: Extraction(
      load_named((self.features,), (), self.mesh, f'features of {self.name}'), self.mesh
    ))

  def vectors(self, batches: Iterable[Sequence[np.ndarray]]) -> Features:
    """Return features of pictures of any sizes, each of length 1."""
    found = [self.extraction(list(images)) for images in batches]
    (column,) = (name for name in found[0] if name.rpartition(':')[2] in POOLED)
    return unit(np.concatenate([one[column] for one in found]))

  def of_records(self, source: Source, most: int) -> Features:
    """Return those of the first `most` pictures of a split in the order of `shuffled`, or of all.
    """
    order = np.random.default_rng(0).permutation(len(source))
    parts = np.split(order[:most], range(_READ, min(most, len(source)), _READ))
    return self.vectors(
      [record['image'] for record in first_readable(source, len(part), part)] for part in parts
    )

  def drawn(
    self, model: Generator, weights: Weights, captions: Sequence[str], key: jax.Array, sample: Any
  ) -> Features:
    """Return those of a picture for each caption; noise follows from the key and the number."""
    return self.vectors(model.generate(
      weights, captions, sample, seed=seed_of(key), mesh=self.mesh, batch_size=self.batch_size
    ))


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Memorisation(_OfPictures):
  """memorised_fraction of pictures drawn for training captions lies nearer to a training picture
  than the `quantile` of held-out pictures does, of a model that copies nothing about `quantile`.

  nearest_training is the median distance to the nearest training picture, nearest_training_ratio
  that over the held-out pictures'. pictures: drawn, and of the held-out split, at most;
  training_pictures: a random subset of so many, those of the captions first. 'warnings' names the
  nearest.
  """

  train: Source
  test: Source
  pictures: int = 32
  held_out_pictures: int = 256
  training_pictures: int = 8192
  quantile: float = 0.05
  name = 'memorisation'

  def __post_init__(self):
    super().__post_init__()
    for key in ('pictures', 'held_out_pictures', 'training_pictures', 'batch_size'):
      value = getattr(self, key)
      if type(value) is not int or value < 1:
        raise UserError(f'{key} of {self.name} is {value!r}; give a whole number from 1 on.')
    if not 0 < self.quantile < 1:
      raise UserError(f'quantile of {self.name} is {self.quantile!r}; give a number in 0 to 1.')
    if not len(self.test):
      raise UserError(
        f'{self.name} needs a test split, which is empty; set data.test_fraction above 0.'
      )

  @property
  def metrics(self) -> list[str]:
    """Names of all values; UserError: unreadable features."""
    return [SHARE, NEAREST, RATIO] if self.extraction else []

  def run(self, model: Generator, params: Weights, key: jax.Array) -> Iterator[tuple[str, Value]]:
    training = self.once('train', lambda: self.of_records(self.train, self.training_pictures))
    held_out = self.once('test', lambda: nearest(
      self.of_records(self.test, self.held_out_pictures), training
    )[0])
    records = shuffled(self.train, min(self.pictures, self.training_pictures, len(self.train)))
    captions = [model.prompt(record) for record in records]
    own, which = nearest(self.drawn(model, params, captions, key, self.sample), training)
    limit = np.quantile(held_out, self.quantile)
    near = [int(i) for i in np.argsort(own, kind='stable') if own[i] < limit]
    yield SHARE, len(near) / len(own)
    yield NEAREST, float(np.median(own))
    yield RATIO, float(np.median(own) / max(np.median(held_out), 1e-12))
    if len(near) > 2 * self.quantile * len(own):
      named = ', '.join(
        f'{captions[i]!r} (picture {which[i]:,} of the training pictures in random order)'
        for i in near[:MOST_NAMED]
      )
      yield 'warnings', [
        f'{len(near)} of {len(own)} pictures drawn for training captions lie nearer to a training '
        f'picture than {1 - self.quantile:.0%} of held-out pictures: {named}.'
      ]
    yield 'settings', {
      'memorisation_features': self.features, 'memorisation_pictures': len(own),
      'memorisation_held_out': len(held_out), 'memorisation_training': len(training),
    }


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Drift(_OfPictures):
  """drift: mean distance of pictures for `captions` to the base model's from the same noise.

  drift_most is the largest of single pictures. 0 for the base model itself. base: directory of the
  model that the run began with. The base is read, and draws, once in each start of a run.
  """

  base: str = ''
  captions: Sequence[str] = PROMPTS
  name = 'drift'

  def __post_init__(self):
    super().__post_init__()
    if not self.base:
      raise UserError(
        f'loop.evaluators has {self.name}, which compares with the model that a run began with, '
        "and this one begins with none; leave it out, or give its 'base'."
      )
    if isinstance(self.captions, str) or not self.captions:
      raise UserError(f'captions of {self.name} must be a list of one caption at least; give some.')

  @property
  def metrics(self) -> list[str]:
    """Names of all values; UserError: unreadable features or base."""
    read_model(self.base)
    return [DRIFT, FARTHEST] if self.extraction else []

  def run(self, model: Generator, params: Weights, key: jax.Array) -> Iterator[tuple[str, Value]]:
    base = self.once('base', lambda: self._of_base(key, model.trained_size))
    own = self.drawn(model, params, list(self.captions), key, self.sample)
    distance = 1 - np.sum(own * base, axis=1, dtype=np.float64)
    yield DRIFT, float(distance.mean())
    yield FARTHEST, float(distance.max())
    yield 'settings', {'drift_features': self.features, 'drift_base': self.base}

  def _of_base(self, key: jax.Array, size: tuple[int, int]) -> Features:
    """Return features of the base model's own pictures, which is in memory no longer than that."""
    model, parts, _ = read_model(self.base)
    model = dataclasses.replace(model, size=size)
    weights = {role: part.load(mesh=self.mesh) for role, part in parts.items()}
    return self.drawn(model, weights, list(self.captions), key, self.sample)


def unit(x: Features) -> Features:
  """Return rows of length 1, float32."""
  x = np.asarray(x, np.float32)
  return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)


def nearest(rows: Features, others: Features) -> tuple[np.ndarray, np.ndarray]:
  """(cosine distance [n], number [n]) of the nearest of `others` to each row, all of length 1."""
  best, which = np.full(len(rows), np.inf), np.zeros(len(rows), int)
  for start in range(0, len(others), _PART):
    distances = 1 - np.asarray(rows @ others[start : start + _PART].T, np.float64)
    part = distances.argmin(axis=1)
    closer = distances[np.arange(len(rows)), part] < best
    best = np.where(closer, distances[np.arange(len(rows)), part], best)
    which = np.where(closer, start + part, which)
  return best, which
