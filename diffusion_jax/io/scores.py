"""Evaluation scores of checkpoints, in one small file beside them."""

import json
import threading
from collections.abc import Callable
from pathlib import Path

import jax

from diffusion_jax.io.whole import replacing

NAME = 'scores.json'


class Scores:
  """`directory`/scores.json: {step: {metric: value}}. Only process 0 writes."""

  def __init__(self, directory: Path, say: Callable[[str], None]):
    self._file, self._say = directory / NAME, say
    self._lock = threading.Lock()  # Steps are pruned in the thread that saves.
    self._values: dict[int, dict[str, float]] = self._read()

  def _read(self) -> dict[int, dict[str, float]]:
    try:
      values = json.loads(self._file.read_text())
      return {int(step): {k: float(v) for k, v in each.items()} for step, each in values.items()}
    except FileNotFoundError:
      return {}
    except (OSError, ValueError, TypeError, AttributeError) as error:
      self._say(f'{self._file} cannot be read ({error}); scores of old checkpoints are forgotten.')
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
