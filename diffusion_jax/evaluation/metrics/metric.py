"""A metric as one object: how it is computed, of what, which way is better, what it is called."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable

import numpy as np
from jaxtyping import Float, Int

from diffusion_jax.errors import UserError
from diffusion_jax.evaluation.metrics.bootstrap import Interval, bootstrap_mean
from diffusion_jax.evaluation.statistics import PART, Moments, Statistics

LOWER, HIGHER = 'lower', 'higher'
POOLED = ('pool3', 'embedding', 'cls', 'penultimate')
"""Outputs of extractors that are one vector for each image, by which sets are compared."""
OF_SETS = ('features', 'reference', 'reference_images', 'samples')
"""What must be the same for values of two whole sets to be compared."""
FAMILIES = {'clip': 'CLIP', 'dinov2': 'DINOv2', 'classifier': "the classifier's"}
"""Networks whose features have values with names of their own; Inception's stand alone."""


@dataclasses.dataclass(frozen=True, eq=False)
class Compared:
  """One kind of features of the samples beside those of the reference.

  column: which, `EXTRACTOR:OUTPUT`. samples: [n d], or None where only their `sums` are kept.
  reference: [m d], or None where only its `moments` are known. texts: [n d], of the samples'
  captions in the same space, if there are any. labels: [n], the classes that the samples should be
  of, as numbers of the classifier's logits. own: whether the samples are reconstructions of the
  reference, whose values have other names.
  """

  column: str
  samples: Float[np.ndarray, 'n d'] | None
  moments: Moments | None = None
  reference: Float[np.ndarray, 'm d'] | None = None
  texts: Float[np.ndarray, 'n d'] | None = None
  labels: Int[np.ndarray, 'n'] | None = None
  own: bool = False
  sums: Statistics | None = None

  @functools.cached_property
  def statistics(self) -> Statistics:
    """Of the samples."""
    return Statistics.from_features(self.samples) if self.sums is None else self.sums

  @property
  def family(self) -> str:
    """inception, clip, dinov2, classifier ..."""
    return self.column.partition(':')[0].partition('/')[0]

  @property
  def output(self) -> str:
    return self.column.rpartition(':')[2]

  @property
  def suffix(self) -> str:
    """What tells a value of these features from Inception's, whose names stand alone."""
    return '' if self.family == 'inception' else f'_{self.family}'

  @property
  def distance(self) -> str:
    """Name of the Fréchet distance: fid, sfid or fd_FAMILY; rfid ... of reconstructions."""
    name = f'fd{self.suffix}' if self.suffix else {'spatial': 'sfid'}.get(self.output, 'fid')
    return f'r{name}' if self.own else name


@dataclasses.dataclass
class MetricValues:
  """values: name -> value. intervals: name -> its interval. warnings: sentences.

  with_intervals: whether to compute those that take resampling.
  """

  with_intervals: bool = True
  values: dict[str, float] = dataclasses.field(default_factory=dict)
  intervals: dict[str, Interval] = dataclasses.field(default_factory=dict)
  warnings: list[str] = dataclasses.field(default_factory=list)

  def add(self, name: str, value: float, interval: Interval | None = None) -> None:
    """Add one value; a name is used once."""
    if name in self.values:
      raise UserError(f'{name} would be computed twice; name each kind of features once.')
    self.values[name] = float(value)
    if interval is not None:
      self.intervals[name] = interval

  def add_mean(self, name: str, each: Float[np.ndarray, 'n'], seed: int) -> None:
    """Add the mean of values of single images, with its interval."""
    wanted = self.with_intervals and len(each) > 1 and bool(np.isfinite(each).all())
    self.add(name, each.mean(), bootstrap_mean(each, seed=seed) if wanted else None)


