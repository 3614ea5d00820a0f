"""The files of one run: what a person, a report and the next start find in its workdir."""

import contextlib
import importlib.metadata
import json
import os
import platform
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from diffusion_jax.config import flatten
from diffusion_jax.errors import UserError
from diffusion_jax.files import atomic_write, read_object, reading

PACKAGES = (
  'diffusion_jax', 'jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'grain', 'array_record',
  'tensorflow-datasets', 'transformers', 'tokenizers', 'numpy',
)

MAY_CHANGE = ('loop.total_steps', 'loop.log_every_steps', 'loop.checkpoint_every_steps',
              'loop.sample_every_steps', 'loop.evaluate_every_steps', 'loop.evaluate_samples',
              'loop.evaluate_seconds', 'loop.keep_', 'loop.stop_', 'loop.profile_',
              'loop.wandb_project',
              'data.data_dir', 'data.prepare', 'data.workers', 'data.most_unreadable',
              'data.most_buckets', 'mesh.', 'safety.', 'remat', 'attention')
"""Keys that a resumed run may change; any other would make it another run."""


class RunDirectory:
  """Paths and small files below a workdir. Writes are atomic."""

  def __init__(self, path: str | Path):
    self.path = Path(path).expanduser().absolute()
    self.checkpoints = self.path / 'checkpoints'
    self.samples = self.path / 'samples'
    self.model = self.path / 'model'
    self.metrics = self.path / 'metrics.jsonl'
    self.tensorboard = self.path / 'tensorboard'
    self.tokenizer = self.path / 'tokenizer'

  def write_json(self, name: str, values: dict[str, Any]) -> None:
    """Write `name` in one move."""
    self.write_text(name, json.dumps(values, indent=2, sort_keys=False) + '\n')

  def write_text(self, name: str, text: str) -> None:
    """Write `name` in one move."""
    with atomic_write(self.path / name) as file:
      file.write(text.encode())

  def read_json(self, name: str) -> dict[str, Any]:
    """Read a JSON object; UserError where the file is missing or damaged."""
    if not os.path.lexists(self.path / name):
      raise UserError(
        f'{self.path} has no {name}; give the workdir of a run that train has started.'
      )
    try:
      return read_object(self.path / name)
    except UserError as error:
      reason = str(error).rpartition(';')[0] or str(error)
      raise UserError(f'{reason}; restore that file.') from error

  def check_config(
    self, config: dict[str, Any], complete: Callable[[dict[str, Any]], dict[str, Any]]
  ) -> None:
    """Raise UserError, naming the first difference, where this workdir belongs to another config.

    complete: adds keys that are newer than a saved config.
    """
    if self.path.exists() and not self.path.is_dir():
      raise UserError(f'the workdir {self.path} is a file; choose a directory.')
    if not os.path.lexists(self.path / 'config.json'):
      return
    values = self.read_json('config.json')
    with reading(
      self.path / 'config.json', 'is not the config of a run',
      'restore that file, or choose another workdir',
    ):
      before = flatten(normalise(complete(values)))
    now = flatten(normalise(config))
    for key in sorted(before.keys() | now.keys()):
      if before.get(key) != now.get(key) and not key.startswith(MAY_CHANGE):
        raise UserError(
          f'the workdir {self.path} belongs to another config: {key} was {before.get(key)!r} and '
          f'is now {now.get(key)!r}; choose another workdir or restore that value.'
        )


def normalise(config: dict[str, Any]) -> dict[str, Any]:
  """Return it as JSON would give it back: tuples become lists."""
  return json.loads(json.dumps(config))


def versions() -> dict[str, Any]:
  """Return versions of Python, of the packages that numbers depend on, and the devices."""
  import jax  # Here, for the first word of a start comes before anything heavy is imported.

  found = dict.fromkeys(PACKAGES, 'not installed')
  for package in PACKAGES:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
      found[package] = importlib.metadata.version(package)
  device = jax.devices()[0]
  return {
    'python': platform.python_version(), **found, 'platform': device.platform,
    'device': device.device_kind, 'devices': jax.device_count(), 'processes': jax.process_count(),
  }


def command_line() -> str:
  """Return the command that started this process, to repeat it."""
  return shlex.join(['python', '-m', 'diffusion_jax', *sys.argv[1:]])
