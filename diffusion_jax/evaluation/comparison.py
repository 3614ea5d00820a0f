"""The evaluation job: samples and a reference -> features -> figures. See `cli.evaluate`.

Sets of pictures against one reference: the same features, metrics and pieces for all of them.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Int

from diffusion_jax.errors import UserError
from diffusion_jax.evaluation.extract import Extraction, Features, extract, gather, reader
from diffusion_jax.evaluation.extract import column as column_of
from diffusion_jax.evaluation.extractors.clip import CLIPFeatures
from diffusion_jax.evaluation.images import ImageSet
from diffusion_jax.evaluation.metrics.metric import Compared, MetricValues
from diffusion_jax.evaluation.pieces import Chunks, Keeper, Made, Thumbnails
from diffusion_jax.evaluation.scores import (
  check_metrics,
  metric_of,
  score,
  takes_reference,
  value_names,
)
from diffusion_jax.evaluation.statistics import Moments
from diffusion_jax.parallel.mesh import MeshConfig, make_mesh
from diffusion_jax.parallel.processes import A_DAY, agree, in_step
from diffusion_jax.pipelines.model import Diffusion
from diffusion_jax.pipelines.sampling import SampleConfig
from diffusion_jax.types import Weights

CHUNK = 64
"""Images of a piece: what is made again, at most, after a kill."""


def local_mesh() -> Mesh:
  """A mesh of the devices of this process alone."""
  return make_mesh(MeshConfig(), jax.local_devices()[: len(jax.devices())])


@dataclasses.dataclass(frozen=True)
class Work:
  """Images whose features are wanted: how many, what decides them, and how they are made.

  begin: called by all processes together before any image is made, and only then. each: the figures
  of single images that come of making them.
  """

  total: int
  plan: dict[str, Any]
  make: Callable[[range], Made]
  begin: Callable[[], Any] = lambda: None
  each: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class FiguresOf:
  """Figures of single images: their names, what decides them, and a function of a model's weights
  and a range of images that computes them, [n] each."""

  names: tuple[str, ...]
  plan: dict[str, Any]
  compute: Callable[[Weights, range], dict[str, np.ndarray]]


def of_images(images: ImageSet) -> Work:
  """The work of reading a set of images."""
  return Work(len(images), {'images': images.name, 'files': images.stamp}, reader(images))


def of_model(
  model: Diffusion, weights: Callable[[], Weights], name: str, captions: Sequence[str],
  sample: SampleConfig, *, seed: int, mesh: Mesh, batch_size: int = 16,
  figures: FiguresOf | None = None,
) -> Work:
  """The work of drawing an image for each caption; image i depends on the seed and i alone.

  Args:
    weights: gives them on `mesh`; first called by all processes together, when there is something
      to draw.
    name: of the model with its weights, such as a run and its step.
    figures: what else is wanted of the model for each caption, such as the bits of its real image.
  """

  def make(items: range) -> Made:
    images = [image for batch in model.generate(
      weights(), captions[items.start : items.stop], sample, seed=seed, mesh=mesh,
      batch_size=batch_size, first=items.start,
    ) for image in batch]
    each = figures.compute(weights(), items) if figures else {}
    return Made(images, [''] * len(images), each)

  plan = {'model': name, 'captions': list(captions), 'seed': seed,
          'sample': dataclasses.asdict(sample), **(figures.plan if figures else {})}
  return Work(len(captions), plan, make, weights, figures.names if figures else ())


def features_of(
  work: Work, extraction: Extraction, directory: Path, *, most_unreadable: float = 0.0,
  keep: Keeper | None = None, label: str = '', chunk: int = CHUNK,
) -> tuple[Features, Thumbnails]:
  """The features of all of the work's images, of which `directory` has what was done before.

  And small pictures of them.

  All processes must call it together; each makes its share, and all get the whole.

  Raises:
    UserError: too many images cannot be read, or the directory holds other results.
  """
  plan = {**work.plan, **extraction.plan}
  if work.each:
    plan['each'] = sorted(work.each)
  chunks = Chunks(directory, plan, total=work.total, size=chunk)
  # Pictures that an earlier start has not kept have to be made once more.
  missing = chunks.missing((lambda items: not keep.has(items)) if keep else None)
  if any(map(json.loads, agree('features/missing', json.dumps(bool(missing))))):
    work.begin()
    extract(chunks, work.make, extraction, missing=missing, keep=keep, label=label)
    agree('features/made', '')
  return gather(chunks, most_unreadable), Thumbnails(chunks)


def _known(
  reference: Features | dict[str, Moments], column: str
) -> tuple[np.ndarray | None, Moments | None]:
  """The reference's features, where there are any, and their moments."""
  if not isinstance(reference, Features):
    return None, reference.get(column)
  return reference.columns.get(column), reference.statistics(column)


