"""The interface of tasks to the train loop and the step."""

import abc
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from diffusion_jax.config import TrainingConfig
from diffusion_jax.data.buckets import BySize, in_buckets
from diffusion_jax.data.mixture import ByPart
from diffusion_jax.data.sources import open_data
from diffusion_jax.data.transforms import RandomCut, build_transforms, check_transforms
from diffusion_jax.data.unreadable import Damage
from diffusion_jax.errors import UserError
from diffusion_jax.formats.tensors import write_tensors
from diffusion_jax.sizes import shapes_of
from diffusion_jax.train.meter import Metrics
from diffusion_jax.types import Params, Scores, Source, Weights

SYNTHETIC = 64
"""Random images at least; a batch needs as many as it has examples."""

Carry = dict[str, jax.Array]
"""Arrays that training carries beside the parameters, such as past losses."""

Observed = Any
"""A pytree of arrays [b ...], what `next_carry` needs of each example."""

Frozen = dict[str, Params]
"""Parameters of the networks that are used but not trained, by role."""


@dataclasses.dataclass(frozen=True)
class Env:
  """The environment of a task.

  synthetic: random numbers in place of the data. damage: counts unreadable records. more: the
  sources of `Task.more_data`, by name. report: takes a state and more, for the status file.
  """

  train: Source
  test: Source
  workdir: Path
  mesh: Mesh
  synthetic: bool = False
  damage: Damage = dataclasses.field(default_factory=Damage)
  more: dict[str, Source] = dataclasses.field(default_factory=dict)
  report: Callable[..., None] = lambda *args, **values: None


