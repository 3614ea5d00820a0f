"""Scores and shows what a text-to-image model makes, again and again as it trains."""

import dataclasses
import functools
import itertools
import sys
import time
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from diffusion_jax.data.unreadable import readable
from diffusion_jax.errors import UserError
from diffusion_jax.evaluation.comparison import compare
from diffusion_jax.evaluation.evaluator import (
  EVALUATE,
  SAMPLE,
  Cached,
  Picture,
  Value,
  named,
  seed_of,
)
from diffusion_jax.evaluation.extract import Extraction, Features, Images
from diffusion_jax.evaluation.extractors import load_named
from diffusion_jax.evaluation.extractors.clip import text_towers
from diffusion_jax.evaluation.images import shuffled
from diffusion_jax.evaluation.metrics.metric import MetricValues
from diffusion_jax.evaluation.report import PAIRS, real_retrieval
from diffusion_jax.evaluation.scores import check_metrics, metric_of, value_names
from diffusion_jax.parallel.mesh import put_params, to_host
from diffusion_jax.parallel.processes import agree
from diffusion_jax.pipelines.conditions import Inputs
from diffusion_jax.pipelines.model import Diffusion
from diffusion_jax.pipelines.sampling import SampleConfig
from diffusion_jax.types import Source, Weights


class Budget:
  """Seconds for a loop over equal batches, by the clock of the first process.

  The first batch may have to compile its program, which is not counted against it: it counts no
  more than the second. So there are always two batches, if so many are wanted.
  """

  def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic):
    self.seconds, self._clock = seconds, clock
    self._last = clock()
    self._times: list[float] = []

  def over(self) -> bool:
    """Whether one batch more would take too long; after each batch, on all processes alike.

    All processes must ask equally often.
    """
    now = self._clock()
    self._times.append(now - self._last)
    self._last = now
    if not self.seconds or len(self._times) < 2:
      return False
    spent = sum(self._times[1:]) + min(self._times[:2])
    return agree('evaluation', str(spent + self._times[-1] > self.seconds))[0] == 'True'


MINIMUM = 16
DRAW_BATCH = 32
READ = 256
"""Images of the data set in memory at a time."""
FEATURES_KEY, METRICS_KEY = 'settings.evaluation.features', 'settings.evaluation.metrics'


class ImageScorer:
  """Shared by all evaluations of one model: the features, and the reference, computed once.

  The reference is the images of the training split, so that real test images have figures of
  their own: the floor that a perfect model could reach.
  """

  def __init__(
    self, features: Sequence[str], metrics: Sequence[str], train: Source, test: Source,
    mesh: Mesh,
  ):
    """UserError for weights that cannot be read, or a metric that these features cannot have."""
    self.metrics = tuple(metrics)
    self._train, self._test = train, test
    self.extractors = load_named(features, metrics, mesh, FEATURES_KEY)
    self.extraction = Extraction(self.extractors, mesh, metrics=self.metrics)
    outputs = [name.rpartition(':')[2] for name in self.extraction.columns]
    check_metrics(metrics, outputs, ('moments', 'reference', 'texts'), METRICS_KEY)
    asked = any('texts' in metric_of(name).needs for name in metrics)
    self._clips = text_towers(features, self.extractors, mesh)
    self._towers = self._clips if asked else {}
    self.names = value_names(metrics, self.extraction.columns)
    """Of all metrics that it gives."""

  @functools.cached_property
  def reference(self) -> Features:
    """Of all training images that can be read."""
    images = (record['image'] for record in readable(self._train))
    blocks = iter(lambda: list(itertools.islice(images, READ)), [])
    return self.extraction.collect(np.stack(block) for block in blocks)

  @functools.cached_property
  def checked(self) -> list[tuple[str, bool]]:
    """What each CLIP makes of real test images and their captions: (sentence, whether to beware).
    """
    records = shuffled(self._test, min(PAIRS, len(self._test)))
    found = {clip.extractor.name: real_retrieval(clip, records) for clip in self._clips.values()}
    told = [(one.told(name), one.near_chance) for name, one in found.items()]
    for text in [text for text, beware in told if beware and jax.process_index() == 0]:
      print(f'diffusion_jax train: {text}', file=sys.stderr)
    return told

  def scores(self, samples: Features, texts: dict, seed: int) -> MetricValues:
    """Return the metrics of samples that belong to these texts, against the reference."""
    return compare(samples, self.reference, self.metrics, texts=texts, seed=seed, intervals=False)

  def texts(self, captions: Sequence[str]) -> dict[str, np.ndarray]:
    """Return column -> embeddings of the captions, of every CLIP that a metric needs."""
    return {name: tower.texts(captions) for name, tower in self._towers.items()}


@dataclasses.dataclass(frozen=True, eq=False)
class CaptionPreview:
  """Images of the same captions with the same noise every time.

  inputs: makes what they are drawn with beside the captions. batch_size: as for the evaluation, so
  that both share one compiled program.
  """

  captions: Sequence[str]
  sample: SampleConfig
  mesh: Mesh
  about: str = 'Drawn for these captions, from the same noise each time.'
  batch_size: int = DRAW_BATCH
  inputs: Callable[[], Inputs] = Inputs
  name = 'caption_preview'
  when = SAMPLE

  def run(self, model: Diffusion, params: Weights, key: jax.Array) -> Iterator[tuple[str, Value]]:
    images = model.generate(
      params, list(self.captions), self.sample, seed=seed_of(key), mesh=self.mesh,
      batch_size=self.batch_size, inputs=self.inputs(),
    )
    yield 'samples', Picture(np.concatenate(list(images)), list(self.captions), self.about)


