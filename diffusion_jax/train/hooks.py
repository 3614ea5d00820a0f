"""Run beside training: evaluators that are due, their grids and scores, model card and report."""

import json
import math
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from diffusion_jax.checkpoint.digests import digests
from diffusion_jax.config import LoopConfig
from diffusion_jax.errors import UserError
from diffusion_jax.evaluation.evaluator import (
  EVALUATE,
  SAMPLE,
  Picture,
  Value,
  run_all,
  scores_of,
)
from diffusion_jax.files import set_aside_damaged
from diffusion_jax.runs.directory import RunDirectory, versions
from diffusion_jax.runs.metrics import MetricsWriter
from diffusion_jax.runs.run_card import CARD, DIGESTS, PARAMS, add_digests, begin, digest_of, finish
from diffusion_jax.runs.trained_on import write_trained_on
from diffusion_jax.train.card import model_card
from diffusion_jax.train.health import BestEffort
from diffusion_jax.train.state import TrainState
from diffusion_jax.train.training import Training, stating
from diffusion_jax.types import Scores
from diffusion_jax.viz.grids import framed, make_grid, save_png
from diffusion_jax.viz.report import ABOUT, write_report
from diffusion_jax.viz.run_files import MetricsFile, find_grids, read_lines

SAMPLE_COUNT = 'evaluation.json'
FIRST_FRACTION = 0.9
"""Fraction of the budget for the first evaluation, so that slower later ones end in time."""


class SampleCount:
  """One number of samples for all evaluations of a run, as values of others do not compare.

  loop.evaluate_samples; with a time budget the number that the first evaluation manages, kept in
  evaluation.json while that and loop.evaluate_seconds stay. wanted: samples of the next evaluation,
  at most. seconds: its budget, 0 for none.
  """

  def __init__(
    self, directory: RunDirectory, loop: LoopConfig, write: Callable[[str, dict[str, Any]], None]
  ):
    """write: takes the name of a file and what belongs into it."""
    self._directory, self._write = directory, write
    self._settings = {'of': loop.evaluate_samples, 'seconds': loop.evaluate_seconds}
    self.wanted, self.seconds = loop.evaluate_samples, loop.evaluate_seconds
    self._chosen = not self.seconds
    if self.seconds:
      known = int(multihost_utils.broadcast_one_to_all(np.int32(self._read())))
      self.wanted, self._chosen = known or self.wanted, known > 0
      self.seconds *= 1 if self._chosen else FIRST_FRACTION

  def _read(self) -> int:
    """Return the number that this run has chosen, 0 for none."""
    try:
      known = self._directory.read_json(SAMPLE_COUNT)
    except UserError:
      return 0  # None yet, or damaged: it is chosen anew.
    samples = known.get('samples')
    fits = type(samples) is int and 0 < samples <= self._settings['of']
    return samples if fits and self._settings.items() <= known.items() else 0

  def record(self, samples: int) -> str:
    """Record an evaluation's number of samples; return a sentence on it, or ''."""
    if samples >= self.wanted and self._chosen:
      return ''
    if self._chosen:
      return (
        f'this evaluation had time for {samples} samples only, in place of {self.wanted}, so that '
        'its metrics are not compared with those of other steps; raise loop.evaluate_seconds.'
      )
    self._chosen, self.wanted = True, samples
    self.seconds = self._settings['seconds']
    if jax.process_index() == 0:
      self._write(SAMPLE_COUNT, {'samples': samples, **self._settings})
    if samples == self._settings['of']:
      return ''
    return (
      f'loop.evaluate_seconds {self.seconds:g} allow {samples} of {self._settings["of"]} samples; '
      'all evaluations of this run are of so many.'
    )


REPORT_EVERY = 20
"""Times as long as a report takes to write pass before the next, but for the last."""


