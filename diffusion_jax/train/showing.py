"""What a run shows of itself: sample grids, scores, model card and report."""

import json
import math
import sys
import time

import jax
import numpy as np
from jax.experimental import multihost_utils

from diffusion_jax.io.metrics_writer import MetricsWriter
from diffusion_jax.io.run_directory import command_line, versions
from diffusion_jax.train.card import model_card
from diffusion_jax.train.config import LoopConfig
from diffusion_jax.train.sample_count import SampleCount
from diffusion_jax.train.state import TrainState
from diffusion_jax.train.tasks.task import Scores
from diffusion_jax.train.training import Training
from diffusion_jax.viz.grids import make_grid, save_png
from diffusion_jax.viz.metrics_file import MetricsFile, read_lines
from diffusion_jax.viz.report import write_report
from diffusion_jax.viz.rundir import find_grids

REPORT_EVERY = 20
"""Times as long as a report takes to write pass before the next, but for the last."""


class Showing:
  """Every process draws and scores; process 0 writes."""

  def __init__(self, training: Training, writer: MetricsWriter, frozen: dict):
    self.t, self._writer, self._frozen = training, writer, frozen
    self._main = jax.process_index() == 0
    self._next_report = 0.0
    self._metrics = MetricsFile(training.directory.metrics)
    self._count = SampleCount(training.directory, training.loop)

  def describe(self, state: TrainState, seconds: float) -> None:
    """Writes what the run is before anything can go wrong in it."""
    if self._main:
      directory = self.t.directory
      directory.write_json('config.json', self.t.config)
      directory.write_json('versions.json', versions())
      directory.write_text('README.md', self._card(state, seconds, {}))

  def preview(self, state: TrainState, step: int) -> None:
    """Draws the grid of a step."""
    images, captions = self.t.task.preview(state.eval_params, self._frozen, self.t.mesh)
    if not self._main:
      return
    columns = min(8, math.ceil(math.sqrt(len(images))))
    scale = max(1, 128 // images.shape[1])
    grid = make_grid(images, columns=columns, captions=captions, scale=scale)
    save_png(
      grid, self.t.directory.samples / f'step_{step:08d}.png',
      {'step': str(step), 'captions': json.dumps(captions)},
    )
    self._writer.image('samples', step, np.asarray(grid.convert('RGB')))

  def evaluate(
    self, state: TrainState, step: int, final: bool = False
  ) -> tuple[Scores, dict[str, float]]:
    """(scores of a step, those figures that can be compared with those of other steps).

    The first column goes to the metrics.
    """
    count = self._count
    # Tasks that read a fixed set know of no seconds; `build` refuses them there.
    limit = {'seconds': count.seconds} if count.seconds else {}
    scores = self.t.task.evaluate(
      state.eval_params, self._frozen, self.t.mesh, samples=count.wanted, final=final, **limit
    )
    figures, taken = dict(next(iter(scores.values()))), count.wanted
    if limit:
      taken = scores['settings']['samples']
      if (text := count.took(taken)) and self._main:
        print(f'diffusion_jax train: {text}', file=sys.stderr)
    figures['samples'] = taken
    self._writer.write('evaluation', step, figures)
    return scores, figures if taken == count.wanted else {}

  def missing(self, step: int) -> tuple[bool, bool]:
    """(grid, scores) that a step should have and has not: the run was stopped while making them."""
    found = np.zeros(2, bool)
    if self._main:
      directory = self.t.directory
      found = np.array([
        any(drawn == step for drawn, _ in find_grids(directory.samples)),
        any(line['kind'] == 'evaluation' and line['step'] == step
            for line in read_lines(directory.metrics)),
      ])
    grid, scores = multihost_utils.broadcast_one_to_all(found)
    loop = self.t.loop
    return (
      due(step, loop.sample_every_steps, loop) and not grid,
      due(step, loop.evaluate_every_steps, loop) and not scores,
    )

  def report(self, last: bool = False) -> None:
    """Brings report.html up to date, unless that would take more than a few percent of the time."""
    start = time.monotonic()
    if self._main and (last or start >= self._next_report):
      self._writer.flush()
      write_report(self.t.directory.path, self._metrics)
      now = time.monotonic()
      self._next_report = now + REPORT_EVERY * (now - start)

  def finish(self, state: TrainState, seconds: float, scores: Scores, params: dict) -> None:
    """Exports the model with its scores; `params` are whole, on the host."""
    if self._main:
      directory = self.t.directory
      directory.write_json('scores.json', scores)
      self.t.task.export(directory.model, params, scores)
      card = self._card(state, seconds, scores)
      directory.write_text('README.md', card)
      directory.write_text('model/README.md', card)

  def _card(self, state: TrainState, seconds: float, scores: Scores) -> str:
    return model_card(
      self.t.config, parameters=sum(p.size for p in jax.tree.leaves(state.params)),
      steps=int(state.step), seconds=seconds, command=command_line(), scores=scores,
      credit=self.t.data_credit, measured=self.t.measured.told,
    )


def due(step: int, every: int, loop: LoopConfig) -> bool:
  """Whether something that is done every so many steps is done after this one.

  The last step's is left to the end of the run, which draws and scores in any case.
  """
  return every > 0 and step > 0 and step % every == 0 and step < loop.total_steps
