"""Where metrics can go: a file of JSON lines, TensorBoard, Weights & Biases.

A back-end is opened and written to from a thread of its own (`metrics_writer`), so it may be slow
and it may raise. A record that `write` took without an error is as safe as it can be there. The
packages are imported beforehand: Python 3.11 fails now and then where two threads import at once.
"""

import contextlib
import os
import secrets
import socket
import sys
import time
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol

import numpy as np

from diffusion_jax.errors import UserError
from diffusion_jax.io.run_directory import RunDirectory


class Record(NamedTuple):
  """What is written at one step: numbers (`line` holds them as JSON), or a picture.

  numbers: name with its kind -> finite number; image: uint8 [h w 3] or None; time: seconds since
  the epoch.
  """

  step: int
  time: float
  line: str = ''
  numbers: dict[str, float] | None = None
  name: str = ''
  image: np.ndarray | None = None


class Backend(Protocol):
  """One place for metrics. Any method may raise; after an error it is closed and opened anew."""

  name: str

  def open(self) -> None: ...

  def write(self, record: Record) -> None: ...

  def close(self) -> None: ...


class JsonLines:
  """metrics.jsonl: a line for each record of numbers."""

  name = 'metrics.jsonl'

  def __init__(self, path: Path):
    self._path = path
    self._file = None

  def open(self) -> None:
    """Opens to append; a line that a crash or a full disk has torn is cut off."""
    self._path.parent.mkdir(parents=True, exist_ok=True)
    if self._path.is_file():
      with self._path.open('rb+') as file:
        file.truncate(_after_last_line(file))
    self._file = self._path.open('ab', buffering=0)

  def write(self, record: Record) -> None:
    if not record.line:
      return
    # A deleted file would go on taking lines that nobody can read.
    if not os.path.samestat(os.stat(self._path), os.fstat(self._file.fileno())):
      raise FileNotFoundError(f'{self._path} was replaced')
    data = memoryview(record.line.encode() + b'\n')
    while data:  # A disk that is nearly full takes a part and refuses the rest.
      data = data[self._file.write(data) :]

  def close(self) -> None:
    if self._file:
      self._file.close()


def _after_last_line(file: BinaryIO) -> int:
  """The place behind the last line end, found from the end on: the file may be long."""
  end = file.seek(0, os.SEEK_END)
  while end:
    start = max(0, end - 2**16)
    file.seek(start)
    found = file.read(end - start).rfind(b'\n')
    if found >= 0:
      return start + found + 1
    end = start
  return 0


@contextlib.contextmanager
def _without_torch():
  """Within, PyTorch cannot be imported, unless it has been: tensorboardX would, if it is there.

  It needs only the name of a class, which we do not, for some seconds and 300 MB of every run.
  """
  absent = object()
  before = sys.modules.get('torch', absent)
  if before is absent:
    sys.modules['torch'] = None
  try:
    yield
  finally:
    if before is absent:
      del sys.modules['torch']


class TensorBoard:
  """Event files, without tensorboardX's own thread: it dies at the first error, unheard, and then
  blocks whoever adds the eleventh event."""

  name = 'tensorboard'

  def __init__(self, folder: Path):
    """Raises ImportError where tensorboardX is missing."""
    with _without_torch():
      from tensorboardX import record_writer, summary
      from tensorboardX.proto import event_pb2

    self._records, self._summary, self._event = record_writer, summary, event_pb2.Event
    self._folder = folder
    self._file = None

  def open(self) -> None:
    """Begins a file of its own, as TensorBoard stops reading one at a torn event."""
    self._folder.mkdir(parents=True, exist_ok=True)
    # TensorBoard reads the files in the order of their names.
    name = f'events.out.tfevents.{time.time():.3f}.{socket.gethostname()}.{os.getpid()}'
    self._file = self._records.RecordWriter(str(self._folder / name))
    self._add(wall_time=time.time(), file_version='brain.Event:2')

  def write(self, record: Record) -> None:
    os.stat(self._file.path)  # A deleted file would go on taking events that nobody can read.
    if record.image is not None:
      values = [self._summary.image(record.name, record.image, dataformats='HWC')]
    else:
      values = [self._summary.scalar(name, value) for name, value in record.numbers.items()]
    for value in values:
      self._add(wall_time=record.time, step=record.step, summary=value)
    self._file.flush()

  def _add(self, **fields: Any) -> None:
    self._file.write(self._event(**fields).SerializeToString())

  def close(self) -> None:
    if self._file:
      self._file.close()


class WeightsAndBiases:
  """A run of Weights & Biases, the same one after a restart; obeys WANDB_MODE and its kin."""

  name = 'wandb'

  def __init__(self, run: RunDirectory, project: str, config: dict[str, Any]):
    import wandb

    self._wandb = wandb
    self._directory, self._project, self._config = run, project, config
    self._run = None

  def open(self) -> None:
    wandb = self._wandb
    settings = wandb.Settings(silent=True, console='off', init_timeout=60, finish_timeout=60)
    mode = os.environ.get('WANDB_MODE', 'online')
    if mode == 'online' and not wandb.login(prompt=False):
      raise RuntimeError('no API key: run `wandb login`, or set WANDB_MODE=offline')
    self._run = wandb.init(
      project=self._project, id=self._id(), name=self._directory.path.name, resume='allow',
      dir=str(self._directory.path), config=self._config, settings=settings,
    )
    # Its own counter of steps never goes back; ours does after a restart.
    self._run.define_metric('*', step_metric='step')

  def _id(self) -> str:
    file = self._directory.path / 'wandb_run_id'
    if not file.exists():
      self._directory.write_text(file.name, secrets.token_hex(4) + '\n')
    return file.read_text(encoding='utf-8').strip()

  def write(self, record: Record) -> None:
    values = record.numbers
    if record.image is not None:
      values = {record.name: self._wandb.Image(record.image)}
    self._run.log({'step': record.step, **values})

  def close(self) -> None:
    if not self._run:
      return
    run, self._run = self._run, None
    try:
      run.finish()
    except Exception:
      self._wandb.teardown()  # Or a service that died would be asked again for ever.
      raise


def check_wandb(project: str) -> None:
  """Whether wandb can be used, where it is asked for.

  Raises:
    UserError: it is not installed.
  """
  if not project:
    return
  try:
    import wandb  # noqa: F401
  except ImportError as error:
    raise UserError(
      f"loop.wandb_project is set but the package wandb cannot be imported ({error}); pip install "
      "'diffusion_jax[wandb]', or leave loop.wandb_project empty."
    ) from error
