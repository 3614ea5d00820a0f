"""Sets of images against one reference, by the same features and metrics.

Work is in pieces on a disk, shared by processes with devices of their own and resumed after a kill;
or features stay in memory, computed by all devices of all processes together.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Int

from diffusion_jax.data.unreadable import readable
from diffusion_jax.errors import UserError
from diffusion_jax.evaluation.extract import Extraction, Features, Images, extract, gather, reader
from diffusion_jax.evaluation.extract import column as column_of
from diffusion_jax.evaluation.extractors import load_named
from diffusion_jax.evaluation.extractors.clip import text_towers
from diffusion_jax.evaluation.images import ImageSet
from diffusion_jax.evaluation.metrics.metric import (
  Compared,
  MetricValues,
  check_metrics,
  metric_of,
  score,
  takes_reference,
  value_names,
)
from diffusion_jax.evaluation.pieces import Chunks, Keeper, Made, Thumbnails
from diffusion_jax.evaluation.statistics import Moments
from diffusion_jax.parallel.mesh import MeshConfig, make_mesh
from diffusion_jax.parallel.processes import A_DAY, agree, in_step

CHUNK = 64
"""Images of a piece: what is made again, at most, after a kill."""
READ = 256
"""Images of a set in memory at a time."""


def local_mesh() -> Mesh:
  """Return a mesh of the devices of this process alone."""
  return make_mesh(MeshConfig(), jax.local_devices()[: len(jax.devices())])


@dataclasses.dataclass(frozen=True)
class Work:
  """Images whose features are wanted: how many, their identity, and how they are made.

  make: the images of a range, for pieces; stream: the first so many, in batches, for memory. begin:
  called by all processes before any piece is made, and only then. each: names of values of single
  images.
  """

  total: int
  plan: dict[str, Any]
  make: Callable[[range], Made]
  begin: Callable[[], Any] = lambda: None
  each: tuple[str, ...] = ()
  stream: Callable[[int], Iterator[Images]] | None = None


def of_images(images: ImageSet) -> Work:
  """Return the work of reading a set of images; in memory those that can be read count."""
  plan = {'images': images.name, 'files': images.stamp}
  return Work(len(images), plan, reader(images), stream=lambda count: _blocks(images, count))


def _blocks(images: ImageSet, count: int) -> Iterator[Images]:
  pixels = (picture.pixels for picture in readable(images, range(count)))
  while block := list(itertools.islice(pixels, READ)):
    yield np.stack(block)


def features_of(
  work: Work, extraction: Extraction, directory: Path, *, most_unreadable: float = 0.0,
  keep: Keeper | None = None, label: str = '', chunk: int = CHUNK,
) -> tuple[Features, Thumbnails]:
  """Features of all of the work's images, with thumbnails; all processes must call it together.

  Each makes a part and gets the whole; `directory` has earlier pieces. UserError: too many
  unreadable images, or other results in it.
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


def compare(
  samples: Features, reference: Features | Mapping[str, Moments], metrics: Sequence[str], *,
  texts: Mapping[str, np.ndarray] | None = None, labels: Mapping[str, np.ndarray] | None = None,
  own: bool = False, seed: int = 0, intervals: bool = True,
) -> MetricValues:
  """Every metric of the samples against the reference: its features, or file statistics by column.

  texts: column -> embeddings [total d] of all samples' captions, unreadable ones included. labels:
  column -> wanted classes [total]. own: whether samples are reconstructions of the reference.
  """
  rows = lambda known, column: known[column][samples.rows] if column in (known or ()) else None
  compared = [Compared(f'image:{name}', values[:, None]) for name, values in samples.each.items()]
  for column in dict.fromkeys([*samples.columns, *samples.sums]):
    values, sums = samples.columns.get(column), samples.sums.get(column)
    width = len(sums.mean) if values is None else values.shape[1]
    features, moments = None, None
    if takes_reference(column.rpartition(':')[2]):
      if isinstance(reference, Features):
        features, moments = reference.columns.get(column), reference.statistics(column)
      else:
        moments = reference.get(column)
    if moments is not None and len(moments.mean) != width:
      raise UserError(
        f'the statistics of the reference are {len(moments.mean)} wide, but {column} is '
        f'{width}; give statistics of the same features.'
      )
    compared.append(Compared(
      column, values, moments, features, rows(texts, column), rows(labels, column), own, sums,
    ))
  scores = score(metrics, compared, seed=seed, intervals=intervals)
  scores.warnings += _read_warnings(samples, reference, compared)
  return scores


