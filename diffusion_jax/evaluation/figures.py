"""What the figures of each metric are called, and which need no more than means and covariances."""

from collections.abc import Iterable, Sequence

from diffusion_jax.errors import UserError
from diffusion_jax.evaluation.scores import METRICS, Compared

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
