"""Metrics by name, one object each: inputs, values, titles, and which way is better."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

import numpy as np
from jaxtyping import Float, Int

from diffusion_jax.errors import UserError
from diffusion_jax.evaluation.metrics.bootstrap import Interval, bootstrap_mean
from diffusion_jax.evaluation.statistics import PART, Moments, Statistics
from diffusion_jax.registry import METRICS, import_plugins, load

LOWER, HIGHER = 'lower', 'higher'
POOLED = ('pool3', 'embedding', 'cls', 'penultimate')
"""Outputs of extractors that are one vector for each image, by which sets are compared."""
OF_SETS = ('features', 'reference', 'reference_images', 'samples')
"""Settings that must be the same for values of two whole sets to be compared."""
FAMILIES = {'clip': 'CLIP', 'dinov2': 'DINOv2', 'classifier': "the classifier's"}
"""Networks whose features have values with names of their own; Inception's stand alone."""


@dataclasses.dataclass(frozen=True, eq=False)
class Compared:
  """One kind of features of the samples, with those of the reference.

  column: `EXTRACTOR:OUTPUT`. samples: [n d], or None with `sums` alone. reference: [m d], or None
  with `moments` alone. texts: [n d], of the captions in the same space, if any. labels: [n], wanted
  classes, as numbers of the classifier's logits. own: whether samples are reconstructions of the
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
    """End of the names of values of these features; Inception's stand alone."""
    return '' if self.family == 'inception' else f'_{self.family}'

  @property
  def distance(self) -> str:
    """Name of the Fréchet distance: fid, sfid or fd_FAMILY; rfid ... of reconstructions."""
    name = f'fd{self.suffix}' if self.suffix else {'spatial': 'sfid'}.get(self.output, 'fid')
    return f'r{name}' if self.own else name


@dataclasses.dataclass
class MetricValues:
  """values: name -> value. intervals: name -> its interval. warnings: sentences.

  with_intervals: whether to compute resampled intervals.
  """

  with_intervals: bool = True
  values: dict[str, float] = dataclasses.field(default_factory=dict)
  intervals: dict[str, Interval] = dataclasses.field(default_factory=dict)
  warnings: list[str] = dataclasses.field(default_factory=list)

  def add(self, name: str, value: float, interval: Interval | None = None) -> None:
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
  """A value of a metric.

  name: with {suffix} and {distance} of the features, see `Compared`, and numbers {k} and {n}.
  title: for people; {features} is the network's. better: 'lower', 'higher', or ''. comparable_on:
  settings that must agree between compared evaluations. family: of the features, if not in the
  name. alone: the title for Inception's features.
  """

  name: str
  title: str
  better: str = ''
  comparable_on: tuple[str, ...] = ()
  family: str = ''
  alone: str = ''

  def match(self, name: str) -> re.Match | None:
    """Match a whole name; the group 'family' is the features'."""
    pattern = re.escape(self.name).replace(r'\{suffix\}', '(_(?P<family>.+?))?')
    pattern = pattern.replace(r'\{distance\}', 'r?(fid|sfid|fd_(?P<family>.+?))')
    return re.fullmatch(re.sub(r'\\{(k|n)\\}', r'(?P<\1>\\d+)', pattern), name)

  @property
  def literal(self) -> int:
    """Number of characters of the name that are as they are."""
    return len(re.sub(r'{\w+}', '', self.name))

  def titled(self, name: str, family: str) -> str:
    """The title of a value of that name, with an arrow towards better."""
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
    own = Value(self.name, self.title or self.name, self.better, self.comparable_on)
    return self.values or (own,)

  def names(self, of: Compared) -> list[str]:
    """Return the names of its values of these features."""
    return [value.name.format(suffix=of.suffix, distance=of.distance) for value in self.given]


def of_each(of: Compared, values: MetricValues, seed: int) -> None:
  """Add the mean of a value of single images, by its own name."""
  values.add_mean(of.output, of.samples[:, 0], seed)


def matrix(x: np.ndarray, name: str, dtype: type | None = np.float64) -> Float[np.ndarray, 'n d']:
  """Return x as an array of that type or its own. UserError if not a finite, filled matrix."""
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
  """Return two sets of features. UserError as in `matrix`, or if their widths differ."""
  x, y = matrix(x, 'features', dtype), matrix(y, 'features', dtype)
  if x.shape[1] != y.shape[1]:
    raise UserError(
      f'Features of width {x.shape[1]} and {y.shape[1]} cannot be compared: compute both with '
      'the same feature extractor.'
    )
  return x, y


