"""Figures of a set of samples, by name, with their confidence intervals and what to beware of.

What the figures of each metric are called, and which need no more than means and covariances.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

import numpy as np
from jaxtyping import Float, Int

from diffusion_jax.errors import UserError
from diffusion_jax.evaluation.metrics.bootstrap import (
  Interval,
  bootstrap_mean,
  interval_of_groups,
  random_groups,
)
from diffusion_jax.evaluation.metrics.frechet import (
  FrechetReference,
  extrapolated_frechet_distance,
)
from diffusion_jax.evaluation.metrics.gaussians import gaussian_kl
from diffusion_jax.evaluation.metrics.kernel import cmmd, kernel_distance
from diffusion_jax.evaluation.metrics.logits import class_hits, inception_score
from diffusion_jax.evaluation.metrics.manifold import density_coverage, precision_recall
from diffusion_jax.evaluation.metrics.text import clip_score_of_each, retrieval_hits
from diffusion_jax.evaluation.statistics import Moments, Statistics

KID_SUBSETS, KID_SUBSET_SIZE = 100, 1000
GROUPS, WIDE = 32, 512
"""Groups of samples whose halves give the interval of a Fréchet distance; of features wider than
WIDE fewer halves are tried, for each takes the eigenvalues of a matrix of that width."""
DISCRETE_BITS = 'latent_bits_per_dim_discrete'
FEWEST_FOR_FID = 10_000
"""Below so many samples FID is mostly bias (Chong & Forsyth 2020, fig. 1)."""


@dataclasses.dataclass(frozen=True, eq=False)
class Compared:
  """One kind of features of the samples beside those of the reference.

  column: which, `EXTRACTOR:OUTPUT`. samples: [n d], or None where only their `sums` are kept.
  reference: [m d], or None where only its `moments` are known. texts: [n d], of the samples'
  captions in the same space, if there are any. labels: [n], the classes that the samples should be
  of, as numbers of the classifier's logits. own: whether the samples are reconstructions of the
  reference, whose figures have other names.
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
    """What tells a figure of these features from Inception's, whose names stand alone."""
    return '' if self.family == 'inception' else f'_{self.family}'

  @property
  def distance(self) -> str:
    """What the Fréchet distance is called: fid, sfid or fd_FAMILY; rfid ... of reconstructions."""
    name = f'fd{self.suffix}' if self.suffix else {'spatial': 'sfid'}.get(self.output, 'fid')
    return f'r{name}' if self.own else name


@dataclasses.dataclass
class Scores:
  """values: figure -> value. intervals: figure -> its interval. warnings: sentences.

  with_intervals: whether to compute those that take resampling.
  """

  with_intervals: bool = True
  values: dict[str, float] = dataclasses.field(default_factory=dict)
  intervals: dict[str, Interval] = dataclasses.field(default_factory=dict)
  warnings: list[str] = dataclasses.field(default_factory=list)

  def add(self, name: str, value: float, interval: Interval | None = None) -> None:
    """One figure; a name is used once."""
    if name in self.values:
      raise UserError(f'{name} would be computed twice; name each kind of features once.')
    self.values[name] = float(value)
    if interval is not None:
      self.intervals[name] = interval


def frechet(of: Compared, scores: Scores, seed: int) -> None:
  """fid, sfid, or fd_FAMILY, with its interval; rfid ... of reconstructions."""
  name = of.distance
  n, d = of.statistics.n, len(of.statistics.mean)
  reference = FrechetReference(of.moments)
  value = reference.distance(of.statistics)
  interval = None
  if scores.with_intervals and of.samples is not None and n >= 4 * GROUPS:
    groups = random_groups(of.samples, GROUPS, seed=seed)
    interval = interval_of_groups(
      reference.distance, groups, resamples=50 if d <= WIDE else 8, seed=seed
    )._replace(estimate=value)
  scores.add(name, value, interval)
  if n < FEWEST_FOR_FID:
    scores.warnings.append(
      f'{name} of {n} samples is not comparable with figures of other numbers of samples: it falls '
      f'as they grow. Published ones are of 50,000; fd_infinity is without that bias.'
    )
  if n <= d:
    scores.warnings.append(f'{name}: {n} samples do not span features of width {d}.')


def frechet_infinity(of: Compared, scores: Scores, seed: int) -> None:
  """The same at an infinite number of samples."""
  found = extrapolated_frechet_distance(of.samples, of.moments, seed=seed)
  name = f'{of.distance}_infinity'
  reach = 1.96 * found.standard_error
  scores.add(name, found.value, Interval(
    found.value, found.value - reach, found.value + reach, found.standard_error, 0.95, 'fit'
  ))


