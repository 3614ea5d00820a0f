"""What is written where: splits, shards, and the file that says which set a folder begins.

    OUT/prepare.json   options, fingerprints and shards; the first file there
    OUT/.prepare       notes of shards (`shard.NOTE`) and a lock, until all is done
"""

import contextlib
import json
import os
import re
import shlex
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from diffusion_jax.data.prepare.options import SourceOptions
from diffusion_jax.data.prepare.shard import NOTE, Job, keep
from diffusion_jax.data.sources import open_data
from diffusion_jax.data.sources.pictures import PictureSource
from diffusion_jax.data.sources.records import SUFFIX, Shard, shard_name, whole_shard
from diffusion_jax.data.splits import APART, Measured, of_chosen, of_own_splits, spread
from diffusion_jax.errors import Unreadable, UserError
from diffusion_jax.files import atomic_write, first_line, read_object
from diffusion_jax.runs.lock import RunLock

PLAN, NOTES = 'prepare.json', '.prepare'
FORMAT, VERSION = 'diffusion_jax.prepare', 1
PER_SHARD = 1024
"""Pictures of a shard, where nobody says: what is lost by a kill, and what a process does at once.
"""
_SAMPLE = 24
"""Pictures that tell how much space all will need."""
_SPARE = 1.1
_LEFT = re.compile(rf'\..*\.[0-9a-f]{{8}}\.tmp|.*{re.escape(SUFFIX)}')


class Plan(NamedTuple):
  """splits: by name, 'train' and perhaps 'test'. jobs: all shards, in order. values: of PLAN."""

  folder: Path
  options: SourceOptions
  splits: dict[str, PictureSource]
  jobs: list[Job]
  values: dict[str, Any]
  command: str

  @property
  def notes(self) -> Path:
    """The folder of notes."""
    return self.folder / NOTES

  def done(self) -> list[Job]:
    """Jobs whose shards are whole."""
    return [job for job in self.jobs if self.shard(job) is not None]

  def shard(self, job: Job) -> Shard | None:
    """The whole shard of a job with its notes, or None."""
    whole = all(job.notes.with_suffix(suffix).is_file() for suffix in ('.npy', '.json'))
    return whole_shard(job.path) if whole else None

  def measured(self, counts: Mapping[str, int]) -> Measured:
    """What scores on the test split are measured on; counts: of records that could be read."""
    test = self.splits.get('test')
    if test is None:
      return Measured('There is no test split: one by content is made when they are opened.')
    if test.entries is self.splits['train'].entries and test.measured != APART:
      return of_chosen(counts['test'], sum(counts.values()))
    # What was not known when it was opened is found out by now.
    return APART if test.measured == of_own_splits(len(test), None) else test.measured


