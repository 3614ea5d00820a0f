"""How many samples each evaluation of a run is of."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from diffusion_jax.config import LoopConfig
from diffusion_jax.errors import UserError
from diffusion_jax.runs.directory import RunDirectory

NAME = 'evaluation.json'
FIRST_FRACTION = 0.9
"""Of the budget, for the first evaluation, so that later ones, some slower, end in time."""


class SampleCount:
  """One number for all evaluations of a run, for metrics of other numbers cannot be compared.

  Without a time budget it is loop.evaluate_samples. With one, the first evaluation makes as many as
  the time allows, and its number stays: it is written to the run's evaluation.json, where a later
  start finds it, and holds while loop.evaluate_samples and loop.evaluate_seconds are the same.

  Attributes:
    wanted: samples of the next evaluation, at most.
    seconds: that it may take, 0 for no limit.
  """

  def __init__(
    self, directory: RunDirectory, loop: LoopConfig,
    write: Callable[[str, dict[str, Any]], None] | None = None,
  ):
    """write: takes the name of a file and what belongs into it, in place of the directory."""
    self._directory, self._write = directory, write or directory.write_json
    self._settings = {'of': loop.evaluate_samples, 'seconds': loop.evaluate_seconds}
    self.wanted, self.seconds = loop.evaluate_samples, loop.evaluate_seconds
    self._chosen = not self.seconds
    if self.seconds:
      known = int(multihost_utils.broadcast_one_to_all(np.int32(self._read())))
      self.wanted, self._chosen = known or self.wanted, known > 0
      self.seconds *= 1 if self._chosen else FIRST_FRACTION

  def _read(self) -> int:
    """The number that this run has chosen, 0 for none."""
    try:
      known = self._directory.read_json(NAME)
    except UserError:
      return 0  # None yet, or damaged: it is chosen anew.
    samples = known.get('samples')
    fits = type(samples) is int and 0 < samples <= self._settings['of']
    return samples if fits and self._settings.items() <= known.items() else 0

  def took(self, samples: int) -> str:
    """Tell of how many samples an evaluation was; what is to be said of that, or ''."""
    if samples >= self.wanted and self._chosen:
      return ''
    if self._chosen:
      return (
        f'this evaluation had time for {samples} samples only, in place of {self.wanted}, so that '
        'its figures are not compared with those of other steps; raise loop.evaluate_seconds.'
      )
    self._chosen, self.wanted = True, samples
    self.seconds = self._settings['seconds']
    if jax.process_index() == 0:
      self._write(NAME, {'samples': samples, **self._settings})
    if samples == self._settings['of']:
      return ''
    return (
      f'loop.evaluate_seconds {self.seconds:g} allow {samples} of {self._settings["of"]} samples; '
      'all evaluations of this run are of so many.'
    )
