"""Any source of pictures as sharded records: in parallel, resumed after a kill, with a card.

What is written follows from the source and the options alone, whatever the number of processes and
however often they were killed: each shard is made by one process from its own part of the source,
and is there only when it is whole.
"""

import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from diffusion_jax.data.prepare.options import SourceOptions
from diffusion_jax.data.prepare.plan import (
  PLAN,
  Plan,
  check_folder,
  check_space,
  claimed,
  make_plan,
)
from diffusion_jax.data.prepare.processes import in_processes, processors
from diffusion_jax.data.prepare.shard import Job, write_shard
from diffusion_jax.data.prepare.summary import (
  Notes,
  Summary,
  find_duplicates,
  read_notes,
  summed,
  texts_of,
)
from diffusion_jax.data.sources.records import HEADER, write_header
from diffusion_jax.data.splits import APART, Measured
from diffusion_jax.errors import UserError
from diffusion_jax.files import atomic_write, first_line, read_object

WORDS, SAMPLES = 40, 12
"""Words and captions of a card."""
_MOST_SAID = 100
"""Sentences on single pictures; the cards count all."""
_EVERY = 5.0
"""Seconds between lines of progress."""


def prepare_source(
  options: SourceOptions, size: int, data_dir: str, write_card: Callable[[Summary], None],
  say: Callable[[str], None],
) -> Path:
  """Write the records of a source; return their folder.

  size, data_dir: of sources that are made. write_card: of the finished set; its errors are said and
  end nothing. say: takes progress and warnings. UserError: an impossible source or folder, another
  set there, too little space, too many pictures that cannot be read.
  """
  check_folder(options.folder)
  plan = make_plan(options, size, data_dir)
  if _is_done(plan):
    say(f'{plan.folder} has it already.')
    return plan.folder
  with claimed(plan):
    _write_shards(plan, say)
    summary = _finish(plan, say)
    try:
      write_card(summary)
    except Exception as error:  # The records are whole without it.
      say(f'the card cannot be written ({first_line(error)}); run the command again for it.')
      return plan.folder
  shutil.rmtree(plan.notes, ignore_errors=True)
  return plan.folder


def _is_done(plan: Plan) -> bool:
  here = [(plan.folder / name).is_file() for name in (PLAN, HEADER)]
  return all(here) and not plan.notes.exists() and read_object(plan.folder / PLAN) == plan.values


def _write_shards(plan: Plan, say: Callable[[str], None]) -> None:
  done = set(plan.done())
  left = [job for job in plan.jobs if job not in done]
  if left:
    check_space(plan, left)
  total = sum(len(source) for source in plan.splits.values())
  damage = _Damage(plan, total, say)
  for job in plan.jobs:
    if job in done:
      damage.add(read_notes([job]).texts[0]['bad'], new=False)
  progress = Progress(total, sum(job.last - job.first for job in done), say)
  workers = plan.options.workers or processors()
  shared = plan.splits, plan.options
  for finished in in_processes(_work, shared, left, workers, progress.count):
    damage.add(finished.result, new=True)
  progress.say()


def _work(shared: tuple, job: Job, count: Callable[[int], None]) -> list[list[str]]:
  splits, options = shared
  try:
    return write_shard(job, splits[job.split], options, count)
  except (OSError, RuntimeError) as error:  # What the writer of ArrayRecord raises.
    raise UserError(
      f'{job.path} cannot be written ({first_line(error)}); make room, then run the command again: '
      'whole shards are kept.'
    ) from error


class Progress:
  """Says how many pictures are done, and how long the rest may take, every few seconds."""

  def __init__(self, total: int, done: int, say: Callable[[str], None]):
    self._total, self._done, self._say = total, done, say
    self._began, self._first, self._said = time.monotonic(), done, time.monotonic()
    if done:
      say(f'{done:,} of {total:,} pictures are in whole shards already.')

  def count(self, number: int) -> None:
    """Add pictures."""
    self._done += number
    if time.monotonic() - self._said >= _EVERY:
      self.say()

  def say(self) -> None:
    """Say it now."""
    self._said = time.monotonic()
    rate = (self._done - self._first) / max(self._said - self._began, 1e-9)
    rest = (self._total - self._done) / rate if rate else 0
    self._say(
      f'{self._done:,} of {self._total:,} pictures, {rate:,.0f} a second'
      + (f', {rest:,.0f} s left' if rest else '')
    )


class _Damage:
  """Counts what cannot be read, names it once, and ends the command where it is too much."""

  def __init__(self, plan: Plan, total: int, say: Callable[[str], None]):
    self._most, self._total, self._say = plan.options.most_unreadable, total, say
    self._found: list[str] = []

  def add(self, bad: Sequence[Sequence[str]], new: bool) -> None:
    """Add [cause, sentence, name] of each. UserError where they are too many."""
    for _, sentence, _ in bad:
      self._found.append(sentence)
      if new and len(self._found) < _MOST_SAID:
        self._say(sentence)
    if len(self._found) > self._most * self._total:
      raise UserError(
        f'{len(self._found):,} of {self._total:,} pictures cannot be read, more than the fraction '
        f'of {self._most:g} that --most_unreadable allows: {"; ".join(self._found[:3])}'
      )


def _finish(plan: Plan, say: Callable[[str], None]) -> Summary:
  """Number the classes, look for duplicates, write the header; all shards are whole."""
  jobs = {name: [job for job in plan.jobs if job.split == name] for name in plan.splits}
  notes = {name: read_notes(own) for name, own in jobs.items()}
  classes = sorted({label for each in notes.values() for text in each.texts
                    for label in text['labels']})
  rows = {name: _number_classes(jobs[name], notes[name], classes) for name in jobs}
  if empty := [name for name, each in rows.items() if not sum(map(len, each))]:
    raise UserError(
      f'no picture of {plan.options.source} can be read in its {empty[0]} split; give others.'
    )
  source = plan.splits['train']
  credit, notes_said = plan.options.credit or source.credit, list(source.notes)
  measured = plan.measured({name: sum(map(len, each)) for name, each in rows.items()})
  summary = Summary(
    plan.folder, plan.options.source, plan.command,
    {name: summed(notes[name], rows[name], classes) for name in jobs},
    **texts_of(notes, WORDS, SAMPLES), duplicates=find_duplicates(notes),
    measured=measured.sentence, notes=notes_said, credit=credit, kept=plan.options.kept(),
    fingerprints=plan.values['fingerprints'],
  )
  for note in notes_said:
    say(note)
  for warning in summary.warnings:
    say(f'beware: {warning[0].lower()}{warning[1:]}')
  shards = {name: [plan.shard(job) for job in own] for name, own in jobs.items()}
  said = None
  if 'test' in jobs and (summary.warnings or measured != APART):
    said = Measured(' '.join([measured.sentence, *summary.warnings]), measured.trained_on)
  write_header(plan.folder, shards, classes, credit, said)
  return summary


def _number_classes(jobs: Sequence[Job], notes: Notes, classes: Sequence[str]) -> list[np.ndarray]:
  """Write the numbers of classes, known only now, into the rows of shards; return those."""
  found = []
  for job, labels in zip(jobs, notes.labels(classes), strict=True):
    path = job.path.with_suffix('.npy')
    rows = np.load(path, allow_pickle=False)
    if not np.array_equal(rows['label'], labels):
      rows['label'] = labels
      with atomic_write(path, flushed=True) as file:
        np.save(file, rows)
    found.append(rows)
  return found
