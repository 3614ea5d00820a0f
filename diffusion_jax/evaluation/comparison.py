"""Sets of pictures against one reference: the same features, metrics and pieces for all of them."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from diffusion_jax.errors import UserError
from diffusion_jax.evaluation.extraction import Extraction, Features
from diffusion_jax.evaluation.extraction import column as column_of
from diffusion_jax.evaluation.features import CLIPFeatures
from diffusion_jax.evaluation.figures import figure_names
from diffusion_jax.evaluation.images import ImageSet
from diffusion_jax.evaluation.keeping import Keeper, Thumbnails
from diffusion_jax.evaluation.offline import Work, compare, features_of, of_images
from diffusion_jax.evaluation.scores import METRICS, Scores, check_metrics
from diffusion_jax.evaluation.showing import (
  best_and_worst,
  class_numbers,
  clouds,
  near_copies,
  reconstructions,
  worst_classes,
)
from diffusion_jax.evaluation.statistics import Moments
from diffusion_jax.parallel.processes import A_DAY, in_step


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


Figures = Mapping[str, Mapping[str, float]]
"""Column -> figure -> value."""


@dataclasses.dataclass
class Found:
  """What became of the columns, by name: their features and their figures.

  first: the column that has intervals, and whose pictures are shown.
  """

  columns: dict[str, Column]
  pictured: dict[str, Pictured]
  scores: dict[str, Scores]
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
    self._reference: Pictured | None = None
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
    if self._classifiers and all(column.labels for column in columns.values()):
      known.add('labels')
    check_metrics(self.metrics, outputs, known)
    figure_names(self.metrics, self.extraction.columns)  # Whether each has a name of its own.
    for one in columns.values():
      self._labels(one)

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
    reference = self._read_reference()
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
      pictured[name].features, reference, self._metrics(column), texts=self._captions(column),
      labels=self._labels(column), own=self.reference.own, seed=self.seed, intervals=intervals,
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

  def _read_reference(self) -> Features | Mapping[str, Moments]:
    if self.reference.images is None:
      return self.reference.moments
    if self._reference is None:
      self._reference = Pictured(*features_of(
        of_images(self.reference.images), self.extraction, self.parts / 'reference',
        most_unreadable=self.most_unreadable, label='reference',
      ))
    return self._reference.features

  def _metrics(self, column: Column) -> list[str]:
    """Those that a column can have: real images, say, have no bits per dimension of a model."""
    own = {*column.work.each}
    return [m for m in self.metrics if not METRICS[m].source or own & {*METRICS[m].outputs}]

  @property
  def _classifiers(self) -> dict[str, tuple[str, ...]]:
    """Column of features that are logits -> the classes that they stand for."""
    return {
      column_of(one, 'logits'): one.class_names
      for one in self.extraction.extractors if hasattr(one, 'class_names')
    }

  def _labels(self, of: Column) -> dict[str, np.ndarray]:
    """Column of logits -> numbers of the classes that the pictures should be of."""
    if 'class_accuracy' not in self.metrics or not of.labels:
      return {}
    return {name: class_numbers(of.labels, known) for name, known in self._classifiers.items()}

  def _captions(self, column: Column) -> dict[str, np.ndarray]:
    """Column of features -> embeddings of the captions, of every CLIP."""
    if not column.captions:
      return {}
    key = tuple(column.captions)
    if key not in self._embedded:
      self._embedded[key] = {name: clip.texts(key) for name, clip in self._texts.items()}
    return self._embedded[key]

  def shown(self, found: Found) -> dict[str, Any]:
    """What a page shows of the first column beside its figures; see `viz.evaluation`."""
    first = found.first
    pictured, column, shown = found.pictured[first], found.columns[first], {}
    if self._reference is not None:
      shown = {'clouds': clouds(pictured.features, self._reference.features)}
      if self.reference.own:
        shown['reconstructions'] = reconstructions(*pictured, self._reference.thumbnails)
      else:
        shown['pairs'] = near_copies(*pictured, *self._reference)
    shown |= self._worst_classes(found, first)
    texts = self._captions(column)
    if texts:
      features, rows = next(iter(texts.items()))
      shown |= best_and_worst(*pictured, features, rows, column.captions)
    return shown

  def _worst_classes(self, found: Found, first: str) -> dict[str, Any]:
    if 'class_accuracy' not in self.metrics:
      return {}
    (name, known), = self._classifiers.items()
    return {'classes': worst_classes({
      one: (found.pictured[one].features, self._labels(found.columns[one])[name])
      for one in (first, 'untrained', 'real') if one in found.columns
    }, name, known)}