def compare(
  samples: Features, reference: Features | dict[str, Moments], metrics: Sequence[str], *,
  texts: dict[str, np.ndarray] | None = None, labels: dict[str, np.ndarray] | None = None,
  own: bool = False, seed: int = 0, intervals: bool = True,
) -> MetricValues:
  """Every metric of the samples against the reference.

  Args:
    reference: its features, or what is known of them by column, from files of statistics.
    texts: column -> embeddings [total d] of the captions of all samples, unreadable ones too.
    labels: column -> numbers [total] of the classes that they should be of.
    own: whether the samples are reconstructions of the reference.
    intervals: whether to compute those that take resampling.
  """
  rows = lambda known, column: known[column][samples.rows] if column in (known or ()) else None
  compared = [Compared(f'image:{name}', values[:, None]) for name, values in samples.each.items()]
  for column in dict.fromkeys([*samples.columns, *samples.sums]):
    values, sums = samples.columns.get(column), samples.sums.get(column)
    width = len(sums.mean) if values is None else values.shape[1]
    there, moments = None, None
    if takes_reference(column.rpartition(':')[2]):
      there, moments = _known(reference, column)
    if moments is not None and len(moments.mean) != width:
      raise UserError(
        f'the statistics of the reference are {len(moments.mean)} wide, but {column} is '
        f'{width}; give statistics of the same features.'
      )
    compared.append(Compared(
      column, values, moments, there, rows(texts, column), rows(labels, column), own,
      sums,
    ))
  scores = score(metrics, compared, seed=seed, intervals=intervals)
  if samples.trouble:
    scores.warnings.append(f'{len(samples.trouble)} images could not be read and were left out.')
  if isinstance(reference, Features) and reference.trouble:
    scores.warnings.append(
      f'{len(reference.trouble)} images of the reference could not be read and were left out.'
    )
  if isinstance(reference, Features) and None not in (samples.edge, reference.edge):
    if samples.edge != reference.edge and any(takes_reference(one.output) for one in compared):
      scores.warnings.append(
        f'The samples are {samples.edge:g} pixels wide, the images of the reference '
        f'{reference.edge:g}: how sharp either is counts as a difference, too.'
      )
  return scores


@dataclasses.dataclass(frozen=True)
class Column:
  """One set of pictures to score: the work of making them, and their captions if they have some.

  keep: whether they are among those that are kept as files. place: name of the folder of its
  pieces, where that is not the column's own name. labels: the class of each, where it is known.
  """

  work: Work
  captions: Sequence[str] | None = None
  keep: bool = False
  place: str = ''
  labels: Sequence[str] | None = None


class Reference(NamedTuple):
  """What columns are compared with: images, or what files of statistics say, by column of features.

  own: whether the columns are reconstructions of these very images. notes: what to beware of, for
  people.
  """

  name: str
  images: ImageSet | None = None
  moments: Mapping[str, Moments] | None = None
  own: bool = False
  notes: tuple[str, ...] = ()

  @property
  def count(self) -> int | None:
    """Number of images; None where files of statistics do not tell it."""
    if self.images is not None:
      return len(self.images)
    return max((one.n or 0 for one in (self.moments or {}).values()), default=0) or None


class Pictured(NamedTuple):
  """The features of a set of pictures, and small pictures of them where there are some."""

  features: Features
  thumbnails: Thumbnails | None = None


def class_numbers(labels: Sequence[str], classes: Sequence[str]) -> Int[np.ndarray, 'n']:
  """Names of classes -> which logits stand for them. UserError, with the name, for another."""
  numbers = {name: number for number, name in enumerate(classes)}
  unknown = sorted(set(labels) - set(numbers))
  if unknown:
    raise UserError(
      f'the classifier has no class {unknown[0]!r}, which captions are of (it has '
      f'{", ".join(classes)}); give the one of these labels, or leave out class_accuracy.'
    )
  return np.asarray([numbers[label] for label in labels], np.int64)


Figures = Mapping[str, Mapping[str, float]]
"""Column -> figure -> value."""


@dataclasses.dataclass
class Found:
  """What became of the columns, by name: their features and their figures.

  first: the column that has intervals, and whose pictures are shown.
  """

  columns: dict[str, Column]
  pictured: dict[str, Pictured]
  scores: dict[str, MetricValues]
  first: str

  def told(self) -> dict[str, Any]:
    """Figures of every column, then intervals and warnings of the first: JSON-ready."""
    one = self.scores[self.first]
    return {name: scores.values for name, scores in self.scores.items()} | {
      'intervals': {name: interval._asdict() for name, interval in one.intervals.items()},
      'warnings': one.warnings,
    }


