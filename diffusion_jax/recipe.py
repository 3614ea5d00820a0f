"""What a config file says: read, checked, typed. Only `build` makes objects of it."""

import dataclasses
import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from absl import flags
from ml_collections import ConfigDict, config_flags

from diffusion_jax import configs
from diffusion_jax.config import typed
from diffusion_jax.data.splits import TEST_FRACTION, check_fraction
from diffusion_jax.data.unreadable import MOST_UNREADABLE
from diffusion_jax.errors import UserError
from diffusion_jax.models.network import ATTENTION, MATMUL_PRECISION, REMAT
from diffusion_jax.parallel.mesh import MeshConfig
from diffusion_jax.runs.directory import flatten, normalise
from diffusion_jax.train.config import LoopConfig, SafetyConfig
from diffusion_jax.train.optimizer import OptimizerConfig
from diffusion_jax.train.tasks.autoencoder import AutoencoderTaskConfig
from diffusion_jax.train.tasks.classifier import ClassifierTaskConfig
from diffusion_jax.train.tasks.clip import CLIPTaskConfig
from diffusion_jax.train.tasks.diffusion import DiffusionTaskConfig
from diffusion_jax.train.tasks.finetune import FinetuneTaskConfig
from diffusion_jax.train.tasks.toy import ToyTaskConfig

DTYPES = {'float32': jnp.float32, 'bfloat16': jnp.bfloat16}


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """dataset: of the table SOURCES, such as openmoji, or 'folder:PATH' of pictures, for a classifier
  in folders by class; size: edge
  of the images in pixels, or points in a record; prepare: make it if missing; caption: of every
  picture of a folder that has none of its own, or several, one a line; test_fraction: share of the
  pictures of a folder without folders train and test that is left to the test split, 0 to train on
  all; caption_column: the one column of captions in its metadata.jsonl or metadata.csv, '' for all
  of `metadata.CAPTIONS`.

  transforms: (name, arguments) pairs in order, applied to every training image; workers: threads
  that read and transform, in each process; 0 does it between the steps; most_unreadable: share of
  the records of a split that may be damaged, which are named and replaced by others; with more the
  run ends.
  """

  dataset: str
  size: int
  data_dir: str = ''
  prepare: bool = False
  caption: str = ''
  caption_column: str = ''
  test_fraction: float = TEST_FRACTION
  transforms: tuple = ()
  workers: int = 2
  most_unreadable: float = MOST_UNREADABLE

  def __post_init__(self):
    if self.workers < 0:
      raise UserError(f'data.workers is {self.workers}; give a number of threads, or 0.')
    check_fraction(self.test_fraction)
    if not 0 <= self.most_unreadable <= 1:
      raise UserError(
        f'data.most_unreadable is {self.most_unreadable}; give a share of the records, 0 to 1.'
      )


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
  """The whole configuration; the type of `settings` follows from `task`.

  dtype: type of the computation, float32 or bfloat16; parameters are always float32. remat: what
  the backward pass computes again instead of keeping it, one of `models.network.REMAT`. attention:
  how the network that is trained computes it, one of `models.network.ATTENTION`; frozen ones
  choose for themselves. products: of dense layers, where the loss is one of latents; one of
  `models.network.MATMUL_PRECISION`. weights_from: workdir of a run of the same network whose last
  weights this one begins with; '' for none.
  """

  task: str
  data: DataConfig
  settings: Any
  optimizer: OptimizerConfig = OptimizerConfig()
  loop: LoopConfig = LoopConfig()
  safety: SafetyConfig = SafetyConfig()
  mesh: MeshConfig = MeshConfig()
  dtype: str = 'float32'
  remat: str = 'none'
  attention: str = 'auto'
  products: str = 'plain'
  weights_from: str = ''

  def __post_init__(self):
    if self.dtype not in DTYPES:
      raise UserError(f'config.dtype is {self.dtype!r}; choose one of {", ".join(DTYPES)}.')
    for name, known in (('remat', REMAT), ('attention', ATTENTION), ('products', MATMUL_PRECISION)):
      value = getattr(self, name)
      if value not in known:
        raise UserError(f'config.{name} is {value!r}; choose one of {", ".join(known)}.')
      if self.task == 'toy' and value != known[0]:
        raise UserError(
          f'config.{name} has no effect on task toy, whose network is small; set {known[0]}.'
        )
    if self.task not in LATENT and self.products != 'plain':
      raise UserError(f'config.products has no effect on task {self.task}; set plain.')