def _read_warnings(samples: Features, reference: Any, compared: Sequence[Compared]) -> list[str]:
  found = []
  if samples.errors:
    found.append(f'{len(samples.errors)} images could not be read and were left out.')
  if not isinstance(reference, Features):
    return found
  if reference.errors:
    found.append(
      f'{len(reference.errors)} images of the reference could not be read and were left out.'
    )
  edges = {samples.edge, reference.edge}
  if len(edges - {None}) == 2 and any(takes_reference(one.output) for one in compared):
    found.append(
      f'The samples are {samples.edge:g} pixels wide, the images of the reference '
      f'{reference.edge:g}: how sharp either is counts as a difference, too.'
    )
  return found


@dataclasses.dataclass(frozen=True)
class Column:
  """One set of images to score, perhaps with captions and class labels.

  keep: whether to keep them as files. place: folder of its pieces, if not the column's name.
  """

  work: Work
  captions: Sequence[str] | None = None
  keep: bool = False
  place: str = ''
  labels: Sequence[str] | None = None


class Reference(NamedTuple):
  """Images, or file statistics by column of features, that columns are compared with.

  own: whether the columns are reconstructions of these images. notes: warnings.
  """

  name: str
  images: ImageSet | None = None
  moments: Mapping[str, Moments] | None = None
  own: bool = False
  notes: tuple[str, ...] = ()

  @property
  def count(self) -> int | None:
    """Number of images, None where it is not known."""
    if self.images is not None:
      return len(self.images)
    return max((one.n or 0 for one in (self.moments or {}).values()), default=0) or None


class Pictured(NamedTuple):
  """Features of a set of images, and small pictures of them where there are some."""

  features: Features
  thumbnails: Thumbnails | None = None


def class_numbers(labels: Sequence[str], classes: Sequence[str]) -> Int[np.ndarray, 'n']:
  """Return which logits stand for names of classes. UserError, with the name, for another."""
  numbers = {name: number for number, name in enumerate(classes)}
  unknown = sorted(set(labels) - set(numbers))
  if unknown:
    raise UserError(
      f'the classifier has no class {unknown[0]!r}, which captions are of (it has '
      f'{", ".join(classes)}); give the one of these labels, or leave out class_accuracy.'
    )
  return np.asarray([numbers[label] for label in labels], np.int64)


Values = Mapping[str, Mapping[str, float]]
"""Column -> metric -> value."""


@dataclasses.dataclass
class Found:
  """Features and values of columns; first: the one with intervals, whose pictures are shown."""

  columns: dict[str, Column]
  pictured: dict[str, Pictured]
  scores: dict[str, MetricValues]
  first: str

  @property
  def values(self) -> dict[str, dict[str, float]]:
    return {name: scores.values for name, scores in self.scores.items()}

  @property
  def features(self) -> Features:
    return self.pictured[self.first].features


