"""Reads what a run leaves in its directory, also while it goes on and after a crash."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any, NamedTuple

from diffusion_jax.errors import UserError
from diffusion_jax.files import read_object, reading
from diffusion_jax.viz.metrics_file import Line, Metrics, MetricsFile, is_number

__all__ = ['Line', 'Run', 'read_run']


class Moment(NamedTuple):
  """How far a run is: step, of how many, after how many seconds; None for what is not known."""

  step: float | None = None
  of: float | None = None
  seconds: float | None = None


@dataclasses.dataclass(frozen=True)
class Told:
  """What scores.json says.

  Attributes:
    columns: figures by name, for each column.
    measured: sentences on what they were measured on. warnings: what to beware of.
    settings: how, and at which step.
  """

  columns: dict[str, dict[str, Any]]
  measured: list[str]
  warnings: list[str]
  settings: dict[str, Any]

  @classmethod
  def of(cls, scores: dict[str, Any]) -> 'Told':
    """Whatever is in there: what is none of these is a setting."""
    beside = ('settings', 'measured', 'warnings', 'intervals', 'sweep', 'history')
    columns = {k: v for k, v in scores.items() if isinstance(v, dict) and k not in beside}
    texts = lambda key: [
      text for text in (scores[key] if isinstance(scores.get(key), list) else ())
      if isinstance(text, str)
    ]
    more = scores.get('settings')
    settings = {k: v for k, v in scores.items() if k not in columns and k not in beside}
    settings |= more if isinstance(more, dict) else {}
    return cls(columns, texts('measured'), texts('warnings'), settings)


@dataclasses.dataclass(frozen=True)
class Run:
  """A run directory in memory; parts that are not there are empty.

  Attributes:
    name: the directory's own name.
    train, evaluation: one line of metrics per step, in order of the step; of long runs one for each
      stretch of steps, with means.
    metrics: the same by kind, with what is kept of each metric.
    latest: the train line written last, which after a resume need not be that of the largest step.
    unreadable: lines of metrics.jsonl that were left out, such as one torn by a crash.
    grids: (step, path) of the sample grids, in order of the step.
    has_model_card: whether there is a README.md.
  """

  name: str
  config: dict[str, Any]
  train: list[Line]
  evaluation: list[Line]
  metrics: dict[str, Metrics]
  latest: Line
  unreadable: int
  grids: list[tuple[int, Path]]
  scores: dict[str, Any]
  versions: dict[str, Any]
  status: dict[str, Any]
  has_model_card: bool

  @property
  def moment(self) -> Moment:
    """The later one of what the status and what the metrics say.

    The time spent on a run only grows, also where it goes back to a checkpoint.
    """
    known = lambda values, *keys: [
      values.get(key) if is_number(values.get(key)) else None for key in keys
    ]
    status = Moment(*known(self.status, 'step', 'total_steps', 'seconds'))
    line = Moment(*known(self.latest, 'step', 'total_steps', 'time'))
    if status.step is None or (line.seconds or 0) > (status.seconds or 0):
      return line._replace(of=status.of)
    return status


def read_run(workdir: Path, metrics: MetricsFile | None = None) -> Run:
  """Reads a run directory.

  Args:
    metrics: what has read the metrics of this run before, which then reads on.

  Raises:
    UserError: the directory is missing, holds no run or a JSON file is damaged.
  """
  workdir = Path(workdir)
  if not workdir.is_dir():
    raise UserError(f'There is no run directory {workdir}: give the workdir of a training run.')
  metrics = metrics or MetricsFile(workdir / 'metrics.jsonl')
  with reading(workdir / 'metrics.jsonl', remedy='check the disk'):
    metrics.update()
  grids = find_grids(workdir / 'samples')
  objects = {name: _read_object(workdir / f'{name}.json')
             for name in ('config', 'scores', 'versions', 'status')}
  train, evaluation = (metrics.kinds[kind].lines for kind in ('train', 'evaluation'))
  if not (train or evaluation or grids or objects['config'] or objects['scores']):
    raise UserError(
      f'{workdir} holds no run (no config.json, metrics.jsonl, samples or scores.json): give the '
      'workdir of a training run that has started.'
    )
  return Run(
    name=workdir.resolve().name,
    train=train,
    evaluation=evaluation,
    metrics=metrics.kinds,
    latest=metrics.latest,
    unreadable=metrics.unreadable,
    grids=grids,
    has_model_card=(workdir / 'README.md').is_file(),
    **objects,
  )


def find_grids(folder: Path) -> list[tuple[int, Path]]:
  """(step, path) of the sample grids in a folder, in order of the step."""
  found = (path for path in folder.glob('*.png') if path.is_file())
  matches = ((re.fullmatch(r'step_(\d+)\.png', path.name), path) for path in found)
  return sorted((int(match[1]), path) for match, path in matches if match)


def _read_object(path: Path) -> dict[str, Any]:
  if not path.exists():
    return {}
  return read_object(path, remedy='repair it, or remove it and try again')