OF_EVALUATORS = (
  Value('accuracy', 'Fraction of images given their own class', HIGHER),
  Value('accuracy_per_class', 'Mean over classes of the fraction given its own class', HIGHER),
  Value('bits_per_dim', 'Bits per dimension', LOWER),
  Value('bits_per_dim_bound', 'Bits per dimension of pixels, bound: the sum of three', LOWER),
  Value('bits_per_dim_prior', 'of these, of the end: L_T'),
  Value('bits_per_dim_steps', 'of these, of the steps between: L_t'),
  Value('bits_per_dim_decoder', 'of these, of the levels of pixels: L_0'),
  Value('bits_per_dim_flow', 'Bits per dimension of pixels, probability flow', LOWER),
  Value('drift', "Distance to the base model's pictures of the same noise", LOWER),
  Value('drift_most', 'the largest of single pictures', LOWER),
  Value('energy_distance', 'Energy distance to the test points', LOWER),
  Value('held_out_gap', 'How much lower the loss is on pictures trained on', LOWER),
  Value('held_out_loss', 'Loss on held-out pictures', LOWER),
  Value('held_out_loss_{n}_of_{k}', 'of these, at noise levels {n} of {k}, cleanest first', LOWER),
  Value('latent_bits_per_dim_continuous', 'Bits per dimension of latents, continuous bound', LOWER),
  Value('latent_bits_per_dim_flow', 'Bits per dimension of latents, probability flow', LOWER),
  Value('image_bits_per_dim_bound', 'Bits per dimension of images, bound', LOWER),
  Value('change_at_{n}_steps', 'Root mean square change from {n:,} steps to the next number'),
  Value('images', 'Number of images'),
  Value('latent_mean', 'Mean of the latents'),
  Value('latent_std', 'Deviation of the latents'),
  Value('memorised_fraction', 'Drawn nearer to a training picture than held-out ones lie', LOWER),
  Value('nearest_training', 'Distance to the nearest training picture'),
  Value('nearest_training_ratio', "that, over the held-out pictures' distance"),
  Value('seen_loss', 'The same loss on pictures trained on', LOWER),
  Value('retrieval_r1_of_{n}', 'Own caption ranked first of {n:,}', HIGHER),
  Value('retrieval_r{k}_of_{n}', 'Own caption among the first {k} of {n:,}', HIGHER),
)
"""Values that are of no `Metric`, which evaluators compute themselves."""


def value_of(name: str) -> tuple[Value, str] | None:
  """(the `Value` of that name, its features' family, '' for none); None for an unknown name."""
  import_plugins()
  known = (*_values(tuple(METRICS)), *OF_EVALUATORS)
  found = [(value, match) for value in known if (match := value.match(name))]
  if not found:
    return None
  value, match = max(found, key=lambda one: one[0].literal)
  other = 'inception' if 'features' in value.comparable_on else ''
  return value, value.family or match.groupdict().get('family') or other


@functools.cache
def _values(metrics: tuple[str, ...]) -> list[Value]:
  return [value for metric in map(metric_of, metrics) for value in metric.given]


LOWEST, HIGHEST = 'lowest', 'highest'


def best_is(name: str, key: str = 'keep_best') -> str:
  """Return 'lowest' or 'highest'. UserError, naming the key of `loop`, where that is not known."""
  known = value_of(name)
  if known is None or not known[0].better:
    raise UserError(
      f'which way {name} is better is not known; set loop.{key}_is to {LOWEST} or {HIGHEST}.'
    )
  return LOWEST if known[0].better == LOWER else HIGHEST


def metric_of(name: str) -> Metric:
  """Return the metric of that name; UserError, with the names of all, for another."""
  return load(METRICS, name)


def outputs_of(metrics: Sequence[str], available: Mapping[str, int]) -> tuple[str, ...]:
  """The extractor's outputs that the metrics need; UserError: unknown or repeated metrics."""
  for name in metrics:
    if metrics.count(name) > 1:
      raise UserError(f'the metric {name} is named twice; name it once.')
  known = [metric_of(name) for name in metrics]
  return tuple(o for o in available if any(o in metric.outputs for metric in known))


def takes_reference(output: str) -> bool:
  """Return whether any metric compares such features with those of a reference."""
  return any(
    output in metric.outputs and {'moments', 'reference'} & set(metric.needs)
    for metric in map(metric_of, METRICS)
  )


_LACKS = {
  'reference': 'the reference images themselves, not only their statistics',
  'moments': 'a reference', 'texts': 'captions',
  'labels': 'the classes of the captions, of a data set or --labels, and a classifier',
}


def check_metrics(
  metrics: Sequence[str], outputs: Sequence[str], known: Collection[str], option: str = '--metrics'
) -> None:
  """Raise a UserError where a metric is unknown, fits no output, or lacks what it needs.

  outputs: of all extractors. known: fields of `Compared` there will be. option: names the metrics.
  """
  for name in metrics:
    outputs_of([name], {})
    metric = metric_of(name)
    lacks = [_LACKS[need] for need in metric.needs if need not in known]
    if not set(metric.outputs) & set(outputs):
      lacks.insert(0, metric.source or f'the features {" or ".join(metric.outputs)}')
    if lacks:
      raise UserError(f'{name} needs {lacks[0]}; give that, or leave {name} out of {option}.')


def score(
  metrics: Sequence[str], compared: Sequence[Compared], *, seed: int = 0, intervals: bool = True
) -> MetricValues:
  """Return every metric of all features that it fits. UserError as in `check_metrics`."""
  values = MetricValues(intervals)
  outputs_of(metrics, {})
  for name in metrics:
    metric = metric_of(name)
    fitting = [of for of in compared if of.output in metric.outputs]
    able = [of for of in fitting if all(getattr(of, need) is not None for need in metric.needs)]
    known = {need for need in _LACKS for of in fitting if getattr(of, need) is not None}
    check_metrics([name], [of.output for of in fitting], known)
    for of in able:
      metric.compute(of, values, seed)
  return values


def value_names(metrics: Sequence[str], columns: Iterable[str]) -> list[str]:
  """The value names of `score` for columns `EXTRACTOR:OUTPUT`; UserError for two equal ones."""
  names = []
  for metric in metrics:
    for column in columns:
      of = Compared(column, None)
      if of.output in metric_of(metric).outputs:
        names += metric_of(metric).names(of)
  for name in names:
    if names.count(name) > 1:
      raise UserError(
        f'{name} would be computed twice, of '
        f'{" and of ".join(dict.fromkeys(c.rpartition(":")[0] for c in columns))}; name one of '
        'these features at a time.'
      )
  return names


def sums_suffice(metrics: Iterable[str], column: str) -> bool:
  """Return whether these metrics need of a column no more than its `Statistics`."""
  output = column.rpartition(':')[2]
  known = map(metric_of, metrics)
  return all(metric.of_moments for metric in known if output in metric.outputs)
