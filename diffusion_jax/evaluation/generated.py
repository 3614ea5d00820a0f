"""Score and show what a text-to-image model samples, while it is trained and after."""

import dataclasses
import functools
import itertools
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from diffusion_jax.data.captions import read_lines
from diffusion_jax.data.unreadable import first_readable
from diffusion_jax.errors import UserError
from diffusion_jax.evaluation.comparison import (
  Column,
  Comparison,
  Found,
  Reference,
  Work,
  of_images,
)
from diffusion_jax.evaluation.evaluator import (
  EVALUATE,
  SAMPLE,
  Cached,
  Picture,
  Value,
  named,
  seed_of,
)
from diffusion_jax.evaluation.extract import Images
from diffusion_jax.evaluation.images import Split, shuffled
from diffusion_jax.evaluation.pieces import Made
from diffusion_jax.evaluation.report import clip_checks, enlarged
from diffusion_jax.parallel.mesh import put_params, to_host
from diffusion_jax.parallel.processes import agree
from diffusion_jax.pipelines.generator import Generator
from diffusion_jax.pipelines.inputs import Inputs
from diffusion_jax.pipelines.sampling import SampleConfig
from diffusion_jax.sizes import Shape
from diffusion_jax.types import Record, Source, Weights

MINIMUM = 16
SAMPLE_BATCH = 32
OPTIONS = ('settings.evaluation.features', 'settings.evaluation.metrics')


class Budget:
  """Seconds for a loop over equal batches, two at least, by the first process's clock.

  The first batch may compile its program, so it counts no more than the second.
  """

  def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic):
    self.seconds, self._clock = seconds, clock
    self._last = clock()
    self._times: list[float] = []

  def over(self) -> bool:
    """True if one batch more would take too long; after each batch, alike in all processes."""
    now = self._clock()
    self._times.append(now - self._last)
    self._last = now
    if not self.seconds or len(self._times) < 2:
      return False
    spent = sum(self._times[1:]) + min(self._times[:2])
    return agree('evaluation', str(spent + self._times[-1] > self.seconds))[0] == 'True'


@dataclasses.dataclass(frozen=True, eq=False)
class CaptionPreview:
  """Images of fixed captions and noise.

  inputs: other conditions. batch_size: the evaluation's, to share its compiled program. sizes:
  (height, width) that the captions take in turn; () for those of training.
  """

  captions: Sequence[str]
  sample: SampleConfig
  mesh: Mesh
  about: str = 'Drawn for these captions, from the same noise each time.'
  batch_size: int = SAMPLE_BATCH
  inputs: Callable[[], Inputs] = Inputs
  sizes: Sequence[Shape] = ()
  name = 'caption_preview'
  when = SAMPLE

  def run(self, model: Generator, params: Weights, key: jax.Array) -> Iterator[tuple[str, Value]]:
    captions, images = list(self.captions), {}
    sizes = (self.sizes or ((None, None),))[: len(captions)]
    for first, (height, width) in enumerate(sizes):
      mine = range(first, len(captions), len(sizes))
      drawn = model.generate(
        params, [captions[i] for i in mine], self.sample, seed=seed_of(key), mesh=self.mesh,
        batch_size=self.batch_size, inputs=self.inputs(), height=height, width=width,
      )
      images |= dict(zip(mine, itertools.chain.from_iterable(drawn), strict=True))
    yield 'samples', Picture([images[i] for i in range(len(captions))], captions, self.about)