@dataclasses.dataclass(frozen=True, eq=False)
class GeneratedImages(Cached):
  """Draws one image for each of the first `samples` test captions and scores it.

  Columns are 'generated', and as baselines 'untrained' (the same model with fresh weights) and
  'real' (the test images of the same captions).

  Attributes:
    features: KIND:PATH each; scored_by: names of `registry.METRICS`.
    seconds: that drawing and its features may take, compilation not counted; then it ends with
      fewer samples, 16 and two batches at least. 0 for as long as it takes.

  `run` raises a UserError for fewer than 16 samples, or more than the test split has captions.
  """

  features: Sequence[str]
  scored_by: Sequence[str]
  sample: SampleConfig
  train: Source
  test: Source
  mesh: Mesh
  samples: int = 256
  seconds: float = 0.0
  baselines: bool = True
  batch_size: int = DRAW_BATCH
  name = 'generated_images'
  when = EVALUATE

  @property
  def scorer(self) -> ImageScorer:
    """The one of all evaluations; its networks are loaded when it is first needed."""
    return self.once('scorer', lambda: ImageScorer(
      self.features, self.scored_by, self.train, self.test, self.mesh
    ))

  @property
  def metrics(self) -> list[str]:
    """Names of all values that it gives.

    UserError for features that cannot be loaded, or too many or too few samples.
    """
    check_samples(self.samples, len(self.test))
    return self.scorer.names

  def run(self, model: Diffusion, params: Weights, key: jax.Array) -> Iterator[tuple[str, Value]]:
    check_samples(self.samples, len(self.test))
    records = shuffled(self.test, self.samples)
    check_samples(len(records), len(self.test))
    captions = tuple(model.prompt(record) for record in records)
    scorer, seed = self.scorer, seed_of(key)
    scorer.reference, scorer.checked  # noqa: B018  The reference is embedded before the clock runs.
    drawn = functools.partial(self._drawn, model, captions, seed)
    found = {'generated': drawn('generated', params, Budget(self.seconds))}
    samples = len(found['generated'].rows)
    captions = captions[:samples]
    if self.baselines:
      drawn = functools.partial(self._drawn, model, captions, seed)
      found['untrained'] = drawn('untrained', fresh_weights(model, params, self.mesh), Budget(0))
      found['real'] = scorer.extraction.collect([np.stack([r['image'] for r in records[:samples]])])
    texts = scorer.texts(captions)
    scores = {name: scorer.scores(one, texts, seed) for name, one in found.items()}
    yield from named({name: one.values for name, one in scores.items()})
    yield from self._told(scorer, model, samples, scores['generated'].warnings, seed)

  def _drawn(
    self, model: Diffusion, captions: Sequence[str], seed: int, label: str, params: Weights,
    budget: Budget,
  ) -> Features:
    batches = model.generate(
      params, captions, self.sample, seed=seed, mesh=self.mesh, batch_size=self.batch_size
    )
    return self.scorer.extraction.collect(_within(budget, batches, len(captions), label))

  def _told(
    self, scorer: ImageScorer, model: Diffusion, samples: int, warnings: list[str], seed: int
  ) -> Iterator[tuple[str, Value]]:
    yield 'measured', [
      f'Of {samples:,} images, each drawn for a test caption, against '
      f'{len(scorer.reference.rows):,} images of the training split.',
      *(f'{one.name} sees them at {one.size} px, enlarged from {max(model.trained_size)}.'
        for one in scorer.extractors if one.size > max(model.trained_size)),
      *(text for text, beware in scorer.checked if not beware),
    ]
    yield 'warnings', [*(text for text, beware in scorer.checked if beware), *warnings]
    yield 'settings', {
      'samples': samples, 'reference_images': len(scorer.reference.rows), 'seed': seed,
      'features': ', '.join(extractor.name for extractor in scorer.extractors),
      **dataclasses.asdict(self.sample),
    }


def _within(budget: Budget, batches: Iterator[Images], total: int, label: str) -> Iterator[Images]:
  """The batches until the budget is spent, 16 images at least."""
  shown = jax.process_index() == 0
  with tqdm(total=total, desc=f'drawing ({label})', disable=not shown, leave=False) as bar:
    done = 0
    for batch in batches:
      yield batch
      done += len(batch)
      bar.update(len(batch))
      if budget.over() and done >= MINIMUM:
        break


def check_samples(samples: int, available: int) -> None:
  """Raises a UserError for fewer samples than 16, or more than there are test captions."""
  if available < MINIMUM:
    raise UserError(
      f'the test split has {available} captions, fewer than the {MINIMUM} that scores need; set '
      'loop.evaluate_samples to 0, or data.test_fraction of a folder to more, or to 0 to score on '
      'what is trained on.'
    )
  if not MINIMUM <= samples <= available:
    raise UserError(
      f'{samples} samples cannot be scored; choose {MINIMUM} to {available}, the number of test '
      'captions.'
    )


def fresh_weights(model: Diffusion, weights: Weights, mesh: Mesh, seed: int = 1) -> Weights:
  """The same model with an untrained denoiser."""
  fresh = jax.jit(model.denoiser.initialize)(jax.random.key(seed))
  return {**weights, 'denoiser': put_params(to_host(fresh), mesh)}
