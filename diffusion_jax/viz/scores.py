"""The scores of a run as a table with titles; an arrow says which way is better."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from diffusion_jax.evaluation.metrics.metric import value_of
from diffusion_jax.viz.charts import NO_UNIT
from diffusion_jax.viz.page import Figure, number, words

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
  'loss_vlb': 'Loss, variational bound',
  'loss_kl': 'Loss, KL divergence from the prior',
  'gradient_norm': 'Norm of the gradient',
  'logit_scale': 'Factor on cosines (inverse temperature)',
}
"""Metrics of training; those of evaluations say their titles themselves."""
_UNITS = (
  (r'loss.*', 'mean of a batch, no unit'),
  (r'.*norm', 'Euclidean norm, no unit'),
  (r'images_per_second', 'examples per second'),
  (r'.*_per_second', 'per second'),
  (r'psnr.*', 'dB'),
  (r'.*bits_per_dim.*', 'bits per dimension'),
  (r'clip_score', 'cosine × 100'),
  (r'learning_rate.*', 'factor on a step, no unit'),
  (r'(.*(fraction|accuracy|usage)|retrieval|precision|recall|coverage|ssim).*', 'from 0 to 1'),
  (r'r?(fid|sfid|fd_|kid|cmmd).*', 'squared distance, no unit'),
)
"""(pattern of names, what values count), the first that matches."""
MOST_FIGURES = 6
_BESIDE = ('settings', 'measured', 'warnings', 'intervals', 'sweep', 'history')
"""Keys of scores.json that are no columns."""


def metric_title(name: str) -> str:
  """Return what a metric is called; its name where nothing else is known of it."""
  known = value_of(name)
  return _METRICS.get(name) or (known[0].titled(name, known[1]) if known else name)


def metric_words(name: str) -> str:
  """Return what a metric is called on a page: its title, else its name as words."""
  title = metric_title(name)
  return words(name) if title == name else title


def metric_unit(name: str) -> str:
  """Return what a metric's values count; `NO_UNIT` where that is not known."""
  return next((unit for pattern, unit in _UNITS if re.fullmatch(pattern, name)), NO_UNIT)


def best_known(
  rows: dict[str, list[Any]], titles: list[str], own: int | None, most: int = MOST_FIGURES
) -> list[Figure]:
  """Return the first metrics that say which way is better, beside what they are for others.

  Of a kind, such as Fréchet distances, the first alone. rows: as of a `ScoreTable`. own: the column
  of the model, if any.
  """
  found, kinds = [], set()
  for name, row in rows.items():
    title, kind = metric_title(name), name.partition('_')[0]
    if (own is not None and row[own] is not None and title.endswith(('↑', '↓'))
        and kind not in kinds):
      kinds.add(kind)
      others = [f'{titles[i]} {number(value)}' for i, value in enumerate(row)
                if i != own and value is not None]
      found.append(Figure(title, number(row[own]), '\n'.join(others)))
  return found[:most]


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
  def own(self) -> int | None:
    """The place of the model's own column, if there is one."""
    return next((i for i, name in enumerate(self.columns) if name in OWN), None)

  @property
  def titles(self) -> list[str]:
    """Titles of the columns."""
    return [COLUMNS.get(name, name) for name in self.columns]

  @property
  def rows(self) -> dict[str, list[Any]]:
    """Metric -> its value in each column, None where there is none."""
    names = dict.fromkeys(name for column in self.columns.values() for name in column)
    return {name: [column.get(name) for column in self.columns.values()] for name in names}