class Comparison:
  """Compares columns of pictures with a reference, which is read once.

  Args:
    texts: column of features -> the CLIP that embeds captions in the same space.
    named: the features, KIND:PATH each.
    parts: the folder of all pieces; what it has is not made again.
    most_unreadable: share of a set's images that may be damaged.
    kept: where pictures of columns with `keep` go, and as what: one of `keeping.KINDS`.
  """

  def __init__(
    self, extraction: Extraction, metrics: Sequence[str], reference: Reference, parts: Path, *,
    texts: Mapping[str, CLIPFeatures], named: Sequence[str] = (), seed: int = 0,
    most_unreadable: float = 0.0,
    kept: tuple[Path, str] | None = None,
  ):
    self.extraction, self.metrics, self.reference = extraction, list(metrics), reference
    self.parts, self.seed, self.most_unreadable, self.kept = parts, seed, most_unreadable, kept
    self._texts, self.named = texts, tuple(named)
    self.read_reference: Pictured | None = None
    self.checked: list[tuple[str, bool]] | None = None
    """What its CLIPs make of real pictures, once that has been tried: (sentence, whether to
    beware)."""
    self._embedded: dict[tuple, dict[str, np.ndarray]] = {}

  def check(self, columns: Mapping[str, Column]) -> None:
    """Raises a UserError for metrics that cannot be computed of these columns."""
    known = {'moments', 'reference'}
    if self.reference.images is None:
      known = {'moments'} if self.reference.moments else set()
    known |= {'texts'} if all(column.captions for column in columns.values()) else set()
    outputs = [column.rpartition(':')[2] for column in self.extraction.columns]
    outputs += next(iter(columns.values())).work.each
    if self.classifiers and all(column.labels for column in columns.values()):
      known.add('labels')
    check_metrics(self.metrics, outputs, known)
    value_names(self.metrics, self.extraction.columns)  # Whether each has a name of its own.
    for one in columns.values():
      self.labels(one)

  def __call__(
    self, columns: Mapping[str, Column], choose: Callable[[Figures], str] | None = None,
    say: Callable[[str], None] = print,
  ) -> Found | None:
    """Every figure of every column; None but in the first process. All must call it together.

    Args:
      choose: of the columns' figures, which one is `first` and so has intervals; None for the one
        that is named first.
      say: is told of images that cannot be read and of what to beware of in that column.

    Raises:
      UserError: a metric does not fit, or too many images cannot be read.
    """
    self.check(columns)
    pictured = {name: self._pictured(name, column) for name, column in columns.items()}
    reference = self._reference_features()
    compute = lambda: self._compared(columns, pictured, reference, choose, say)
    return in_step('scores', compute, (UserError,), A_DAY)

  def _compared(
    self, columns: Mapping[str, Column], pictured: dict[str, Pictured],
    reference: Features | Mapping[str, Moments], choose: Callable[[Figures], str] | None,
    say: Callable[[str], None],
  ) -> Found | None:
    """In the first process, for which the others wait: jax ends all when one has left long ago."""
    if jax.process_index():
      return None
    score = lambda name, column, intervals=False: compare(
      pictured[name].features, reference, self._metrics(column), texts=self.captions(column),
      labels=self.labels(column), own=self.reference.own, seed=self.seed, intervals=intervals,
    )
    first = '' if choose else next(iter(columns))
    scores = {name: score(name, column, name == first) for name, column in columns.items()}
    if choose:
      first = choose({name: one.values for name, one in scores.items()})
      scores[first] = score(first, columns[first], intervals=True)
    scores[first].warnings[:0] = self.reference.notes
    for text in (*pictured[first].features.trouble, *scores[first].warnings):
      say(f'note: {text}')
    return Found(dict(columns), pictured, scores, first)

  def _pictured(self, name: str, column: Column) -> Pictured:
    keep = None
    if self.kept and column.keep:
      folder, kind = self.kept
      keep = Keeper(folder / column.place if column.place else folder, kind)
    return Pictured(*features_of(
      column.work, self.extraction, self.parts / (column.place or name),
      most_unreadable=self.most_unreadable, keep=keep, label=name,
    ))

  def _reference_features(self) -> Features | Mapping[str, Moments]:
    if self.reference.images is None:
      return self.reference.moments
    if self.read_reference is None:
      self.read_reference = Pictured(*features_of(
        of_images(self.reference.images), self.extraction, self.parts / 'reference',
        most_unreadable=self.most_unreadable, label='reference',
      ))
    return self.read_reference.features

  def _metrics(self, column: Column) -> list[str]:
    """Those that a column can have: real images, say, have no bits per dimension of a model."""
    own = {*column.work.each}
    return [m for m in self.metrics if not metric_of(m).source or own & {*metric_of(m).outputs}]

  @property
  def classifiers(self) -> dict[str, tuple[str, ...]]:
    """Column of features that are logits -> the classes that they stand for."""
    return {
      column_of(one, 'logits'): one.class_names
      for one in self.extraction.extractors if hasattr(one, 'class_names')
    }

  def labels(self, of: Column) -> dict[str, np.ndarray]:
    """Column of logits -> numbers of the classes that the pictures should be of."""
    if 'class_accuracy' not in self.metrics or not of.labels:
      return {}
    return {name: class_numbers(of.labels, known) for name, known in self.classifiers.items()}

  def captions(self, column: Column) -> dict[str, np.ndarray]:
    """Column of features -> embeddings of the captions, of every CLIP."""
    if not column.captions:
      return {}
    key = tuple(column.captions)
    if key not in self._embedded:
      self._embedded[key] = {name: clip.texts(key) for name, clip in self._texts.items()}
    return self._embedded[key]