def kernel(of: Compared, scores: Scores, seed: int) -> None:
  """kid, kid_std."""
  size = min(KID_SUBSET_SIZE, len(of.samples), len(of.reference))
  value, std = kernel_distance(
    of.samples, of.reference, subsets=KID_SUBSETS, subset_size=size, seed=seed
  )
  scores.add(f'kid{of.suffix}', value)
  scores.add(f'kid{of.suffix}_std', std)


def manifold(of: Compared, scores: Scores, seed: int) -> None:
  """precision, recall."""
  found = precision_recall(of.samples, of.reference)
  scores.add(f'precision{of.suffix}', found.precision)
  scores.add(f'recall{of.suffix}', found.recall)
  if len(of.samples) != len(of.reference):
    scores.warnings.append(
      f'precision{of.suffix} and recall{of.suffix} of {len(of.samples)} samples against '
      f'{len(of.reference)} reference images: compare only figures of these numbers.'
    )


def density(of: Compared, scores: Scores, seed: int) -> None:
  """density, coverage."""
  found = density_coverage(of.samples, of.reference)
  scores.add(f'density{of.suffix}', found.density)
  scores.add(f'coverage{of.suffix}', found.coverage)


def maximum_mean_discrepancy(of: Compared, scores: Scores, seed: int) -> None:
  """cmmd."""
  scores.add('cmmd', cmmd(of.samples, of.reference))


def divergence(of: Compared, scores: Scores, seed: int) -> None:
  """kl (samples from reference) and kl_reverse of the fitted Gaussians, in nats."""
  found = gaussian_kl(of.statistics, of.moments)
  scores.add(f'kl{of.suffix}', found.forward)
  scores.add(f'kl_reverse{of.suffix}', found.backward)
  shrunk = max(found.shrinkage_a, found.shrinkage_b)
  if shrunk:
    scores.warnings.append(
      f'kl{of.suffix}: covariances were shrunk by up to {shrunk:.3g}, for want of samples.'
    )


def inception(of: Compared, scores: Scores, seed: int) -> None:
  """inception_score, inception_score_std."""
  value, std = inception_score(of.samples, splits=min(10, len(of.samples)))
  scores.add('inception_score', value)
  scores.add('inception_score_std', std)


def text(of: Compared, scores: Scores, seed: int) -> None:
  """clip_score, with its interval."""
  each = clip_score_of_each(of.samples, of.texts)
  scores.add('clip_score', each.mean(), _interval_of_mean(each, scores, seed))


def retrieval(of: Compared, scores: Scores, seed: int) -> None:
  """retrieval_r1: own caption first among 100, with its interval."""
  hits = retrieval_hits(of.samples, of.texts, k=1, seed=seed)
  scores.add('retrieval_r1', hits.mean(), _interval_of_mean(hits, scores, seed))
  if len(hits) < 100:
    scores.warnings.append(f'retrieval_r1 ranks {len(hits)} captions instead of 100: it is easier.')


def accuracy(of: Compared, scores: Scores, seed: int) -> None:
  """class_accuracy: share of images that the classifier finds to be of their own class."""
  hits = class_hits(of.samples, of.labels)
  scores.add('class_accuracy', hits.mean(), _interval_of_mean(hits, scores, seed))


def of_each(of: Compared, scores: Scores, seed: int) -> None:
  """The mean of a figure of single images, by its own name."""
  each = of.samples[:, 0]
  finite = bool(np.isfinite(each).all())
  interval = _interval_of_mean(each, scores, seed) if finite else None
  scores.add(of.output, each.mean(), interval)


def _interval_of_mean(values: np.ndarray, scores: Scores, seed: int) -> Interval | None:
  return bootstrap_mean(values, seed=seed) if scores.with_intervals and len(values) > 1 else None


@dataclasses.dataclass(frozen=True)
class Metric:
  """compute: adds figures. outputs: of an extractor that it can be computed of, or the figure of
  single images that it is the mean of. needs: fields of Compared that it cannot do without. source:
  where outputs come from that are no features."""

  compute: Callable[[Compared, Scores, int], None]
  outputs: tuple[str, ...]
  needs: tuple[str, ...] = ('reference',)
  source: str = ''


_POOLED = ('pool3', 'embedding', 'cls', 'penultimate')
METRICS: dict[str, Metric] = {
  'fd': Metric(frechet, (*_POOLED, 'spatial'), ('moments',)),
  'fd_infinity': Metric(frechet_infinity, _POOLED, ('moments',)),
  'kid': Metric(kernel, _POOLED),
  'precision_recall': Metric(manifold, _POOLED),
  'density_coverage': Metric(density, _POOLED),
  'cmmd': Metric(maximum_mean_discrepancy, ('embedding',)),
  'kl': Metric(divergence, _POOLED, ('moments',)),
  'inception_score': Metric(inception, ('logits_unbiased',), ()),
  'clip_score': Metric(text, ('embedding',), ('texts',)),
  'retrieval': Metric(retrieval, ('embedding',), ('texts',)),
  'class_accuracy': Metric(accuracy, ('logits',), ('labels',)),
  **{name: Metric(of_each, (name,), (), 'an autoencoder') for name in ('psnr', 'ssim', 'l1')},
  'lpips': Metric(of_each, ('lpips',), (), 'an autoencoder, and --lpips'),
  'bits_per_dim': Metric(of_each, (DISCRETE_BITS,), (), 'a diffusion model and images to draw'),
}