class Hooks:
  """Sample and score in every process, write in process 0; only `finish` raises."""

  def __init__(self, training: Training, writer: MetricsWriter, frozen: dict, side: BestEffort):
    self.t, self._writer, self._frozen, self._side = training, writer, frozen, side
    self._main = jax.process_index() == 0
    self._next_report = 0.0
    self._digests: list[dict[str, Any]] = []
    self._metrics = MetricsFile(training.directory.metrics)
    self._count = SampleCount(training.directory, training.loop, self._write_json)

  @property
  def scoring(self) -> bool:
    """True if anything is scored."""
    return any(one.when == EVALUATE for one in self.t.evaluators)

  def describe(self, state: TrainState, seconds: float) -> None:
    """Write what the run is before anything can go wrong in it."""
    if self._main:
      directory = self.t.directory
      for name in ('versions.json', 'scores.json', 'step.json', SAMPLE_COUNT, CARD):
        set_aside_damaged(directory.path / name, self._side.say)
      self._write_json('config.json', self.t.config)
      self._write_json('versions.json', versions())
      self._write(CARD, partial(begin, directory, self.t.config, int(state.step)))
      self._write('README.md', lambda: self._write_card('README.md', state, seconds, {}))

  def digest(self, step: int, values: dict[str, str]) -> None:
    """Record digests of a step."""
    if self._main:
      self._digests.append({'step': step, **values})
      self._write(DIGESTS, self._write_digests)

  def _write_digests(self) -> None:
    if self._digests:  # Also those that a full disk has not taken before.
      add_digests(self.t.directory, self._digests)
      self._digests = []

  def digest_params(self, state: TrainState, step: int) -> None:
    """Record the digest of the parameters; all processes must call it together."""
    self.digest(step, {PARAMS: digest_of(digests(state.params))})

  def _write(self, name: str, work: Callable[[], None]) -> None:
    self._side(name, work, keep=True)

  def _write_json(self, name: str, values: dict) -> None:
    self._write(name, lambda: self.t.directory.write_json(name, values))

  def _run(self, when: str, state: TrainState, **options) -> list[tuple[str, Value]]:
    """Return what the evaluators yield that are due, in the same way at each step."""
    task, due_now = self.t.task, [one for one in self.t.evaluators if one.when == when]
    weights = task.weights(state.eval_params, self._frozen)
    return list(run_all(due_now, task.model, weights, jax.random.key(0), **options))

  def preview(self, state: TrainState, step: int) -> None:
    """Write the grid of a step."""
    shown = self._side.together('the pictures of the sample grid', lambda: self._run(SAMPLE, state))
    for name, value in shown or ():
      if self._main and isinstance(value, Picture):
        self._side('the sample grid', partial(self._grid, name, step, value))

  def _grid(self, name: str, step: int, picture: Picture) -> None:
    images, captions = framed(picture.images), list(picture.captions)
    columns = min(8, math.ceil(math.sqrt(len(images))))
    scale = max(1, 128 // images.shape[1])
    grid = make_grid(images, columns=columns, captions=captions, scale=scale, lines=6)
    self._writer.image(name, step, np.asarray(grid.convert('RGB')))
    file = f'step_{step:08d}.png' if name == 'samples' else f'{name}_{step:08d}.png'
    texts = {ABOUT: picture.about, 'step': str(step), 'captions': json.dumps(captions)}
    self._write(f'samples/{file}', lambda: save_png(grid, self.t.directory.samples / file, texts))

  def evaluate(
    self, state: TrainState, step: int, final: bool = False
  ) -> tuple[Scores, dict[str, float]]:
    """(scores of a step, those comparable with other steps'), empty on failure.

    The first column goes to the metrics.
    """
    return self._side.together(
      'the evaluation', lambda: self._evaluate(state, step, final), ({}, {})
    )

  def _evaluate(self, state: TrainState, step: int, final: bool) -> tuple[Scores, dict[str, float]]:
    count = self._count
    samples = {'samples': count.wanted} if count.wanted else {}
    scores = scores_of(self._run(
      EVALUATE, state, **samples, seconds=count.seconds, baselines=final
    ))
    if not scores:
      return {}, {}
    scores = stating(scores, step, (self.t.measured.sentence, *self.t.provenance))
    metrics, taken = dict(next(iter(scores.values()))), count.wanted
    if count.seconds and count.wanted:
      taken = scores['settings']['samples']
      if (text := count.record(taken)) and self._main:
        self._side.say(text)
    metrics |= {'samples': taken} if taken else {}
    self._writer.write('evaluation', step, metrics)
    return scores, metrics if taken == count.wanted else {}

  def missing(self, step: int) -> tuple[bool, bool]:
    """Return whether a step lacks its (grid, scores), as a run stopped while making them does."""
    found = np.zeros(2, bool)
    if self._main:
      found = self._side('what the start before has shown', lambda: self._shown(step), found)
    grid, scores = multihost_utils.broadcast_one_to_all(found)
    loop = self.t.loop
    return (
      due(step, loop.sample_every_steps, loop) and not grid,
      due(step, loop.evaluate_every_steps, loop) and not scores,
    )

  def _shown(self, step: int) -> np.ndarray:
    directory = self.t.directory
    return np.array([
      any(shown == step for shown, _ in find_grids(directory.samples)),
      any(line['kind'] == 'evaluation' and line['step'] == step
          for line in read_lines(directory.metrics)),
    ])

  def report(self, last: bool = False) -> None:
    """Bring report.html up to date, unless that would take more than a few percent of the time."""
    start = time.monotonic()
    if self._main and (last or start >= self._next_report):
      self._writer.flush()
      self._side('report.html', lambda: write_report(self.t.directory.path, self._metrics))
      now = time.monotonic()
      self._next_report = now + REPORT_EVERY * (now - start)

  def finish(self, state: TrainState, seconds: float, scores: Scores, params: dict) -> None:
    """Export the model with its scores; `params` are on the host. May be repeated on OSError."""
    if self._main:
      directory = self.t.directory
      if scores or not self.scoring:  # Else they failed: older ones stay.
        directory.write_json('scores.json', scores)
      self.t.task.export(directory.model, params, scores)
      if self.t.trained_on:
        write_trained_on(directory.model, self.t.trained_on)
      self._write(CARD, partial(finish, directory, self.t.config, int(state.step)))
      for name in ('README.md', 'model/README.md'):
        self._write(name, partial(self._write_card, name, state, seconds, scores))

  def _write_card(self, name: str, state: TrainState, seconds: float, scores: Scores) -> None:
    card = model_card(self.t, state.params, int(state.step), seconds, scores)
    self.t.directory.write_text(name, card)


def due(step: int, every: int, loop: LoopConfig) -> bool:
  """True if something done every so many steps is done now; the last step's is left to the end."""
  return every > 0 and step > 0 and step % every == 0 and step < loop.total_steps
