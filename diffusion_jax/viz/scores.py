"""The scores of a run as a table with titles; an arrow says which way is better."""

from __future__ import annotations

import dataclasses
from typing import Any

from diffusion_jax.evaluation.metrics.metric import value_of

COLUMNS = {
  'generated': 'this model', 'reconstructed': 'this model', 'test': 'this model',
  'samples': 'samples', 'real': 'real test data', 'untrained': 'untrained model',
  'commonest': 'always the commonest class',
}
"""In the order in which they are shown."""
OWN = ('generated', 'reconstructed', 'test', 'samples')
"""Columns of the model itself; all others are there to compare it with."""

_METRICS = {
  'images_per_second': 'Examples per second ↑',
  'data_wait_fraction': 'Fraction of the time spent waiting for data ↓',
  'learning_rate': 'Learning rate',
  'gradient_norm': 'Norm of the gradient',
  'logit_scale': 'Factor on cosines (inverse temperature)',
}
"""Metrics of training; those of evaluations say their titles themselves."""
_BESIDE = ('settings', 'measured', 'warnings', 'intervals', 'sweep', 'history')
"""Keys of scores.json that are no columns."""


def metric_title(name: str) -> str:
  """Return what a metric is called; its name where nothing else is known of it."""
  known = value_of(name)
  return _METRICS.get(name) or (known[0].titled(name, known[1]) if known else name)


@dataclasses.dataclass(frozen=True)
class ScoreTable:
  """The scores of a run.

  columns: metrics by name, for each column, the model's first. measured: sentences on the data.
  settings: how, and at which step.
  """

  columns: dict[str, dict[str, Any]]
  measured: list[str]
  warnings: list[str]
  settings: dict[str, Any]

  @classmethod
  def of(cls, scores: dict[str, Any]) -> ScoreTable:
    """Sort what is in scores.json; what is nothing else is a setting."""
    known = list(COLUMNS)
    names = sorted(
      (k for k, v in scores.items() if isinstance(v, dict) and k not in _BESIDE),
      key=lambda name: known.index(name) if name in known else len(known),
    )
    texts = lambda key: [
      text for text in (scores[key] if isinstance(scores.get(key), list) else ())
      if isinstance(text, str)
    ]
    more = scores.get('settings')
    settings = {k: v for k, v in scores.items() if k not in names and k not in _BESIDE}
    settings |= more if isinstance(more, dict) else {}
    return cls({k: scores[k] for k in names}, texts('measured'), texts('warnings'), settings)

  @property
  def titles(self) -> list[str]:
    """Titles of the columns."""
    return [COLUMNS.get(name, name) for name in self.columns]

  @property
  def rows(self) -> dict[str, list[Any]]:
    """Metric -> its value in each column, None where there is none."""
    names = dict.fromkeys(name for column in self.columns.values() for name in column)
    return {name: [column.get(name) for column in self.columns.values()] for name in names}