def outputs_of(metrics: Sequence[str], available: Mapping[str, int]) -> tuple[str, ...]:
  """Of an extractor's outputs, those that the metrics are computed of.

  UserError for an unknown metric, with the names of all, or one that is named twice.
  """
  for name in metrics:
    if metrics.count(name) > 1:
      raise UserError(f'the metric {name} is named twice; name it once.')
    if name not in METRICS:
      raise UserError(f'There is no metric {name!r}; choose of {", ".join(METRICS)}.')
  return tuple(o for o in available if any(o in METRICS[name].outputs for name in metrics))


def takes_reference(output: str) -> bool:
  """Whether any metric compares such features with those of a reference."""
  return any(
    output in metric.outputs and {'moments', 'reference'} & set(metric.needs)
    for metric in METRICS.values()
  )


_LACKS = {
  'reference': 'the reference images themselves, not only their statistics',
  'moments': 'a reference', 'texts': 'captions',
  'labels': 'the classes of the captions, of a data set or --labels, and a classifier',
}


def check_metrics(
  metrics: Sequence[str], outputs: Sequence[str], known: Collection[str], option: str = '--metrics'
) -> None:
  """Whether every metric can be computed, before any work.

  Args:
    outputs: of all extractors. known: fields of `Compared` that there will be. option: by which
      metrics are chosen.

  Raises:
    UserError: a metric is unknown, fits none of the outputs, or lacks what it needs.
  """
  for name in metrics:
    outputs_of([name], {})
    metric = METRICS[name]
    lacks = [_LACKS[need] for need in metric.needs if need not in known]
    if not set(metric.outputs) & set(outputs):
      lacks.insert(0, metric.source or f'the features {" or ".join(metric.outputs)}')
    if lacks:
      raise UserError(f'{name} needs {lacks[0]}; give that, or leave {name} out of {option}.')


def score(
  metrics: Sequence[str], compared: Sequence[Compared], *, seed: int = 0, intervals: bool = True
) -> Scores:
  """Every metric of all features that it can be computed of. UserError as in `check_metrics`."""
  scores = Scores(intervals)
  outputs_of(metrics, {})
  for name in metrics:
    metric = METRICS[name]
    fitting = [of for of in compared if of.output in metric.outputs]
    able = [of for of in fitting if all(getattr(of, need) is not None for need in metric.needs)]
    known = {need for need in _LACKS for of in fitting if getattr(of, need) is not None}
    check_metrics([name], [of.output for of in fitting], known)
    for of in able:
      metric.compute(of, scores, seed)
  return scores


FIGURES: dict[str, tuple[str, ...]] = {
  'fd': ('{distance}',),
  'fd_infinity': ('{distance}_infinity',),
  'kid': ('kid{suffix}', 'kid{suffix}_std'),
  'precision_recall': ('precision{suffix}', 'recall{suffix}'),
  'density_coverage': ('density{suffix}', 'coverage{suffix}'),
  'kl': ('kl{suffix}', 'kl_reverse{suffix}'),
  'inception_score': ('inception_score', 'inception_score_std'),
  'retrieval': ('retrieval_r1',),
}
"""Of metrics whose one figure is not called as they are; the braces depend on the features."""

OF_GAUSSIANS = ('fd', 'kl')
"""Metrics that see no features but through their mean and covariance."""


def figure_names(metrics: Sequence[str], columns: Iterable[str]) -> list[str]:
  """The figures that `scores.score` adds for these metrics of columns `EXTRACTOR:OUTPUT`.

  UserError where two would have one name, as of two networks of one kind.
  """
  names = []
  for metric in metrics:
    for column in columns:
      of = Compared(column, None)
      if of.output in METRICS[metric].outputs:
        given = {'suffix': of.suffix, 'distance': of.distance}
        names += [name.format(**given) for name in FIGURES.get(metric, (metric,))]
  for name in names:
    if names.count(name) > 1:
      raise UserError(
        f'{name} would be computed twice, of {" and of ".join(_extractors(columns))}; name one of '
        'these features at a time.'
      )
  return names


def _extractors(columns: Iterable[str]) -> list[str]:
  return list(dict.fromkeys(column.rpartition(':')[0] for column in columns))


def sums_suffice(metrics: Iterable[str], column: str) -> bool:
  """Whether these metrics need of a column no more than its `Statistics`."""
  output = column.rpartition(':')[2]
  return all(name in OF_GAUSSIANS for name in metrics if output in METRICS[name].outputs)