def make_plan(options: SourceOptions, size: int, data_dir: str) -> Plan:
  """Open the source and lay out its shards; nothing is written. UserError: it has no pictures."""
  splits = _splits(options, size, data_dir)
  folder, jobs, counts = options.folder, [], {}
  total = len(splits['train'])
  shards = min(options.shards or -(-total // PER_SHARD), total)
  for name, source in splits.items():
    count = min(max(1, round(shards * len(source) / total)), len(source))
    counts[name] = [len(source), count]
    for number in range(count):
      first, last = (len(source) * each // count for each in (number, number + 1))
      path = folder / shard_name(name, number, count)
      jobs.append(Job(name, first, last, path, folder / NOTES / path.name.removesuffix(SUFFIX)))
  values = {
    'format': FORMAT, 'version': VERSION, **options.kept(), 'size': size, 'splits': counts,
    'fingerprints': {name: source.fingerprint() for name, source in splits.items()},
  }
  return Plan(folder, options, splits, jobs, values, _command(options, size))


def _splits(options: SourceOptions, size: int, data_dir: str) -> dict[str, PictureSource]:
  train, test = open_data(options.data(size, data_dir))
  if not isinstance(train, PictureSource) or not isinstance(test, PictureSource):
    raise UserError(f'--source {options.source} has no pictures; give pictures, such as folder:DIR')
  both = {'train': train, 'test': test}
  found = {'train': train} if test.measured.trained_on and test.entries is train.entries else both
  for name, source in found.items():
    if not len(source):
      raise UserError(f'--source {options.source} has no pictures in its {name} split.')
  return found


def _command(options: SourceOptions, size: int) -> str:
  """The command that writes the same."""
  words = ['python', '-m', 'diffusion_jax', 'prepare']
  # Where it lies is nobody's business, and no part of what it is.
  for name, value in (vars(options) | {'out': options.folder.name}).items():
    default = type(options).__dataclass_fields__[name].default
    if name != 'workers' and value != default:
      for each in value if isinstance(value, tuple) else [value]:
        words += [f'--{name}'] if each is True else [f'--{name}', str(each)]
  if not options.source.partition(':')[1]:  # One that is made, of that size.
    words += ['--size', str(size)]
  return shlex.join(words)


@contextlib.contextmanager
def claimed(plan: Plan) -> Iterator[None]:
  """Hold the folder of a plan, which is new, or has the beginning of the same.

  UserError: it holds something else, another process is at work there, or it cannot be written.
  """
  try:
    _check_own(plan)
    plan.notes.mkdir(parents=True, exist_ok=True)
    lock = RunLock(plan.notes)
    lock.take()
  except OSError as error:
    raise UserError(
      f'--out {plan.folder} cannot be written ({first_line(error)}); give another folder.'
    ) from error
  try:
    _check_own(plan)
    _remove_left(plan)
    if not (plan.folder / PLAN).exists():
      with atomic_write(plan.folder / PLAN, flushed=True) as file:
        file.write(json.dumps(plan.values, indent=1).encode())
    yield
  finally:
    lock.release()


def _check_own(plan: Plan) -> None:
  """Refuse whatever is not the beginning of the same set."""
  check_folder(plan.folder)
  if (plan.folder / PLAN).is_file():
    found = read_object(plan.folder / PLAN)
    if other := [
      key for key in plan.values | found if plan.values.get(key) != found.get(key)
    ]:
      raise UserError(
        f'--out {plan.folder} has another set, or this one with other pictures or options '
        f'({", ".join(other)} differ); give another folder, or delete it.'
      )


def check_folder(folder: Path) -> None:
  """UserError for a folder that is in use for something else; nothing is written."""
  if folder.exists() and not folder.is_dir():
    raise UserError(f'--out {folder} is no folder; give one that is new or empty.')
  if (folder / NOTES).is_symlink():
    raise UserError(f'{folder / NOTES} is a link; give another folder for --out.')
  if folder.exists() and not (folder / PLAN).is_file():
    foreign = [name for name in os.listdir(folder)
               if name != NOTES and not name.startswith(f'.{PLAN}.')]
    if foreign:
      raise UserError(
        f'--out {folder} has files of something else, such as {min(foreign)}; give a folder that '
        'is new or empty.'
      )


def _remove_left(plan: Plan) -> None:
  """Remove what killed processes have left of shards that are not whole."""
  whole = {job.path.name for job in plan.done()}
  for folder in (plan.folder, plan.notes):
    for name in os.listdir(folder):
      if _LEFT.fullmatch(name) and name not in whole:
        (folder / name).unlink()


def check_space(plan: Plan, jobs: list[Job]) -> None:
  """UserError where the shards of these jobs would not fit on the disk, by some pictures' size."""
  left = sum(job.last - job.first for job in jobs)
  sizes = []
  for source in plan.splits.values():
    for place in spread(len(source), max(1, _SAMPLE // len(plan.splits))):
      with contextlib.suppress(Unreadable):
        entry = source.entries[int(source.numbers[place])]
        sizes.append(len(keep(entry, plan.options).data))
  need = int(_SPARE * left * (sum(sizes) / max(len(sizes), 1) + NOTE.itemsize))
  free = shutil.disk_usage(plan.folder).free
  if need > free:
    raise UserError(
      f'the rest of {left:,} pictures needs about {need / 1e9:.2g} GB, but {plan.folder} has '
      f'{free / 1e9:.2g} GB free; make room, or give a smaller --max_edge.'
    )
