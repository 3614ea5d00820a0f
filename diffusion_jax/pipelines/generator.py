"""What commands and evaluators ask of every kind of generative model of images, and its opening.

The kinds are the rows of `registry.MODELS`, by the class in a directory's model_index.json, or in
the config.json of one network alone.
"""

import abc
import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from diffusion_jax.config import typed
from diffusion_jax.errors import UserError
from diffusion_jax.files import INDEX, inside
from diffusion_jax.formats.networks import CONFIG, Part, resolve
from diffusion_jax.formats.tensors import read_json
from diffusion_jax.limits import check_seed
from diffusion_jax.models.network import Network
from diffusion_jax.parallel.mesh import put_params
from diffusion_jax.pixels import to_uint8
from diffusion_jax.registry import MODELS, load
from diffusion_jax.types import Record, Weights

CLASS = '_class_name'
DEFAULT = 'Diffusion'


class Generator(abc.ABC):
  """A generative model of images without its weights, which are by the roles of its networks."""

  drawn_by: Sequence[str]
  """Roles of the networks that draw: with fresh weights of all the model counts as untrained."""
  likelihood: ClassVar[str] = ''
  """The row of `registry.EVALUATORS` that measures its likelihood, if one does."""
  takes_pictures: ClassVar[bool] = False
  """True if it may be conditioned on pictures, see `inputs.Inputs`."""
  stages: Sequence[Any] = ()
  """Models that enlarge what it draws, as it is drawn."""
  interpolates: ClassVar[str] = ''
  """Between what of two pictures others lie: 'noise', 'embeddings' or, where nothing does, ''."""
  embedding_dim: int | None = None
  """Numbers of an embedding, of a model that draws such."""
  numbers: bool = False
  """True if what it draws is kept as numbers, too."""
  takes_classes: bool = False
  """True if `Inputs.classes` say something to it."""
  text: Any = None
  """What reads prompts, if something does."""

  @property
  @abc.abstractmethod
  def networks(self) -> Mapping[str, Network]:
    """Every network by the role of its weights."""

  @property
  @abc.abstractmethod
  def trained_size(self) -> tuple[int, int]:
    """(height, width) in pixels of the images of its training."""

  @abc.abstractmethod
  def check_config(self, config: Any) -> None:
    """Raise UserError for settings by which it cannot sample."""

  @abc.abstractmethod
  def sample(
    self, weights: Weights, prompts: Sequence[str], config: Any, *, seed: int, mesh: Mesh, **how
  ) -> Iterator[np.ndarray]:
    """Yield images, float32 [b h w 3] in [-1, 1], batch after batch."""

  def generate(
    self, weights: Weights, prompts: Sequence[str], config: Any, **how
  ) -> Iterator[np.ndarray]:
    """Yield images, uint8 [b h w 3], batch after batch; the rest is as in `sample`."""
    return map(self.drawn, self.sample(weights, prompts, config, **how))

  def drawn(self, batch: np.ndarray) -> np.ndarray:
    """Return what `sample` yields as pictures, uint8 [b h w 3]."""
    return to_uint8(batch)

  def on_mesh(self, weights: Weights, mesh: Mesh) -> Weights:
    """Put host arrays onto their shards."""
    return {role: put_params(params, mesh) for role, params in weights.items()}


class NumbersOnly:
  """Base of settings that are numbers, with what `sample` asks of the settings of all models."""

  binning: ClassVar[str] = 'none'
  prompt_syntax: ClassVar[str] = 'plain'
  guides: ClassVar[tuple[str, ...]] = ()
  steps: ClassVar[int] = 1

  def in_force(self) -> dict[str, str]:
    """Return name -> value, for a picture's metadata."""
    return {name: f'{value:g}' for name, value in dataclasses.asdict(self).items()}


class OfOneSize(Generator):
  """A model that draws at the size of its training alone, of prompts and nothing else."""

  Sample: ClassVar[type]
  """The dataclass of its settings of sampling."""

  def drawn_size(
    self, height: int | None, width: int | None, binning: str = ''
  ) -> tuple[tuple[int, int], tuple[int, int]]:
    """As `Diffusion.drawn_size`. UserError for another size."""
    size = (height or self.trained_size[0], width or self.trained_size[1])
    if size != self.trained_size:
      raise UserError(
        f'the size is {size[0]}x{size[1]}, but the model draws '
        f'{self.trained_size[0]}x{self.trained_size[1]} alone; leave it out.'
      )
    return size, size

  def size_like(self, height: int, width: int) -> tuple[int, int]:
    """As `Diffusion.size_like`."""
    return self.trained_size

  def check_config(self, config: Any) -> None:
    typed(self.Sample, dataclasses.asdict(config), '')

  def check_sampling(self, config: Any, negative: str = '') -> None:
    """Raise UserError for what the model cannot sample."""
    self.check_config(config)
    if negative:
      raise UserError('the model takes no negative prompt; leave --negative out.')

  def check_prompts(self, prompts: Sequence[str], syntax: str = '') -> None:
    """Raise UserError for a prompt that does not fit the model."""
    self.rows(prompts)

  def keys(
    self, config: Any, count: int, *, seed: int, first: int, negative: str, height: int | None,
    width: int | None,
  ) -> np.ndarray:
    """Return the data of the keys [count ...] of images first + i, after all that may be wrong with
    the arguments of `sample`."""
    self.check_sampling(config, negative)
    self.drawn_size(height, width)
    check_seed(seed)
    fold = functools.partial(jax.random.fold_in, jax.random.key(seed))
    return np.asarray(jax.random.key_data(jax.vmap(fold)(first + np.arange(count))))

  @abc.abstractmethod
  def rows(self, prompts: Sequence[str], *_: Any, **__: Any) -> dict[str, np.ndarray]:
    """Host arrays [n ...] of what prompts say; UserError for what does not fit."""

  def prompt(self, record: Record) -> str:
    """Return the prompt for which the model should sample a record of a source."""
    return record['captions'][0] if record.get('captions') else ''


def read_generator(path: str, dtype=jnp.float32) -> tuple[Generator, dict[str, Part], Any]:
  """(model without weights, its parts, how to sample) of a directory or 'asset:NAME' of any kind.

  UserError: no directory, no model in it, or a part that is missing or not implemented.
  """
  directory = resolve(path)
  file = next((f for f in (directory / INDEX, directory / CONFIG) if f.is_file()), None)
  kind = read_json(inside(file, directory)).get(CLASS) if file else DEFAULT
  # All pipelines of diffusers are of one kind; its reader says so where there is none.
  return load(MODELS, kind if isinstance(kind, str) and kind in MODELS else DEFAULT)(path, dtype)
