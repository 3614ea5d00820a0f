"""All metrics of features that they can be computed of, and what they need."""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterable, Mapping, Sequence

from diffusion_jax.errors import UserError
from diffusion_jax.evaluation.metrics.metric import (
  HIGHER,
  LOWER,
  Compared,
  Metric,
  MetricValues,
  Value,
)
from diffusion_jax.registry import METRICS, import_plugins, load

OF_EVALUATORS = (
  Value('accuracy', 'Fraction of images given their own class', HIGHER),
  Value('accuracy_per_class', 'Mean over classes of the fraction given its own class', HIGHER),
  Value('bits_per_dim', 'Bits per dimension', LOWER),
  Value('energy_distance', 'Energy distance to the test points', LOWER),
  Value('images', 'Number of images'),
  Value('latent_mean', 'Mean of the latents'),
  Value('latent_std', 'Deviation of the latents'),
  Value('retrieval_r1_of_{n}', 'Own caption ranked first of {n:,}', HIGHER),
  Value('retrieval_r{k}_of_{n}', 'Own caption among the first {k} of {n:,}', HIGHER),
)
"""Values that are of no `Metric`, which evaluators compute themselves."""


def value_of(name: str) -> tuple[Value, str] | None:
  """Return what is known of a value of that name, and the family of its features.

  The family is inception, clip, dinov2, classifier ..., or '' for a value of no features. None
  where no metric gives such a value.
  """
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


def best_is(name: str) -> str:
  """Return 'lowest' or 'highest'. UserError for a metric that does not say it."""
  known = value_of(name)
  if known is None or not known[0].better:
    raise UserError(
      f'which way {name} is better is not known; set loop.keep_best_is to {LOWEST} or {HIGHEST}.'
    )
  return LOWEST if known[0].better == LOWER else HIGHEST


def metric_of(name: str) -> Metric:
  """Return the metric of that name; UserError, with the names of all, for another."""
  return load(METRICS, name)


def outputs_of(metrics: Sequence[str], available: Mapping[str, int]) -> tuple[str, ...]:
  """Of an extractor's outputs, those that the metrics are computed of.

  UserError for an unknown metric, with the names of all, or one that is named twice.
  """
  for name in metrics:
    if metrics.count(name) > 1:
      raise UserError(f'the metric {name} is named twice; name it once.')
  known = [metric_of(name) for name in metrics]
  return tuple(o for o in available if any(o in metric.outputs for metric in known))


def takes_reference(output: str) -> bool:
  """Whether any metric compares such features with those of a reference."""
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
  """Whether every metric can be computed, before any work.

  Args:
    outputs: of all extractors. known: fields of `Compared` that there will be. option: by which
      metrics are chosen.

  Raises:
    UserError: a metric is unknown, fits none of the outputs, or lacks what it needs.
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
  """Every metric of all features that it can be computed of. UserError as in `check_metrics`."""
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
  """Return the names of what `score` adds for these metrics of columns `EXTRACTOR:OUTPUT`.

  UserError where two would have one name, as of two networks of one kind.
  """
  names = []
  for metric in metrics:
    for column in columns:
      of = Compared(column, None)
      if of.output in metric_of(metric).outputs:
        names += metric_of(metric).names(of)
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
  known = map(metric_of, metrics)
  return all(metric.of_moments for metric in known if output in metric.outputs)