class Task(abc.ABC):
  """One thing to train, immutable, with networks without weights.

  A task has a loss and initial parameters; all else has a default.
  """

  Config: ClassVar[type]
  """The dataclass of its `settings` in a config."""
  name: ClassVar[str]
  title: ClassVar[str]
  """Name of the trained thing, for a model card."""
  computing: ClassVar[tuple[str, ...]] = ('remat', 'attention')
  """Those of remat, attention and products that have an effect."""
  pictures: ClassVar[bool] = True
  """True if records are pictures, so that `data.size` may be a height and a width."""
  captioned: ClassVar[bool] = False
  """True if its model draws pictures for captions, on which it is scored."""
  frozen: Frozen
  """Host arrays of the frozen networks; the loop puts them onto the mesh."""
  batch_fields: tuple[str, ...]
  """Fields of a record that the loss reads; the rest never reaches a device."""
  model: Any = None
  """The evaluators' argument besides the weights."""
  begins_with: str = ''
  """The model whose weights `start` gives."""

  @staticmethod
  def compute(config: TrainingConfig) -> dict[str, Any]:
    """Return how the network that is trained computes, as `Network.of` takes it."""
    dtype = getattr(jnp, config.dtype)
    return {'dtype': dtype, 'remat': config.remat, 'attention': config.attention}

  @staticmethod
  def upgrade_settings(settings: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return settings with the keys of `Config`, of older recipes and runs, too."""
    return settings

  @classmethod
  def check(cls, config: TrainingConfig) -> None:
    """Raise UserError for what the types of a config cannot say, before any data are read."""
    for name in ('remat', 'attention', 'products'):
      without = getattr(TrainingConfig, name)
      if name not in cls.computing and getattr(config, name) != without:
        raise UserError(f'config.{name} has no effect on task {config.task}; set {without}.')
    if not isinstance(config.data.size, int) and not cls.pictures:
      raise UserError(
        f'data.size is {config.data.size}, but task {config.task} takes no pictures; give one '
        'number.'
      )
    cls.check_data(config)

  @classmethod
  def check_data(cls, config: TrainingConfig) -> None:
    """Raise UserError unless the settings fit `data.size` and the transforms keep to it."""
    for size in config.data.sizes:
      check_transforms(config.data.transforms, size)
      for part in config.data.mixture.values():
        check_transforms((*part.transforms, *config.data.transforms), size)

  @classmethod
  def open_sources(cls, config: TrainingConfig, synthetic: bool) -> tuple[Source, Source]:
    """Return (train, test): of the registry, or random images."""
    return open_data(config.data, max(config.loop.batch_size, SYNTHETIC) if synthetic else 0)

  @classmethod
  def build(cls, config: TrainingConfig, env: Env) -> Self:
    """Return the task with its frozen networks loaded, large ones onto the mesh."""
    return cls(config.settings)

  def more_data(self, config: TrainingConfig, env: Env) -> dict[str, Source]:
    """Sources by name besides the data set, perhaps made now."""
    return {}

  def context(self) -> dict[str, Any]:
    """Return what transforms may ask for by the name of an argument, such as `tokenizer`."""
    return {}

  def examples(self, config: TrainingConfig, env: Env) -> tuple[Source, list[Callable]]:
    """Return (source, transforms) that batches are made of."""
    data, context = config.data, self.context()
    build = lambda specs, size: build_transforms(specs, size=size, **context)
    made = [build(data.transforms, size) for size in data.sizes]
    if any(part.transforms for part in data.mixture.values()) and not env.synthetic:
      made = [
        [ByPart({name: build(part.transforms, size) for name, part in data.mixture.items()}), *all_]
        for size, all_ in zip(data.sizes, made, strict=True)
      ]
    cuts = data.crop == 'random' and not env.synthetic
    source = in_buckets(env.train.uncut() if cuts else env.train, data.shapes)
    several = [BySize(dict(zip(data.shapes, made, strict=True)))]
    return source, [*[RandomCut()] * cuts, *(made[0] if len(made) == 1 else several)]

  @classmethod
  def described(cls, size: Any) -> tuple[str, str]:
    """Return (what records of `data.size` are called, what one is like), for people."""
    shapes = shapes_of(size)
    first, last = (f'{height} x {width}' for height, width in (shapes[0], shapes[-1]))
    several = f'{len(shapes)} sizes from {first} to {last}'
    return 'images', f'{several if len(shapes) > 1 else first} pixels'

  def keep(self, workdir: Path) -> None:
    """Write what the task has made of the data and a resume needs, such as a tokenizer."""
    del workdir

  @abc.abstractmethod
  def initialize(self, key: jax.Array) -> Params:
    """Return fresh trainable parameters; pure."""

  @abc.abstractmethod
  def loss(
    self, params: Params, frozen: Frozen, carry: Carry, batch: dict, key: jax.Array,
    step: jax.Array,
  ) -> tuple[jax.Array, tuple[Metrics, Observed]]:
    """Return the mean loss over the batch, (metrics, what `next_carry` needs); pure."""

  def start(self, mesh: Mesh) -> Params | None:
    """Return parameters on the mesh to begin with, such as pretrained ones; None for fresh ones,
    as those are that lack."""
    return None

  def beginning(self, mesh: Mesh, key: jax.Array) -> Params:
    """Return all parameters that training begins with."""
    given = self.start(mesh) or {}
    if given and given.keys() == jax.eval_shape(self.initialize, key).keys():
      return given
    return {**jax.jit(self.initialize)(key), **given}

  def carry(self) -> Carry:
    """Return what training begins to carry; replicated and checkpointed."""
    return {}

  def next_carry(self, carry: Carry, observed: Observed) -> Carry:
    """Return the carry after a step on these examples of the global batch; pure."""
    return carry

  def constrain(self, params: Params, carry: Carry) -> Params:
    """Return parameters after an update, such as clamped ones, given the carry after it; pure."""
    return params

  def weights(self, params: Params, frozen: Frozen) -> Weights:
    """Return all weights of `model`, of what is trained and of what is not."""
    return params

  def evaluators(self, mesh: Mesh) -> Sequence[Any]:
    """Return what shows and scores `model` on the test split; nothing heavy is loaded here."""
    return ()

  def export(self, directory: Path, params: Params, scores: Scores) -> None:
    """Write the trained model, host arrays, as `model.safetensors`; `scores` may be empty."""
    directory.mkdir(parents=True, exist_ok=True)
    write_tensors(directory / 'model.safetensors', params)