LATENT = ('diffusion', 'finetune')
"""Tasks that train in the space of latents."""

SETTINGS = {
  'autoencoder': AutoencoderTaskConfig,
  'classifier': ClassifierTaskConfig,
  'clip': CLIPTaskConfig,
  'diffusion': DiffusionTaskConfig,
  'finetune': FinetuneTaskConfig,
  'toy': ToyTaskConfig,
}


def load_config(path: str, overrides: Sequence[str] = ()) -> ConfigDict:
  """Runs a config file and applies overrides such as '--config.loop.batch_size=8'.

  Args:
    path: a file, or the name of a recipe of the package, such as openmoji/quickstart.
    overrides: '--config.KEY=VALUE', each of a key that the config has.

  Raises:
    UserError: no such file, an error in it, an unknown key or a value of the wrong type.
  """
  values = flags.FlagValues()
  arguments = ['diffusion_jax', f'--config={_find(path)}', *overrides]
  config_flags.DEFINE_config_file('config', flag_values=values, sys_argv=arguments)
  try:
    values(arguments)
    return values.config
  except UserError:
    raise
  except Exception as error:  # A config file is Python, so anything may come out of it.
    if overrides:
      _check_keys(load_config(path), overrides)
    reason = ' '.join(str(error).split())[:300] or type(error).__name__
    if isinstance(error, ModuleNotFoundError) and error.name == 'configs':
      reason += '; the base of the recipes is diffusion_jax.configs.base'
    raise UserError(f'the config {path} cannot be used: {reason}') from error


def recipes() -> dict[str, Path]:
  """The recipes in the package by name, such as openmoji/quickstart; sorted."""
  found = {}
  for folder in map(Path, configs.__path__):
    for file in folder.rglob('*.py'):
      if file.name not in ('__init__.py', 'base.py'):
        found[file.relative_to(folder).with_suffix('').as_posix()] = file
  return dict(sorted(found.items()))


def _find(path: str) -> Path:
  """A file that is there, or else the recipe of this name."""
  file = Path(path)
  if file.suffix == '.py' and file.is_file():
    return file
  known = recipes()
  name = path.removeprefix('configs/').removesuffix('.py')
  if name in known:
    return known[name]
  close = difflib.get_close_matches(name, known, n=1)
  hint = f'did you mean {close[0]}?' if close else 'give a file or one of ' + ', '.join(known) + '.'
  raise UserError(f'there is no config {path}; {hint}')


def _check_keys(config: ConfigDict, overrides: Sequence[str]) -> None:
  known = [f'config.{key}' for key in flatten(config.to_dict())]
  for override in overrides:
    name = override.lstrip('-').partition('=')[0]
    if override.startswith('-') and not any(f'{key}.'.startswith(f'{name}.') for key in known):
      close = difflib.get_close_matches(name, known, n=1)
      hint = f'did you mean {close[0]}?' if close else 'see the config file for its keys.'
      raise UserError(f'{name} is not a known key; {hint}')


def parse(config: ConfigDict | dict) -> TrainingConfig:
  """Typed, frozen and checked.

  Raises:
    UserError: unknown, missing or dead key, wrong type or impossible value.
  """
  values = config.to_dict() if isinstance(config, ConfigDict) else config
  task = values.get('task')
  if task not in SETTINGS:
    raise UserError(f'config.task is {task!r}; choose one of {", ".join(SETTINGS)}.')
  settings = typed(SETTINGS[task], values.get('settings', {}), 'settings.')
  return typed(TrainingConfig, {**values, 'settings': settings})


def resolved(config: TrainingConfig) -> dict[str, Any]:
  """Every value in force, as JSON would have it; `parse` reads it back to the same object."""
  return normalise(dataclasses.asdict(config))


def completed(values: dict[str, Any]) -> dict[str, Any]:
  """A config that an older version has written, with the keys that are new since."""
  try:
    return resolved(parse(values))
  except UserError:  # One of its keys is gone; the comparison will name it.
    return values
