"""Scores each checkpoint of a run as it is written, while the run goes on elsewhere."""

from __future__ import annotations

import argparse
import json
import shutil
import time
import zlib
from pathlib import Path
from typing import Any

from diffusion_jax.cli import evaluate_job, evaluate_model
from diffusion_jax.errors import UserError
from diffusion_jax.files import read_object, reading

POLL_SECONDS = 5.0
STALE_SECONDS = 1800.0
"""After so long without a word, a run that is not over is taken for dead."""


def run(args: argparse.Namespace, out: Path) -> int:
  """Until the run is over and all of its checkpoints are scored; each leaves a row and a point."""
  evaluate_job.start()
  config = _first_checkpoint(args.workdir)
  subject, comparison = evaluate_model.open_subject(args, out, config)
  settings = evaluate_model.settings_of(subject) | _followed(args, subject)
  history = _history(out, evaluate_job.settings_of(comparison) | settings)
  passed = {line['step'] for line in history}
  while (step := _next(subject.run, passed)) is not None:
    passed.add(step)
    _score(args, out, step, subject, comparison, history, settings)
  print(f'{args.workdir} is over; {len(passed)} checkpoints are in {out.with_suffix(".csv").name}')
  return 0


def _followed(args: argparse.Namespace, subject) -> dict[str, Any]:
  """What must be the same for checkpoints to be of one history."""
  checksum = zlib.crc32('\n'.join(subject.captions).encode())
  return {
    'run': str(Path(args.workdir).resolve()), 'ema_halflife_images': args.ema_halflife_images,
    'captions': len(subject.captions), 'captions_checksum': f'{checksum:08x}',
  }


def _score(
  args: argparse.Namespace, out: Path, step: int, subject, comparison, history: list[dict],
  settings: dict[str, Any],
) -> None:
  """In a function of its own, so that its weights are gone before those of the next are read."""
  place = comparison.parts / f'{step:08d}'
  columns = _columns(subject, step, place.name)
  if columns is None:
    return
  found = comparison(columns)
  if found is not None:
    about = subject.about, subject.split('test')
    _write(args, out, comparison, found, history, settings | {'step': step}, about)
  if evaluate_job.all_are_here('scored'):
    shutil.rmtree(place, ignore_errors=True)


def _next(run, passed: set[int]) -> int | None:
  """The first step that is not passed, waited for; None once there will be no more."""
  from diffusion_jax.parallel.processes import agree

  while True:
    # First whether it is over, then what there is, or the last checkpoint could be overlooked.
    over = _over(run.workdir)
    new = [step for step in run.steps() if step not in passed]
    word = agree('follow', json.dumps([over, new[:1]]))[0]
    over, new = json.loads(word)
    if new or over:
      return new[0] if new else None
    time.sleep(POLL_SECONDS)


def _over(workdir: str) -> bool:
  from diffusion_jax.runs.directory import RunDirectory
  from diffusion_jax.runs.status import stands_still

  return stands_still(RunDirectory(workdir), STALE_SECONDS)


def _first_checkpoint(workdir: str) -> dict[str, Any]:
  """Waits for it; the run's config. UserError where there is no run, or it has ended without."""
  from diffusion_jax.checkpoint.checkpoints import Checkpoints
  from diffusion_jax.parallel.processes import agree
  from diffusion_jax.runs.directory import RunDirectory

  directory = RunDirectory(workdir)
  config = directory.read_json('config.json')
  checkpoints = Checkpoints(directory.checkpoints, read_only=True)
  told = False
  while True:
    over = _over(workdir)  # First, as in `_next`; and all processes go by what one has seen.
    seen = agree('follow/first', json.dumps([over, checkpoints.latest() is not None]))[0]
    over, there = json.loads(seen)
    if there:
      return config
    if over:
      raise UserError(f'{workdir} is over and has no checkpoint; train longer.')
    if not told:
      print(f'waiting for the first checkpoint of {workdir}', flush=True)
    told = True
    time.sleep(POLL_SECONDS)


def _columns(subject, step: int, place: str) -> dict | None:
  """None where the checkpoint cannot be read, as when training has deleted it meanwhile."""
  half_life = subject.args.ema_halflife_images
  subject.step = step
  try:
    weights = subject.weights(half_life)
    weights()
    generated = subject.drawn(subject.sample, half_life, f'{place}/generated', weights)
  except UserError as error:
    print(f'note: step {step} is left out: {error}', flush=True)
    return None
  return {
    'generated': generated, 'untrained': subject.untrained(weights), **subject.real(),
  }


def _write(
  args: argparse.Namespace, out: Path, comparison, found, history: list[dict],
  settings: dict[str, Any], about: tuple,
) -> None:
  from diffusion_jax.evaluation.report import write

  shown: dict[str, Any] = {}
  scores = evaluate_job.report(args, comparison, found, shown, settings, *about)
  figures = scores['generated']
  history.append({'step': settings['step'], **figures})
  history.sort(key=lambda line: line['step'])
  write(out, scores | {'history': history}, shown)
  told = ', '.join(f'{name} {value:.4g}' for name, value in figures.items())
  print(f'step {settings["step"]}: {told}', flush=True)


def _history(out: Path, settings: dict[str, Any]) -> list[dict[str, Any]]:
  """What an earlier start has found. UserError where that was another evaluation."""
  if not out.exists():
    return []
  with reading(out, 'is not what --follow writes', 'name another --out'):
    known = read_object(out, remedy='name another --out')
    history = [{**line, 'step': int(line['step'])} for line in known['history']]
    was = dict(known['settings'])
  wanted = json.loads(json.dumps(settings))
  for name in sorted(wanted):
    if was.get(name) != wanted[name]:
      raise UserError(
        f'{out} is of another evaluation ({name} was {was.get(name)!r}, now {wanted[name]!r}); '
        'name another --out.'
      )
  return history
