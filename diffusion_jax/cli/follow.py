"""evaluate model --follow: scores of each checkpoint as it is written, while the run goes on."""

from __future__ import annotations

import json
import shutil
import time
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusion_jax.checkpoint.checkpoints import Checkpoints
from diffusion_jax.cli.scoring import all_are_here, open_subject, score
from diffusion_jax.cli.subject import Subject
from diffusion_jax.errors import UserError
from diffusion_jax.evaluation.comparison import Comparison
from diffusion_jax.evaluation.report import settings_of, write
from diffusion_jax.files import read_object, reading
from diffusion_jax.parallel.processes import agree
from diffusion_jax.run import TrainedRun
from diffusion_jax.runs.directory import RunDirectory
from diffusion_jax.runs.status import is_stalled
from diffusion_jax.viz.evaluation import write_evaluation_page

if TYPE_CHECKING:
  from diffusion_jax.cli.evaluate import OneModel

POLL_SECONDS = 5.0
STALE_SECONDS = 1800.0
"""After so long without a word, a run that is not over is taken for dead."""


def follow(options: OneModel, sample: dict[str, Any]) -> int:
  """Score until the run is over and all of its checkpoints are; each leaves a row and a point."""
  _first_checkpoint(options.workdir)
  subject, comparison = open_subject(options, sample)
  settings = subject.settings | followed(
    options.workdir, options.ema_halflife_images, subject.prompts.captions
  )
  history = _history(options.path, settings_of(comparison) | settings)
  passed = {line['step'] for line in history}
  while (step := _next(subject.run, passed)) is not None:
    passed.add(step)
    _score(options, step, subject, comparison, history, settings)
  table = options.path.with_suffix('.csv').name
  print(f'{options.workdir} is over; {len(passed)} checkpoints are in {table}')
  return 0


def followed(
  workdir: str, ema_halflife_images: float | None, captions: Sequence[str]
) -> dict[str, Any]:
  """Return what must be the same for checkpoints to be of one history."""
  checksum = zlib.crc32('\n'.join(captions).encode())
  return {
    'run': str(Path(workdir).resolve()), 'ema_halflife_images': ema_halflife_images,
    'captions': len(captions), 'captions_checksum': f'{checksum:08x}',
  }


def _score(
  options: OneModel, step: int, subject: Subject, comparison: Comparison, history: list[dict],
  settings: dict[str, Any],
) -> None:
  """In a function of its own, so that its weights are gone before those of the next are read."""
  place, shown = comparison.parts / f'{step:08d}', {}
  subject.step = step
  try:
    subject.weights(options.ema_halflife_images)()
    subject.names  # noqa: B018
  except UserError as error:  # As when training has deleted the checkpoint meanwhile.
    print(f'note: step {step} is left out: {error}', flush=True)
    return
  settings = settings | {'step': step}
  scores = score(subject, comparison, shown, settings, f'{place.name}/generated')
  if scores is not None:
    history.append({'step': step, **scores['generated']})
    history.sort(key=lambda line: line['step'])
    page = lambda path, scores: write_evaluation_page(path, scores, **shown)
    write(options.path, scores | {'history': history}, page)
    values = ', '.join(f'{name} {value:.4g}' for name, value in scores['generated'].items())
    print(f'step {step}: {values}', flush=True)
  if all_are_here('scored'):
    shutil.rmtree(place, ignore_errors=True)


def _next(run: TrainedRun, passed: set[int]) -> int | None:
  """Return the first step that is not passed, waited for; None once there will be no more."""
  while True:
    # First whether it is over, then what there is, or the last checkpoint could be overlooked.
    is_over = over(run.workdir)
    new = [step for step in run.steps() if step not in passed]
    is_over, new = json.loads(agree('follow', json.dumps([is_over, new[:1]]))[0])
    if new or is_over:
      return new[0] if new else None
    time.sleep(POLL_SECONDS)


def over(workdir: str) -> bool:
  """Return whether a run will write no more."""
  return is_stalled(RunDirectory(workdir), STALE_SECONDS)


def _first_checkpoint(workdir: str) -> None:
  """Wait for it. UserError where there is no run, or it has ended without."""
  directory = RunDirectory(workdir)
  directory.read_json('config.json')
  checkpoints = Checkpoints(directory.checkpoints, read_only=True)
  said = False
  while True:
    is_over = over(workdir)  # First, as in `_next`; and all processes go by what one has seen.
    seen = agree('follow/first', json.dumps([is_over, checkpoints.latest() is not None]))[0]
    is_over, there = json.loads(seen)
    if there:
      return
    if is_over:
      raise UserError(f'{workdir} is over and has no checkpoint; train longer.')
    if not said:
      print(f'waiting for the first checkpoint of {workdir}', flush=True)
    said = True
    time.sleep(POLL_SECONDS)


def _history(out: Path, settings: dict[str, Any]) -> list[dict[str, Any]]:
  """Return what an earlier start has found. UserError where that was another evaluation."""
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