@dataclasses.dataclass(frozen=True)
class Value:
  """A value that a metric gives.

  name: in which {suffix} and {distance} depend on the features, see `Compared`, and {k} and {n} are
  numbers. title: for people; {features} is the network's. better: 'lower', 'higher', or '' where
  neither is. comparable_on: settings in which two evaluations must agree for their values to be
  compared. family: of the features, where the name does not tell it. alone: the title where the
  features are Inception's.
  """

  name: str
  title: str
  better: str = ''
  comparable_on: tuple[str, ...] = ()
  family: str = ''
  alone: str = ''

  def match(self, name: str) -> re.Match | None:
    """Match a whole name; the group 'family' is that of the features."""
    pattern = re.escape(self.name).replace(r'\{suffix\}', '(_(?P<family>.+?))?')
    pattern = pattern.replace(r'\{distance\}', 'r?(fid|sfid|fd_(?P<family>.+?))')
    return re.fullmatch(re.sub(r'\\{(k|n)\\}', r'(?P<\1>\\d+)', pattern), name)

  @property
  def literal(self) -> int:
    """Number of characters of the name that are as they are."""
    return len(re.sub(r'{\w+}', '', self.name))

  def titled(self, name: str, family: str) -> str:
    """Return the title of a value of that name, with an arrow that says which way is better."""
    numbers = {key: int(value) for key, value in self.match(name).groupdict().items()
               if key in ('k', 'n')}
    title = self.title.format(features=FAMILIES.get(family, family), **numbers)
    if self.alone and family == 'inception':
      title = f'{name.partition("fid")[0] if "fid" in name else ""}{self.alone}'
    return title + {LOWER: ' ↓', HIGHER: ' ↑'}.get(self.better, '')


@dataclasses.dataclass(frozen=True)
class Metric:
  """compute: (compared, values, seed), adds its values. outputs: of an extractor that it can be
  computed of, or the value of single images that it is the mean of ('image:NAME'). needs: fields of
  `Compared` that it cannot do without. title, better, comparable_on: as of a `Value`, for a metric
  with one, called as it is; or `values`. source: where outputs come from that are no features.
  of_moments: whether it sees no features but through their mean and covariance.
  """

  name: str
  compute: Callable[[Compared, MetricValues, int], None]
  outputs: tuple[str, ...]
  needs: tuple[str, ...] = ('reference',)
  title: str = ''
  better: str = ''
  comparable_on: tuple[str, ...] = ('features',)
  values: tuple[Value, ...] = ()
  source: str = ''
  of_moments: bool = False

  @property
  def given(self) -> tuple[Value, ...]:
    """What it gives."""
    own = Value(self.name, self.title or self.name, self.better, self.comparable_on)
    return self.values or (own,)

  def names(self, of: Compared) -> list[str]:
    """Return the names of its values of these features."""
    return [value.name.format(suffix=of.suffix, distance=of.distance) for value in self.given]


def of_each(of: Compared, values: MetricValues, seed: int) -> None:
  """Add the mean of a value of single images, by its own name."""
  values.add_mean(of.output, of.samples[:, 0], seed)


def matrix(x: np.ndarray, name: str, dtype: type | None = np.float64) -> Float[np.ndarray, 'n d']:
  """x as an array of that type or its own. UserError if it is no matrix, empty or not finite."""
  x = np.asarray(x, dtype)
  if x.ndim != 2 or x.size == 0:
    raise UserError(f'The {name} must be a non-empty [n d] array, not {list(x.shape)}: check them.')
  parts = (x[i : i + PART] for i in range(0, len(x), PART))
  if not all(np.isfinite(part).all() for part in parts):
    raise UserError(f'The {name} hold NaN or infinite values: check the images and the weights.')
  return x


def pair(
  x: np.ndarray, y: np.ndarray, dtype: type | None = np.float64
) -> tuple[Float[np.ndarray, 'n d'], Float[np.ndarray, 'm d']]:
  """Two sets of features. UserError as in `matrix`, or if their widths differ."""
  x, y = matrix(x, 'features', dtype), matrix(y, 'features', dtype)
  if x.shape[1] != y.shape[1]:
    raise UserError(
      f'Features of width {x.shape[1]} and {y.shape[1]} cannot be compared: compute both with '
      'the same feature extractor.'
    )
  return x, y
