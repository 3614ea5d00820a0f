"""Score and show networks that recognise test images: CLIP by caption, classifiers by class."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from diffusion_jax.backend.xla import jit
from diffusion_jax.data.unreadable import first_readable
from diffusion_jax.evaluation.evaluator import (
  EVALUATE,
  SAMPLE,
  TEST,
  Cached,
  Picture,
  Value,
  named,
)
from diffusion_jax.evaluation.extractors.clip import CLIPExtractor, CLIPFeatures
from diffusion_jax.evaluation.extractors.images import ClassifierExtractor
from diffusion_jax.evaluation.metrics.images import clip_score, retrieval_recall
from diffusion_jax.models.network import Network
from diffusion_jax.models.text.clip import unit
from diffusion_jax.parallel.mesh import in_batches, put_params, to_host
from diffusion_jax.types import Params, Source

if TYPE_CHECKING:
  from transformers import PreTrainedTokenizerBase

SHOWN = 32


def answer(given: str, true: str) -> str:
  """Return the caption of an image that a network has named: its answer, and whether it is right.
  """
  return f'right: {true}' if given == true else f'says {given}; is {true}'


@dataclasses.dataclass(frozen=True, eq=False)
class RetrievalPreview:
  """Test images with the nearest of all test captions, and their own.

  pixels: mean and std of a tower that sees others than [-1, 1].
  """

  tokenizer: PreTrainedTokenizerBase
  test: Source
  mesh: Mesh
  pixels: Mapping[str, Sequence[float]] = dataclasses.field(default_factory=dict)
  name = 'retrieval_preview'
  when = SAMPLE
  about = (
    'Test images, each with the caption, of all of the test, that CLIP finds nearest, and its own.'
  )

  def run(self, model: Network, params: Params, key) -> Iterator[tuple[str, Value]]:
    images, captions, image, text = self.embed(model, params, len(self.test))
    chosen = np.linspace(0, len(images) - 1, min(SHOWN, len(images))).astype(int)
    nearest = (np.asarray(unit(image[chosen])) @ np.asarray(unit(text)).T).argmax(axis=1)
    pairs = zip(nearest, chosen, strict=True)
    answers = [answer(captions[found], captions[own]) for found, own in pairs]
    yield 'samples', Picture(images[chosen], answers, self.about)

  def embed(self, model: Network, params: Params, count: int) -> tuple:
    """Return (images, captions, embeddings of images, of captions) of so many test records."""
    records = first_readable(self.test, count)
    images = np.stack([record['image'] for record in records])
    captions = [record['captions'][0] for record in records]
    extractor = CLIPExtractor(model, params, 'in training', **self.pixels)
    features = CLIPFeatures(extractor, self.tokenizer, self.mesh)
    return images, captions, features.images(images), features.texts(captions)


@dataclasses.dataclass(frozen=True, eq=False)
class Retrieval(RetrievalPreview):
  """Retrieval among 100 captions, or so many as there are, and among all that are read."""

  samples: int = 256
  baselines: bool = True
  name = 'retrieval'
  when = EVALUATE

  def run(self, model: Network, params: Params, key) -> Iterator[tuple[str, Value]]:
    yield from named({TEST: self._scores(model, params)})
    if self.baselines:
      fresh = to_host(jax.jit(model.initialize)(jax.random.key(1)))
      yield from named({'untrained': self._scores(model, put_params(fresh, self.mesh))})

  def _scores(self, model: Network, params: Params) -> dict[str, float]:
    _, captions, image, text = self.embed(model, params, self.samples)
    count = len(captions)
    scores = {
      f'retrieval_r{k}_of_{n}': retrieval_recall(image, text, k=k, candidates=n, seed=0)
      for n in sorted({min(100, count), count}) for k in (1, 5) if k <= n
    }
    return scores | {'clip_score': clip_score(image, text), 'images': float(count)}


def logits_of(network: Network, ratio: float = 0.0) -> Callable:
  """Return a compiled (params, uint8 images [b h w 3]) -> logits [b classes]; without noise."""
  del ratio
  return jit(
    lambda params, images: ClassifierExtractor(network, {}, '').apply(params, images)['logits']
  )


@dataclasses.dataclass(frozen=True, eq=False)
class ClassificationPreview(Cached):
  """Test images, each with the class that it is given and with its own.

  logits: see `logits_of`, also of classifiers of noised images, at sigma / alpha = ratio.
  """

  classes: Sequence[str]
  test: Source
  mesh: Mesh
  logits: Callable[[Network, float], Callable] = logits_of
  name = 'classification_preview'
  when = SAMPLE
  about = 'Test images, each with the class that the classifier gives it and the one that it is of.'

  def run(self, model: Network, params: Params, key) -> Iterator[tuple[str, Value]]:
    images, labels, logits = self.tested(model, params, SHOWN)
    pairs = zip(logits.argmax(axis=-1), labels, strict=True)
    answers = [answer(self.classes[found], self.classes[true]) for found, true in pairs]
    yield 'samples', Picture(images, answers, self.about)

  def tested(
    self, model: Network, params: Params, count: int, ratio: float = 0.0
  ) -> tuple[np.ndarray, ...]:
    """Return (images, labels, logits) of so many test records, spread over the split."""
    count = min(count, len(self.test))
    places = np.linspace(0, len(self.test) - 1, count).round().astype(int)
    records = first_readable(self.test, count, places)
    images = np.stack([record['image'] for record in records])
    labels = np.asarray([self.classes.index(record['label']) for record in records])
    run = self.once(f'logits {ratio}', lambda: self.logits(model, ratio))
    logits = list(in_batches(run, params, images, mesh=self.mesh))
    return images, labels, np.concatenate(logits)


@dataclasses.dataclass(frozen=True, eq=False)
class Classification(ClassificationPreview):
  """Loss without smoothing, accuracy, and its mean over classes.

  With baselines, also the constant answer of the test's class frequencies. ratios: levels
  sigma / alpha of noise, at each of which it is scored, too.
  """

  ratios: Sequence[float] = ()
  samples: int = 256
  baselines: bool = True
  name = 'classification'
  when = EVALUATE

  def run(self, model: Network, params: Params, key) -> Iterator[tuple[str, Value]]:
    _, labels, logits = self.tested(model, params, self.samples)
    yield from named({TEST: _of_logits(logits, labels)})
    for ratio in self.ratios:
      noised = self.tested(model, params, self.samples, ratio)[2]
      yield from named({f'noise_{ratio:g}': _of_logits(noised, labels)})
    if self.baselines:
      fractions = np.bincount(labels, minlength=len(self.classes)) / len(labels)
      known = np.log(np.maximum(fractions, 1e-12)).astype(np.float32)
      known = np.broadcast_to(known, logits.shape)
      yield from named({'commonest': _of_logits(known, labels)})


def _of_logits(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
  right = logits.argmax(axis=-1) == labels
  log = jax.nn.log_softmax(jnp.asarray(logits).astype(jnp.float32))
  loss = -jnp.take_along_axis(log, jnp.asarray(labels)[:, None], axis=-1)[:, 0]
  return {
    'loss': float(loss.mean()),
    'accuracy': float(right.mean()),
    'accuracy_per_class': float(np.mean([right[labels == k].mean() for k in np.unique(labels)])),
    'images': float(len(labels)),
  }
