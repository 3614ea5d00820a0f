"""Metrics of a run on their way to JSON lines, TensorBoard and Weights & Biases.

None can slow or stop training: each has a thread. Packages are imported beforehand: Python 3.11 may
fail where two threads import at once. Other libraries' writers, such as clu's, raise or lose data
on a full disk.
"""

import collections
import contextlib
import functools
import json
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from diffusion_jax.errors import UserError
from diffusion_jax.files import first_line, say
from diffusion_jax.runs.directory import RunDirectory

_MOST_RECORDS, _MOST_IMAGES = 10_000, 8
"""Kept in memory for a back-end that is slow or away."""


class Record(NamedTuple):
  """Numbers of one step (`line` is their JSON), or an image uint8 [h w 3].

  numbers: name with its kind -> finite number. time: seconds since the epoch.
  """

  step: int
  time: float
  line: str = ''
  numbers: dict[str, float] | None = None
  name: str = ''
  image: np.ndarray | None = None


Write = Callable[[Record], None]
Open = Callable[[], AbstractContextManager[Write]]
"""A back-end: whatever raises, within or without, it can be opened anew."""


@contextlib.contextmanager
def json_lines(path: Path) -> Iterator[Write]:
  """Append a line for each record of numbers, after cutting off one that a crash has torn."""
  path.parent.mkdir(parents=True, exist_ok=True)
  if path.is_file():
    with path.open('rb+') as file:
      end = file.seek(0, os.SEEK_END)
      while end:  # From the end on: the file may be long.
        start = max(0, end - 2**16)
        file.seek(start)
        if (found := file.read(end - start).rfind(b'\n')) >= 0:
          end = start + found + 1
          break
        end = start
      file.truncate(end)
  with path.open('ab', buffering=0) as file:

    def write(record: Record) -> None:
      # A deleted file would go on taking lines that nobody can read.
      if record.line and not os.path.samestat(os.stat(path), os.fstat(file.fileno())):
        raise FileNotFoundError(f'{path} was replaced')
      data = memoryview(f'{record.line}\n'.encode() if record.line else b'')
      while data:  # A disk that is nearly full takes a part and refuses the rest.
        data = data[file.write(data) :]

    yield write


def tensorboard(folder: Path) -> Open:
  """An event-file back-end; or ImportError.

  tensorboardX's own thread, which dies unheard at the first error, is left out.
  """
  # It would import PyTorch, for the name of a class: seconds and 300 MB of every run.
  without_torch = 'torch' not in sys.modules
  if without_torch:
    sys.modules['torch'] = None
  try:
    from tensorboardX import record_writer, summary
    from tensorboardX.proto.event_pb2 import Event
  finally:
    if without_torch:
      del sys.modules['torch']

  @contextlib.contextmanager
  def open_file() -> Iterator[Write]:
    """Begin a file of its own, as TensorBoard stops reading one at a torn event."""
    folder.mkdir(parents=True, exist_ok=True)
    # TensorBoard reads the files in the order of their names.
    name = f'events.out.tfevents.{time.time():.3f}.{socket.gethostname()}.{os.getpid()}'
    file = record_writer.RecordWriter(str(folder / name))
    add = lambda **fields: file.write(Event(**fields).SerializeToString())

    def write(record: Record) -> None:
      os.stat(file.path)  # A deleted file would go on taking events that nobody can read.
      if record.image is not None:
        values = [summary.image(record.name, record.image, dataformats='HWC')]
      else:
        values = [summary.scalar(name, value) for name, value in record.numbers.items()]
      for value in values:
        add(wall_time=record.time, step=record.step, summary=value)
      file.flush()

    with contextlib.closing(file):
      add(wall_time=time.time(), file_version='brain.Event:2')
      yield write

  return open_file


def weights_and_biases(directory: RunDirectory, project: str, config: dict[str, Any]) -> Open:
  """Return a back-end of one run of Weights & Biases, the same after a restart of this one."""
  import wandb

  @contextlib.contextmanager
  def open_run() -> Iterator[Write]:
    file = directory.path / 'wandb_run_id'
    if os.environ.get('WANDB_MODE', 'online') == 'online' and not wandb.login(prompt=False):
      raise RuntimeError('no API key: run `wandb login`, or set WANDB_MODE=offline')
    if not file.exists():
      directory.write_text(file.name, secrets.token_hex(4) + '\n')
    run = wandb.init(
      project=project, id=file.read_text(encoding='utf-8').strip(), resume='allow',
      name=directory.path.name, dir=str(directory.path), config=config,
      settings=wandb.Settings(silent=True, console='off', init_timeout=60, finish_timeout=60),
    )

    def write(record: Record) -> None:
      image = record.image
      values = record.numbers if image is None else {record.name: wandb.Image(image)}
      run.log({'step': record.step, **values})

    try:
      # Its own counter of steps never goes back; ours does after a restart.
      run.define_metric('*', step_metric='step')
      yield write
    finally:
      try:
        run.finish()
      except Exception:
        wandb.teardown()  # Or a service that died would be asked again for ever.
        raise

  return open_run


def check_wandb(project: str) -> None:
  """Raise UserError where wandb is asked for and not installed."""
  if not project:
    return
  try:
    import wandb  # noqa: F401
  except ImportError as error:
    raise UserError(
      f"loop.wandb_project is set but the package wandb cannot be imported ({error}); pip install "
      "'diffusion_jax[wandb]', or leave loop.wandb_project empty."
    ) from error


