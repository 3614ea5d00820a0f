"""Evaluation scores of checkpoints, in one small file beside them."""

import json
import os
import threading
from collections.abc import Callable
from pathlib import Path

import jax

from diffusion_jax.errors import UserError
from diffusion_jax.io.whole import replacing
from diffusion_jax.reading import read_object, reading

NAME = 'scores.json'


class Scores:
  """`directory`/scores.json: {step: {metric: value}}. Only process 0 writes."""

  def __init__(self, directory: Path, say: Callable[[str], None]):
    self._file, self._say = directory / NAME, say
    self._lock = threading.Lock()  # Steps are pruned in the thread that saves.
    self._values: dict[int, dict[str, float]] = self._read()

  def _read(self) -> dict[int, dict[str, float]]:
    if not os.path.lexists(self._file):
      return {}
    try:
      with reading(self._file, remedy='scores of old checkpoints are forgotten'):
        values = read_object(self._file)
        return {int(step): {k: float(v) for k, v in each.items()} for step, each in values.items()}
    except UserError as error:
      self._say(str(error))
      return {}

  def of(self, metric: str) -> dict[int, float]:
    """Step -> value of a metric, of the steps that have one."""
    with self._lock:
      return {step: v[metric] for step, v in self._values.items() if metric in v}

  def add(self, step: int, values: dict[str, float]) -> None:
    """Notes values at a step; trouble with the storage is only said."""
    with self._lock:
      known = self._values.setdefault(step, {})
      known |= {name: float(value) for name, value in values.items()}
      text = json.dumps(self._values, indent=1)
    if jax.process_index() != 0:
      return
    try:
      with replacing(self._file) as file:
        file.write(text.encode())
    except OSError as error:
      self._say(f'{self._file} cannot be written ({error}).')