@dataclasses.dataclass(frozen=True)
class Prompts:
  """Captions to sample images of; labels: the class of each, if known.

  records: of the test split that the captions are of; source: its name.
  """

  captions: Sequence[str]
  labels: Sequence[str] = ()
  records: Sequence[Record] | None = None
  source: str = ''

  @classmethod
  def of(
    cls, test: Source, samples: int, caption: Callable[[Record], str],
    source: str = 'the test split',
  ) -> 'Prompts':
    """Return those of a random subset of test records. UserError for too few or too many."""
    check_samples(samples, len(test))
    records = shuffled(test, samples)
    check_samples(len(records), len(test))
    labels = [record['label'] for record in records if 'label' in record]
    return cls([caption(record) for record in records], labels, records, source)


  @classmethod
  def read(cls, captions: str, labels: str = '', samples: int | None = None) -> 'Prompts':
    """The first `samples`, or all, of files of captions and labels, one a line; or UserError."""
    found, known = _lines(captions, 'captions'), _lines(labels, 'labels') if labels else []
    if samples is not None and not 1 <= samples <= len(found):
      raise UserError(
        f'--samples is {samples}, but {captions} has {len(found)} captions; choose 1 to '
        f'{len(found)}, or leave it out for all.'
      )
    if known and len(known) != len(found):
      raise UserError(
        f'{labels} has {len(known)} labels, but {captions} {len(found)} captions; write one label '
        'for each.'
      )
    return cls(found[:samples], known[:samples])


def _lines(path: str, what: str) -> list[str]:
  found = read_lines(path, what)
  if not found:
    raise UserError(f'{path} has no {what}; write one a line.')
  return found


@dataclasses.dataclass(frozen=True)
class PerImage:
  """Values of single images, by `names`; compute: (weights, range of images) -> [n] by name."""

  names: tuple[str, ...]
  plan: dict[str, Any]
  compute: Callable[[Weights, range], dict[str, np.ndarray]]