class MetricsWriter:
  """metrics.jsonl, TensorBoard if tensorboardX is there, and wandb if asked for.

  A failed one is switched off with a line on stderr and retried later, with what it missed, within
  bounds. `write` never waits and never raises for a back-end. active: write anything, as on process
  0. wandb_project: '' for none. config: of the run, for wandb. retry_seconds: until a failed one is
  retried.
  """

  def __init__(
    self, run: RunDirectory, active: bool, *, wandb_project: str = '',
    config: dict[str, Any] | None = None, retry_seconds: float = 300.0,
  ):
    backends: dict[str, Open] = {}
    if active:
      backends['metrics.jsonl'] = functools.partial(json_lines, run.metrics)
      try:
        backends['tensorboard'] = tensorboard(run.tensorboard)
      except ImportError:
        say('TensorBoard events are not written; for them, pip install tensorboardX.', 'metrics: ')
      if wandb_project:
        backends['wandb'] = weights_and_biases(run, wandb_project, config or {})
    self._workers = [_Worker(name, opener, retry_seconds) for name, opener in backends.items()]

  @property
  def errors(self) -> list[str]:
    """A sentence for each back-end that is switched off or has lost something."""
    return [worker.sentence for worker in self._workers if worker.sentence]

  def write(self, kind: str, step: int, values: dict[str, Any]) -> None:
    """Write one line of numbers (lists and None allowed), and every plain number as an event."""
    # NaN and infinity are no JSON; they become None.
    clean = lambda v: None if isinstance(v, float) and not np.isfinite(v) else v
    line = {k: [*map(clean, v)] if isinstance(v, list) else clean(v) for k, v in values.items()}
    numbers = {
      f'{kind}/{name}': value for name, value in values.items()
      if isinstance(value, (int, float)) and np.isfinite(value)
    }
    text = json.dumps({'kind': kind, 'step': step, **line})
    self._put(Record(step, time.time(), text, numbers))

  def image(self, name: str, step: int, image: np.ndarray) -> None:
    """Write uint8 [h w 3] as an event."""
    self._put(Record(step, time.time(), name=name, image=image))

  def _put(self, record: Record) -> None:
    for worker in self._workers:
      worker.put(record)

  def flush(self, timeout: float = 10.0) -> None:
    """Wait until all is written, save by back-ends that are switched off, or time is up."""
    end = time.monotonic() + timeout
    for worker in self._workers:
      worker.wait(end - time.monotonic())

  def close(self, timeout: float = 60.0) -> None:
    """Try once more to write what is left, and leave behind what does not finish in time."""
    end = time.monotonic() + timeout
    for worker in self._workers:
      worker.finish()
    for worker in self._workers:
      worker.join(max(end - time.monotonic(), 0.0))
      if worker.is_alive():
        say(f'{worker.name} did not finish within {timeout:g} s and is left behind.', 'metrics: ')
    self._workers = []


class _Worker(threading.Thread):
  """A thread that hands records to one back-end, in order; opened anew after an error."""

  def __init__(self, name: str, opener: Open, retry_seconds: float):
    super().__init__(name=name, daemon=True)
    self._opener, self._retry_seconds = opener, retry_seconds
    self._records: collections.deque[Record] = collections.deque()
    self._changed = threading.Condition()
    self._closing = self._busy = False
    self._error, self._retry_at, self._lost = '', 0.0, 0
    self.start()

  @property
  def sentence(self) -> str:
    """The back-end's error and its losses, '' for none."""
    wrong = [*filter(None, [self._error, f'{self._lost} records lost' if self._lost else ''])]
    return ': '.join([self.name, *wrong]) if wrong else ''

  def put(self, record: Record) -> None:
    """Leave the record to the thread; beyond the bounds the oldest is lost."""
    with self._changed:
      self._records.append(record)
      images = [] if record.image is None else [
        i for i, one in enumerate(self._records) if one.image is not None
      ]
      if len(images) > _MOST_IMAGES or len(self._records) > _MOST_RECORDS:
        del self._records[images[0] if len(images) > _MOST_IMAGES else 0]
        self._lost += 1
      self._changed.notify_all()

  def wait(self, timeout: float) -> None:
    """Wait until nothing is left to write or the back-end is switched off."""
    with self._changed:
      self._changed.wait_for(
        lambda: self._error or not (self._records or self._busy), max(timeout, 0.0)
      )

  def finish(self) -> None:
    """Make the thread end when it has tried to write what is left."""
    with self._changed:
      self._closing = True
      self._changed.notify_all()

  def run(self) -> None:
    opened, write = contextlib.ExitStack(), None
    while (record := self._next()) is not None:
      error = ''
      try:
        write = write or opened.enter_context(self._opener())
        write(record)
      except (Exception, SystemExit) as raised:
        error, write = first_line(raised), None
        _close(opened)
      self._done(record, error)
    _close(opened)

  def _next(self) -> Record | None:
    """Return the next record when it is time for it; None at the end."""
    with self._changed:
      while True:
        wait = self._retry_at - time.monotonic()
        if self._closing and (not self._records or self._retry_at == float('inf')):
          return None
        if self._records and (wait <= 0 or self._closing):
          self._busy = True
          return self._records.popleft()
        self._changed.wait(wait if self._records else None)

  def _done(self, record: Record, error: str) -> None:
    with self._changed:
      before, self._error, self._busy = self._error, error, False
      if error:
        self._records.appendleft(record)
        # One more try at the end, no more.
        self._retry_at = float('inf') if self._closing else time.monotonic() + self._retry_seconds
      self._changed.notify_all()
    if error and not before:
      later = f'trying again in {self._retry_seconds:g} s'
      say(f'{self.name} is switched off ({error}); {later}.', 'metrics: ')
    elif before and not error:
      say(f'{self.name} is back.', 'metrics: ')


def _close(opened: contextlib.ExitStack) -> None:
  with contextlib.suppress(Exception, SystemExit):  # What is unwritten is still in our hands.
    opened.close()