class Comparison:
  """Compare columns of images with a reference, which is read once.

  UserError: weights cannot be read, or an unknown metric.

  Args:
    features: KIND:PATH each. reference: a function of the extraction.
    parts: the folder of all pieces; existing ones are used. None to keep all in memory.
    captioned: whether columns have captions, which every CLIP embeds.
    most_unreadable: fraction of a set's images that may be damaged.
    computed: metrics that the features must suffice for, if more.
    kept: folder of images of columns with `keep`, and their form: one of `pieces.KINDS`.
    options: of features and metrics, named in errors.
  """

  def __init__(
    self, features: Sequence[str], metrics: Sequence[str], mesh: Mesh,
    reference: Callable[[Extraction], Reference], *, parts: Path | None = None,
    captioned: bool = True, computed: Sequence[str] = (), seed: int = 0,
    most_unreadable: float = 0.0, kept: tuple[Path, str] | None = None,
    options: tuple[str, str] = ('--features', '--metrics'),
  ):
    self.metrics, self.named, self.option = list(metrics), tuple(features), options[1]
    extractors = load_named(features, computed or metrics, mesh, options[0])
    # Sums on devices are for what is in memory: features in pieces are also those of a page.
    self.extraction = Extraction(extractors, mesh, metrics=() if parts else self.metrics)
    self.clips = text_towers(features, extractors, mesh)
    self._check_towers()
    self.reference = reference(self.extraction)
    self.parts, self.seed, self.most_unreadable, self.kept = parts, seed, most_unreadable, kept
    asked = parts or any('texts' in metric_of(name).needs for name in metrics)
    self._texts = self.clips if captioned and asked else {}
    self.pictured_reference: Pictured | None = None
    self.checked: list[tuple[str, bool]] | None = None
    """(sentence, whether it is a warning) for each CLIP, once they have been tried."""
    self._embedded: dict[tuple, dict[str, np.ndarray]] = {}

  def _check_towers(self) -> None:
    """Raise a UserError where texts are asked of CLIPs that all are image towers alone."""
    clips = [one for one in self.extraction.extractors if hasattr(one, 'has_texts')]
    asked = [name for name in self.metrics if 'texts' in metric_of(name).needs]
    if asked and clips and not self.clips:
      raise UserError(
        f'{asked[0]} needs texts, but {clips[0].name} is an image tower alone; give a CLIP with '
        f'both towers in --features, or leave {asked[0]} out of {self.option}.'
      )

  def names(self, known: Collection[str], each: Sequence[str] = ()) -> list[str]:
    """Names of all values; UserError for metrics that `known` and `each` do not suffice for.

    known: fields of `Compared`. each: values of single images.
    """
    outputs = [column.rpartition(':')[2] for column in self.extraction.columns]
    check_metrics(self.metrics, [*outputs, *each], known, self.option)
    return value_names(self.metrics, self.extraction.columns)

  def check(self, columns: Mapping[str, Column]) -> None:
    """Raise a UserError for metrics that cannot be computed of these columns."""
    known = {'moments', 'reference'}
    if self.reference.images is None:
      known = {'moments'} if self.reference.moments else set()
    known |= {'texts'} if all(column.captions for column in columns.values()) else set()
    if self.classifiers and all(column.labels for column in columns.values()):
      known.add('labels')
    self.names(known, next(iter(columns.values())).work.each)
    for one in columns.values():
      self.labels(one)

  def __call__(
    self, columns: Mapping[str, Column], choose: Callable[[Values], str] | None = None,
    say: Callable[[str], None] = print,
  ) -> Found | None:
    """Every value of every column, by all processes together; None but in the first, with pieces.

    In memory, later columns are made as long as the first has become. choose: which column is
    `Found.first`, by values; None for the first. say: reports unreadable images, and that column's
    warnings. UserError: a metric does not fit, or too many images are unreadable.
    """
    self.check(columns)
    if self.parts is None:
      pictured = self._in_memory(columns)
      return self._compared(columns, pictured, None, lambda text: None)
    pictured = {name: self._in_pieces(name, column) for name, column in columns.items()}
    self.read_reference()
    # The others wait: jax ends all when one has left long ago.
    compute = lambda: None if jax.process_index() else self._compared(
      columns, pictured, choose, say
    )
    return in_step('scores', compute, (UserError,), A_DAY)

  def _compared(
    self, columns: Mapping[str, Column], pictured: dict[str, Pictured],
    choose: Callable[[Values], str] | None, say: Callable[[str], None],
  ) -> Found:
    reference = self.read_reference()
    score = lambda name, intervals: compare(
      pictured[name].features, reference, self._metrics(columns[name]),
      texts=self.captions(columns[name]), labels=self.labels(columns[name]),
      own=self.reference.own, seed=self.seed, intervals=intervals,
    )
    first = '' if choose else next(iter(columns))
    scores = {name: score(name, bool(self.parts) and name == first) for name in columns}
    if choose:
      first = choose({name: one.values for name, one in scores.items()})
      scores[first] = score(first, True)
    scores[first].warnings[:0] = self.reference.notes
    for text in (*pictured[first].features.errors, *scores[first].warnings):
      say(f'note: {text}')
    return Found(dict(columns), pictured, scores, first)

  def _in_memory(self, columns: Mapping[str, Column]) -> dict[str, Pictured]:
    self.read_reference()  # Before the clock of a budget runs.
    found: dict[str, Pictured] = {}
    for name, column in columns.items():
      count = len(next(iter(found.values())).features.rows) if found else column.work.total
      found[name] = Pictured(self.extraction.collect(column.work.stream(count)))
    return found

  def _in_pieces(self, name: str, column: Column) -> Pictured:
    place, keep = column.place or name, None
    if self.kept and column.keep:
      folder, kind = self.kept
      keep = Keeper(folder / column.place, kind)
    return Pictured(*features_of(
      column.work, self.extraction, self.parts / place, most_unreadable=self.most_unreadable,
      keep=keep, label=name,
    ))

  def read_reference(self) -> Features | Mapping[str, Moments]:
    """Return the features of the reference, or their moments; all processes must call it."""
    if self.reference.images is None:
      return self.reference.moments
    if self.pictured_reference is None:
      column = Column(of_images(self.reference.images))
      self.pictured_reference = self._in_pieces('reference', column) if self.parts else Pictured(
        self.extraction.collect(column.work.stream(column.work.total))
      )
    return self.pictured_reference.features

  def _metrics(self, column: Column) -> list[str]:
    """Metrics that a column can have: real images, say, have no bits per dimension of a model."""
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
    """Return, by column of logits, numbers of the classes that the images should be of."""
    if 'class_accuracy' not in self.metrics or not of.labels:
      return {}
    return {name: class_numbers(of.labels, known) for name, known in self.classifiers.items()}

  def captions(self, column: Column) -> dict[str, np.ndarray]:
    """Return, by column of features, embeddings of the captions, of every CLIP."""
    if not column.captions:
      return {}
    key = tuple(column.captions)
    if key not in self._embedded:
      self._embedded[key] = {name: clip.texts(key) for name, clip in self._texts.items()}
    return self._embedded[key]
