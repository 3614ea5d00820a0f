"""The files of a run directory, readable also during the run and after a crash.

metrics.jsonl is read a line at a time, in bounded memory, from where the last reading ended. All
lines are kept while they are few; later each stretch of steps keeps the mean and extremes of every
metric, and stretches grow with the run.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import operator
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from diffusion_jax.errors import UserError
from diffusion_jax.files import bounded_bytes, read_object, reading

Line = dict[str, Any]
Point = tuple[float, float | None]

MOST_STRETCHES = 2000
"""Stretches of steps, of which each keeps a line of its own."""
MOST_METRICS = 300
"""By name, of one kind of line; those that come later are left out."""
MOST_BYTES = 2**18
"""Most bytes of a line; longer ones count as damaged."""
_USUAL_BYTES = 2**13
"""Bytes of a line; only small values are kept of a longer one."""
MOST_STEP = 2**53
MOST_CARD = 2**20
"""Bytes of a model card."""
_NUMBER, _VALUE = operator.itemgetter(0), operator.itemgetter(1)
_SCALARS = (int, float, bool, type(None))
_LARGEST = 1e30
"""Beyond it no chart can be drawn."""


def is_number(value: Any) -> bool:
  """Return whether a JSON value is a number; true and false are not."""
  return isinstance(value, (int, float)) and not isinstance(value, bool)


class Curve(NamedTuple):
  """One metric over the steps.

  points: (step, value) of all lines in order, or of long runs the extremes of each stretch; None
  for a value that was not finite. means: the same, or the mean of each stretch. missing: the number
  of values that were not finite. first, last: of the lines with a number.
  """

  points: list[Point]
  means: list[Point]
  missing: int
  first: float | None
  last: float | None


class _Sums(NamedTuple):
  """One metric in a stretch; low, high: (step, value); gap: a step without a value."""

  count: int
  total: float
  missing: int
  low: Point | None
  high: Point | None
  gap: float | None

  @classmethod
  def of(cls, points: list[tuple[float, Any]]) -> _Sums:
    good = [p for p in points if type(p[1]) in (int, float) and -_LARGEST < p[1] < _LARGEST]
    gap = None if len(good) == len(points) else next(p[0] for p in points if p not in good)
    return cls(
      len(good), sum(map(_VALUE, good)), len(points) - len(good),
      min(good, key=_VALUE, default=None), max(good, key=_VALUE, default=None), gap,
    )

  def then(self, other: _Sums) -> _Sums:
    lows, highs = ([p for p in pair if p] for pair in zip(self[3:5], other[3:5], strict=True))
    return _Sums(
      self.count + other.count, self.total + other.total, self.missing + other.missing,
      min(lows, key=_VALUE, default=None), max(highs, key=_VALUE, default=None),
      other.gap if self.gap is None else self.gap,
    )

  @property
  def mean(self) -> float | None:
    return self.total / self.count if self.count else None

  @property
  def points(self) -> list[Point]:
    found = {self.low, self.high, None if self.gap is None else (self.gap, None)} - {None}
    return sorted(found, key=lambda point: point[0])


class _Stretch(NamedTuple):
  """Lines of neighbouring steps, of which the last is kept; steps: the sum of theirs."""

  count: int
  steps: int
  last: Line
  sums: dict[str, _Sums]

  @classmethod
  def of(cls, lines: list[Line]) -> _Stretch:
    points = collections.defaultdict(list)
    for line in lines:
      step = line['step']
      for key, value in line.items():
        if type(value) in _SCALARS:
          points[key].append((step, value))
    sums = {key: _Sums.of(own) for key, own in points.items() if key != 'step'}
    return cls(len(lines), sum(line['step'] for line in lines), lines[-1], sums)

  def then(self, other: _Stretch) -> _Stretch:
    both = {k: self.sums[k].then(other.sums[k]) for k in self.sums.keys() & other.sums.keys()}
    return _Stretch(
      self.count + other.count, self.steps + other.steps, other.last,
      self.sums | other.sums | both,
    )

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
    self._open: list[Line] = []  # The lines of the newest stretch, not summed yet.
    self._width, self._newest = 1, -1.0
    self._first: dict[str, float | None] = {}  # Number of each name, in order of appearance.
    self._settled: set[str] = set()  # Of names, those that need not be looked at again.
    self.left_out = 0

  def add(self, line: Line) -> None:
    """Add one line with a step in [0, MOST_STEP)."""
    step = line['step']
    goes_back = step <= self._newest
    if self._open and (goes_back or self._number(step) != self._number(self._open[0]['step'])):
      self._close()
    if goes_back and self._width > 1:
      number = self._number(step)
      self._stretches = {n: s for n, s in self._stretches.items() if n <= number}
    self._open.append(self._within_bounds(line))
    self._newest = step

  def _number(self, step: float) -> int:
    return int(step // self._width)

  def _close(self) -> None:
    if not self._open:
      return
    number, stretch = self._number(self._open[0]['step']), _Stretch.of(self._open)
    before = self._stretches.get(number) if self._width > 1 else None
    self._stretches[number], self._open = before.then(stretch) if before else stretch, []
    while len(self._stretches) > MOST_STRETCHES:
      self._widen()

  def _widen(self) -> None:
    self._width *= 2
    old, self._stretches = sorted(self._stretches.items(), key=_NUMBER), {}
    for number, stretch in old:
      before = self._stretches.get(number // 2)
      self._stretches[number // 2] = before.then(stretch) if before else stretch

  def _ordered(self) -> list[_Stretch]:
    self._close()
    return [stretch for _, stretch in sorted(self._stretches.items(), key=_NUMBER)]

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
    return [stretch.line for stretch in self._ordered()]

  @property
  def names(self) -> list[str]:
    """Names of metrics that have been a number at least once, in order of appearance."""
    return [
      name for name, first in self._first.items()
      if first is not None and name not in ('step', 'time')
    ]

  def curve(self, key: str) -> Curve:
    """Return the values of one metric."""
    found = [(s.step, s.sums[key], s.last) for s in self._ordered() if key in s.sums]
    numbers = [last[key] for _, _, last in found if is_number(last.get(key))]
    return Curve(
      [point for _, sums, _ in found for point in sums.points],
      [(step, sums.mean) for step, sums, _ in found], sum(sums.missing for _, sums, _ in found),
      self._first.get(key), numbers[-1] if numbers else None,
    )


class MetricsFile:
  """A metrics.jsonl that is read on as it grows, and anew where it was replaced.

  train, evaluation: the lines of these kinds. latest: the train line written last; after a resume
  perhaps not the largest step's. unreadable: lines left out, such as one torn by a crash.
  """

  def __init__(self, path: Path):
    self._path = path
    self._forget()

  def _forget(self) -> None:
    self.train, self.evaluation = Metrics(), Metrics()
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
      elif line['kind'] == 'train':
        self.train.add(line)
        self.latest = line
      elif line['kind'] == 'evaluation':
        self.evaluation.add(line)
      self._offset = offset


def read_lines(path: Path) -> Iterator[Line]:
  """Yield all complete lines that have a kind and a step, in the order written."""
  if path.is_file():
    yield from (line for line, _ in _lines(path, 0) if line is not None)


def _lines(path: Path, offset: int) -> Iterator[tuple[Line | None, int]]:
  """(a line or None if damaged, the place behind it) from a place in the file on.

  A torn last line keeps the place before it: its end may come.
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
  """The progress of a run: step, total steps, seconds; None where unknown."""

  step: float | None = None
  of: float | None = None
  seconds: float | None = None


