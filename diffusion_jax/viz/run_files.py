"""The files of a run directory, read also while the run goes on and after a crash.

metrics.jsonl is read a line at a time, into memory that does not grow with it: a run of months logs
millions of lines. All are kept while they are few; later each stretch of steps keeps, of every
metric, the mean and the extremes, and stretches grow with the run. The file is read on from where
the last reading ended, so that the reports of a run read every line once.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from diffusion_jax.errors import UserError
from diffusion_jax.files import read_object, reading

Line = dict[str, Any]
Point = tuple[float, float | None]

MOST_STRETCHES = 2000
"""Of steps, of which each keeps a line of its own."""
MOST_METRICS = 300
"""By name, of one kind of line; those that come later are left out."""
MOST_BYTES = 2**18
"""Of a line; longer ones count as damaged."""
_USUAL_BYTES = 2**13
"""Of a line; only what is small is kept of a longer one."""
MOST_STEP = 2**53
_LARGEST = 1e30
"""Beyond it no chart can be drawn."""


def is_number(value: Any) -> bool:
  """Return whether a JSON value is a number; true and false are not."""
  return isinstance(value, (int, float)) and not isinstance(value, bool)


class Curve(NamedTuple):
  """One metric over the steps.

  points: (step, value) of all lines in order of the step, or of long runs the extremes of each
  stretch; the value is None where it was no finite number. means: the same, or the mean of each
  stretch. missing: how many values were no finite numbers. first, last: those of the lines that
  have a number.
  """

  points: list[Point]
  means: list[Point]
  missing: int
  first: float | None
  last: float | None


class _Sums:
  """What is kept of one metric in a stretch of steps; low, high: (step, value)."""

  __slots__ = ('count', 'gap', 'high', 'low', 'missing', 'total')

  def __init__(self):
    self.count, self.total, self.missing = 0, 0.0, 0
    self.low = self.high = self.gap = None

  def add(self, step: float, value: Any) -> None:
    if not (is_number(value) and -_LARGEST < value < _LARGEST):
      self.missing += 1
      self.gap = step if self.gap is None else self.gap
      return
    self.count += 1
    self.total += value
    if self.low is None or value < self.low[1]:
      self.low = step, value
    if self.high is None or value > self.high[1]:
      self.high = step, value

  def take(self, other: _Sums) -> None:
    self.count += other.count
    self.total += other.total
    self.missing += other.missing
    self.gap = other.gap if self.gap is None else self.gap
    if other.low and (self.low is None or other.low[1] < self.low[1]):
      self.low = other.low
    if other.high and (self.high is None or other.high[1] > self.high[1]):
      self.high = other.high

  @property
  def mean(self) -> float | None:
    return self.total / self.count if self.count else None

  @property
  def points(self) -> list[Point]:
    gap = [] if self.gap is None else [(self.gap, None)]
    ends = {self.low, self.high} if self.count else set()
    return sorted([*ends, *gap], key=lambda point: point[0])


class _Stretch:
  """Lines of neighbouring steps; the last of them is kept as it is."""

  __slots__ = ('count', 'last', 'steps', 'sums')

  def __init__(self, line: Line):
    self.count, self.steps, self.sums = 0, 0, {}
    self.add(line)

  def add(self, line: Line) -> None:
    """Add a later line."""
    step = line['step']
    for key, value in line.items():
      if type(value) in (int, float, bool, type(None)) and key != 'step':
        if key not in self.sums:
          self.sums[key] = _Sums()
        self.sums[key].add(step, value)
    self.count, self.steps, self.last = self.count + 1, self.steps + step, line

  def take(self, other: _Stretch) -> None:
    """Add the lines of a later stretch."""
    for key, sums in other.sums.items():
      if key in self.sums:
        self.sums[key].take(sums)
      else:
        self.sums[key] = sums
    self.count, self.steps = self.count + other.count, self.steps + other.steps
    self.last = other.last

  @property
  def step(self) -> int:
    return round(self.steps / self.count)

  @property
  def line(self) -> Line:
    if self.count == 1:
      return self.last
    return self.last | {key: sums.mean for key, sums in self.sums.items()} | {'step': self.step}


class Metrics:
  """The lines of one kind: of each step the last, for a resume repeats the steps after its
  checkpoint. Of long runs what follows the step that a resume goes back to is dropped."""

  def __init__(self):
    self._stretches: dict[int, _Stretch] = {}
    self._width, self._newest = 1, -1.0
    self._first: dict[str, float | None] = {}  # Number of each name, in order of appearance.
    self._settled: set[str] = set()  # Of names, those that need not be looked at again.
    self.left_out = 0

  def add(self, line: Line) -> None:
    """Add one line with a step in [0, MOST_STEP)."""
    line = self._within_bounds(line)
    step, number = line['step'], int(line['step'] // self._width)
    if self._width > 1 and step <= self._newest:
      self._stretches = {n: s for n, s in self._stretches.items() if n <= number}
    if self._width > 1 and number in self._stretches:
      self._stretches[number].add(line)
    else:
      self._stretches[number] = _Stretch(line)
    self._newest = step
    while len(self._stretches) > MOST_STRETCHES:
      self._widen()

  def _widen(self) -> None:
    self._width *= 2
    old, self._stretches = self._ordered(), {}
    for number, stretch in old:
      if number // 2 in self._stretches:
        self._stretches[number // 2].take(stretch)
      else:
        self._stretches[number // 2] = stretch

  def _ordered(self) -> list[tuple[int, _Stretch]]:
    return sorted(self._stretches.items())

  def _within_bounds(self, line: Line) -> Line:
    if line.keys() <= self._settled:
      return line
    kept = {}
    for key, value in line.items():
      if key not in self._first and (len(self._first) >= MOST_METRICS or len(key) > 200):
        self.left_out += 1
        continue
      if self._first.get(key) is None:
        self._first[key] = value if is_number(value) else None
      if self._first[key] is not None or isinstance(value, (str, list)):
        self._settled.add(key)
      kept[key] = value
    return kept | {'step': line['step']}

  @property
  def lines(self) -> list[Line]:
    """In order of the step; of long runs one of each stretch, with the means."""
    return [stretch.line for _, stretch in self._ordered()]

  @property
  def names(self) -> list[str]:
    """Of what has been a number at least once, in order of appearance."""
    return [
      name for name, first in self._first.items()
      if first is not None and name not in ('step', 'time')
    ]

  def curve(self, key: str) -> Curve:
    """Return the values of one metric."""
    points, means, missing, last = [], [], 0, None
    for _, stretch in self._ordered():
      if sums := stretch.sums.get(key):
        points += sums.points
        means.append((stretch.step, sums.mean))
        missing += sums.missing
      last = stretch.last[key] if is_number(stretch.last.get(key)) else last
    return Curve(points, means, missing, self._first.get(key), last)


class MetricsFile:
  """A metrics.jsonl that is read on as it grows, and anew where it was replaced.

  Attributes:
    kinds: lines of training and of evaluations.
    latest: the train line written last, which after a resume need not be that of the largest step.
    unreadable: lines that were left out, such as one torn by a crash.
  """

  def __init__(self, path: Path):
    self._path = path
    self._forget()

  def _forget(self) -> None:
    self.kinds = {'train': Metrics(), 'evaluation': Metrics()}
    self.latest: Line = {}
    self._damaged, self._torn = 0, False
    self._offset, self._file = 0, (0, 0)

  @property
  def unreadable(self) -> int:
    return self._damaged + self._torn

  def update(self) -> None:
    """Read what is new. OSError where that cannot be done."""
    if not self._path.is_file():
      self._forget()
      return
    stat = self._path.stat()
    if stat.st_size < self._offset or (stat.st_dev, stat.st_ino) != self._file:
      self._forget()
      self._file = stat.st_dev, stat.st_ino
    self._torn = False
    for line, offset in _lines(self._path, self._offset):
      if line is None:
        self._torn = offset == self._offset
        self._damaged += not self._torn
      elif line['kind'] in self.kinds:
        self.kinds[line['kind']].add(line)
        self.latest = line if line['kind'] == 'train' else self.latest
      self._offset = offset


def read_lines(path: Path) -> Iterator[Line]:
  """Yield all whole lines that have a kind and a step, in the order written."""
  if path.is_file():
    yield from (line for line, _ in _lines(path, 0) if line is not None)


def _lines(path: Path, offset: int) -> Iterator[tuple[Line | None, int]]:
  """(a line, None where it is damaged; the place behind it) from a place in the file on.

  The place of a last line that is torn is that before it: its end may come.
  """
  with path.open('rb') as file:
    end = os.fstat(file.fileno()).st_size  # Or it might grow as fast as it is read.
    file.seek(offset)
    while offset < end and (text := file.readline(MOST_BYTES)):
      whole = text.endswith(b'\n')
      while not whole and (more := file.readline(MOST_BYTES)):
        whole, text = more.endswith(b'\n'), b'?'  # Too long.
      if text.strip():
        line = _parsed(text)
        yield line, file.tell() if whole or line else offset
      offset = file.tell()


def _parsed(text: bytes) -> Line | None:
  try:
    line = json.loads(text.decode(errors='replace'))
  except (ValueError, RecursionError, MemoryError):
    return None
  good = isinstance(line, dict) and isinstance(line.get('kind'), str) and _is_step(line.get('step'))
  if good and len(text) > _USUAL_BYTES:
    line = {key: value for key, value in line.items() if _is_small(value)}
  return line if good else None


def _is_small(value: Any) -> bool:
  if isinstance(value, list):
    return len(value) <= 1000 and all(v is None or is_number(v) for v in value)
  if isinstance(value, str):
    return len(value) < 200
  return value is None or isinstance(value, (int, float))


def _is_step(value: Any) -> bool:
  return is_number(value) and 0 <= value < MOST_STEP and value == int(value)


class Moment(NamedTuple):
  """How far a run is: step, of how many, after how many seconds; None for what is not known."""

  step: float | None = None
  of: float | None = None
  seconds: float | None = None


@dataclasses.dataclass(frozen=True)
class Told:
  """What scores.json says.

  columns: metrics by name, for each column. measured: sentences on what they were measured on.
  warnings: what to beware of. settings: how, and at which step.
  """

  columns: dict[str, dict[str, Any]]
  measured: list[str]
  warnings: list[str]
  settings: dict[str, Any]

  @classmethod
  def of(cls, scores: dict[str, Any]) -> 'Told':
    """Sort what is in there; what is none of these is a setting."""
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
  """Read a run directory; `metrics` has read those of this run before, and reads on.

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
  """Return (step, path) of the sample grids in a folder, in order of the step."""
  found = (path for path in folder.glob('*.png') if path.is_file())
  matches = ((re.fullmatch(r'step_(\d+)\.png', path.name), path) for path in found)
  return sorted((int(match[1]), path) for match, path in matches if match)


def _read_object(path: Path) -> dict[str, Any]:
  if not path.exists():
    return {}
  return read_object(path, remedy='repair it, or remove it and try again')