@dataclasses.dataclass(frozen=True, eq=False)
class GeneratedImages(Cached):
  """Sample one image for each of the first `samples` test captions and score it.

  Columns are 'generated', and as baselines 'untrained' (fresh weights) and 'real' (test images of
  the same captions). The reference is the training split, so real test images have values of their
  own: the floor of a perfect model. `run` raises a UserError below 16 samples, or for more than the
  test split has captions.

  Attributes:
    features: KIND:PATH each; scored_by: names of `registry.METRICS`.
    seconds: budget of sampling and features without compilation; then it ends with fewer samples,
      16 and two batches at least. 0 for none.
    prompts, scorer: in place of the test captions, and of features and scored_by.
    each: values of the model for each caption, such as the bits of its real image.
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
  batch_size: int = SAMPLE_BATCH
  prompts: Prompts | None = None
  scorer: Comparison | None = None
  each: PerImage | None = None
  name = 'generated_images'
  when = EVALUATE

  @property
  def comparison(self) -> Comparison:
    """The comparison of all evaluations; its networks are loaded at first use."""
    reference = Reference('the training split', Split(self.train, 'the training split'))
    return self.scorer or self.once('comparison', lambda: Comparison(
      self.features, self.scored_by, self.mesh, lambda _: reference, options=OPTIONS
    ))

  @property
  def metrics(self) -> list[str]:
    """Names of all values; UserError: unreadable features, or a wrong number of samples."""
    check_samples(self.samples, len(self.test))
    known = ('labels',) if 'label' in first_readable(self.test, 1)[0] else ()
    return self.comparison.names(('moments', 'reference', 'texts', *known))

  def run(self, model: Generator, params: Weights, key: jax.Array) -> Iterator[tuple[str, Value]]:
    comparison, seed = self.comparison, seed_of(key)
    prompts = self.prompts or Prompts.of(self.test, self.samples, model.prompt)
    self._try_clips()
    found = self.found(model, lambda: params, seed, prompts)
    samples = len(found.features.rows)
    yield from named(found.values)
    checked, reference = comparison.checked, len(comparison.read_reference().rows)
    yield 'measured', [
      f'Of {samples:,} images, each sampled for a test caption, against {reference:,} images of '
      'the training split.',
      *enlarged(comparison, max(model.trained_size)),
      *(text for text, warns in checked if not warns),
    ]
    yield 'warnings', [
      *(text for text, warns in checked if warns), *found.scores[found.first].warnings
    ]
    yield 'settings', {
      'samples': samples, 'reference_images': reference, 'seed': seed,
      'features': ', '.join(one.name for one in comparison.extraction.extractors),
      **dataclasses.asdict(self.sample),
    }

  def _try_clips(self) -> None:
    if self.comparison.checked is None:
      checked = clip_checks(self.comparison, self.test)
      for text in [text for text, warns in checked if warns and jax.process_index() == 0]:
        print(f'diffusion_jax train: {text}', file=sys.stderr)

  def found(
    self, model: Generator, weights: Callable[[], Weights], seed: int, prompts: Prompts, *,
    names: Mapping[str, str] | None = None, place: str = '',
  ) -> Found | None:
    """All columns; None but in the first process, with pieces. place: folder of 'generated'.

    names: of the model with its weights, by column.
    """
    names, count = names or {}, len(prompts.captions)
    column = functools.partial(self.column, model, prompts=prompts, seed=seed)
    columns = {'generated': column(
      weights, names.get('generated', ''), keep=True, place=place,
      within=lambda batches: _within(Budget(self.seconds), batches, count, 'generated'),
    )}
    if self.baselines:
      fresh = functools.cache(lambda: fresh_weights(model, weights(), self.mesh))
      columns['untrained'] = column(
        fresh, names.get('untrained', ''),
        within=lambda batches: _within(Budget(0), batches, count, 'untrained'),
      )
      columns |= self.real(prompts)
    return self.comparison(columns)

  def column(
    self, model: Generator, weights: Callable[[], Weights], name: str, *, prompts: Prompts,
    seed: int, sample: SampleConfig | None = None, keep: bool = False, place: str = '',
    within: Callable[[Iterator[Images]], Iterator[Images]] = iter,
  ) -> Column:
    """An image for each caption; image i depends on the seed and i alone.

    weights: first called by all processes together, when sampling starts. name: of the model with
    them. within: context of the batches in memory.
    """
    sample, each = sample or self.sample, self.each
    labels = prompts.labels if model.takes_classes else ()
    generate = functools.partial(
      model.generate, config=sample, seed=seed, mesh=self.mesh, batch_size=self.batch_size
    )

    def draw(items: range) -> Iterator[Images]:
      part = slice(items.start, items.stop)
      classes = {'inputs': Inputs(classes=tuple(labels[part]))} if labels else {}
      return generate(weights(), prompts.captions[part], first=items.start, **classes)

    def make(items: range) -> Made:
      batches = draw(items)
      images = list(itertools.chain.from_iterable(batches))
      return Made(images, [''] * len(images), each.compute(weights(), items) if each else {})

    plan = {'model': name, 'captions': list(prompts.captions), 'seed': seed,
            'sample': dataclasses.asdict(sample), **(each.plan if each else {}),
            **({'labels': list(labels)} if labels else {})}
    stream = lambda count: within(draw(range(count)))
    work = Work(len(prompts.captions), plan, make, weights, each.names if each else (), stream)
    return Column(work, prompts.captions, keep, place, prompts.labels)

  def real(self, prompts: Prompts) -> dict[str, Column]:
    """Return 'real', the test images of the captions, where these are the test split's."""
    if prompts.records is None:
      return {}
    images = Split(prompts.records, f'{len(prompts.records)} of {prompts.source}')
    return {'real': Column(of_images(images), prompts.captions, labels=prompts.labels)}


def _within(budget: Budget, batches: Iterator[Images], total: int, label: str) -> Iterator[Images]:
  """Yield batches until the budget is spent, 16 images at least."""
  shown = jax.process_index() == 0
  with tqdm(total=total, desc=f'sampling ({label})', disable=not shown, leave=False) as bar:
    done = 0
    for batch in batches:
      yield batch
      done += len(batch)
      bar.update(len(batch))
      if budget.over() and done >= MINIMUM:
        break


def check_samples(samples: int, available: int) -> None:
  """Raise a UserError for fewer samples than 16, or more than there are test captions."""
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


def fresh_weights(model: Generator, weights: Weights, mesh: Mesh, seed: int = 1) -> Weights:
  """Return weights of the same model with those of the networks that draw untrained."""
  weights, key = dict(weights), jax.random.key(seed)
  for number, role in enumerate(model.drawn_by):
    own = jax.random.fold_in(key, number) if number else key
    fresh = jax.jit(model.networks[role].initialize)(own)
    weights[role] = put_params(to_host(fresh), mesh)
  return weights