@dataclasses.dataclass(frozen=True)
class Run:
  """A run directory; missing parts are empty.

  name: the directory's own. grids: (step, path) of the sample grids, in order. card: what the model
  card says first: its 'title', and its facts by name, such as 'Data'. has_model_card: there is a
  README.md.
  """

  name: str
  config: dict[str, Any]
  metrics: MetricsFile
  grids: list[tuple[int, Path]]
  scores: dict[str, Any]
  versions: dict[str, Any]
  status: dict[str, Any]
  card: dict[str, str]
  has_model_card: bool

  @property
  def moment(self) -> Moment:
    """The later of status and metrics by time spent, which grows even after a resume."""
    known = lambda values, *keys: [
      values.get(key) if is_number(values.get(key)) else None for key in keys
    ]
    status = Moment(*known(self.status, 'step', 'total_steps', 'seconds'))
    line = Moment(*known(self.metrics.latest, 'step', 'total_steps', 'time'))
    if status.step is None or (line.seconds or 0) > (status.seconds or 0):
      return line._replace(of=status.of)
    return status


def read_run(workdir: Path, metrics: MetricsFile | None = None) -> Run:
  """Read a run directory; `metrics` reads on. UserError: no directory, no run or damaged JSON."""
  workdir = Path(workdir)
  if not workdir.is_dir():
    raise UserError(f'There is no run directory {workdir}: give the workdir of a training run.')
  metrics = metrics or MetricsFile(workdir / 'metrics.jsonl')
  with reading(workdir / 'metrics.jsonl', remedy='check the disk'):
    metrics.update()
  grids = find_grids(workdir / 'samples')
  objects = {name: _read_object(workdir / f'{name}.json')
             for name in ('config', 'scores', 'versions', 'status')}
  lines = metrics.train.lines or metrics.evaluation.lines
  if not (lines or grids or any(objects[name] for name in ('config', 'scores', 'status'))):
    raise UserError(
      f'{workdir} holds no run (no config.json, status.json, metrics.jsonl, samples, scores.json): '
      'give the workdir of a training run that has started.'
    )
  return Run(
    name=workdir.resolve().name, metrics=metrics, grids=grids, card=_card(workdir / 'README.md'),
    has_model_card=(workdir / 'README.md').is_file(), **objects,
  )


def find_grids(folder: Path) -> list[tuple[int, Path]]:
  """Return (step, path) of the sample grids in a folder, in order of the step."""
  found = (path for path in folder.glob('*.png') if path.is_file())
  matches = ((re.fullmatch(r'step_(\d+)\.png', path.name), path) for path in found)
  return sorted((int(match[1]), path) for match, path in matches if match)


def _card(path: Path) -> dict[str, str]:
  """Return the title and the first facts of a model card; nothing of what is not one of ours."""
  try:
    text = bounded_bytes(path, MOST_CARD).decode(errors='replace') if path.is_file() else ''
  except UserError:
    return {}
  head = text.partition('\n## ')[0]
  facts = dict(re.findall(r'^- ([A-Z][\w ]{1,40}): (.{1,300})$', head, re.MULTILINE))
  title = re.match(r'# (.{1,200})\n', head)
  return {'title': title[1]} | facts if title and facts else {}


def _read_object(path: Path) -> dict[str, Any]:
  if not path.exists():
    return {}
  return read_object(path, remedy='repair it, or remove it and try again')
