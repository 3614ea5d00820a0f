"""What a denoiser is conditioned on, one class for each kind; here their base, and classes.

A conditioner names its fields of `types.Condition` and its inputs: fields of a batch in training,
prompts and images in sampling. It holds networks without weights. New ones subclass `Conditioner`
or `Guided`, with a row in `registry.CONDITIONERS`.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.errors import UserError
from diffusion_jax.files import check_folder
from diffusion_jax.formats.networks import Part, read_part, resolve
from diffusion_jax.models.network import Network
from diffusion_jax.pipelines.options import AS_DRAWN, PLAIN, Sizing
from diffusion_jax.types import Condition, Weights

if TYPE_CHECKING:
  from diffusion_jax.pipelines.spaces import Space

Arrays = dict[str, jax.Array]
Spec = tuple[tuple[int, ...], type]
"""Shape without the leading [n], and type, of an image."""


class Request(NamedTuple):
  """What is sampled: prompts, one negative prompt, `inputs.Inputs`, the size, the
  guidance that a distilled denoiser imitates, None for the model's own, the prompts' syntax, and
  the sizes that it is conditioned on."""

  prompts: Sequence[str]
  negative: str = ''
  inputs: Any = None
  height: int = 1
  width: int = 1
  guidance: float | None = None
  syntax: str = PLAIN
  sizing: Sizing = AS_DRAWN


class Context(NamedTuple):
  """Context for building a conditioner: space, training source, dtype."""

  space: Space
  train: Any = None
  dtype: Any = jnp.float32


class Conditioner(abc.ABC):
  """One thing that a denoiser is conditioned on. Rows are arrays [n ...] by name."""

  fields: ClassVar[tuple[str, ...]] = ()
  """Fields of a batch that `of_batch` reads; () for what no data set has."""
  kept: ClassVar[tuple[str, ...]] = ()
  """Fields of its condition that a cache keeps; () where they do not follow from a prompt alone."""
  paths: ClassVar[tuple[str, ...]] = ()
  """Options that are directories, or 'asset:NAME'."""
  about: ClassVar[str] = ''
  """A sentence on previews with what `examples` makes."""
  random: ClassVar[bool] = False
  """True if `of_batch` needs its key."""
  strength: ClassVar[float | None] = None
  """Fraction of the steps that starting from an image takes if nothing is said, in place of
  `inputs.STRENGTH`."""
  usual: ClassVar[bool] = False
  """True if `of_size` is its condition where a batch has none of `fields`."""
  channels: ClassVar[int] = 0
  """Channels that it adds to the denoiser's input."""
  networks: Mapping[str, Network] = MappingProxyType({})
  """By the role of their weights; a field of those that have any."""

  @classmethod
  def build(
    cls, options: Mapping[str, Any], context: Context
  ) -> tuple[Conditioner, dict[str, Part]]:
    """Return the conditioner of a section of a config, and its frozen parts by role."""
    del context
    try:
      return cls(**options), {}
    except TypeError as error:
      raise UserError(f'{cls.__name__} cannot be made of its section: {error}.') from error

  @classmethod
  def check_options(cls, options: Mapping[str, Any]) -> None:
    """Raise UserError for a section of a config that can be seen to be wrong before `build`."""
    del options

  def options(self) -> dict[str, Any]:
    """Return what `build` needs, with the section of the config, where there is no data set."""
    return {}

  @classmethod
  def moved(
    cls, name: str, options: Mapping[str, Any], move: Callable[[str, str], str]
  ) -> dict[str, Any]:
    """Return its options with move(path, folder in a model's directory) for each of their paths.

    name: of its row in `registry.CONDITIONERS`.
    """
    return {
      key: move(str(value), f'{name}_{key}') if key in cls.paths else value
      for key, value in options.items()
    }

  def check(self, denoiser: Any) -> None:
    """Raise UserError where the denoiser with this config is not made for it."""
    del denoiser

  def prompt(self, record: Mapping[str, Any]) -> str | None:
    """Return the prompt for which a model should sample a record; None where there is none."""
    del record
    return None

  def replaced(self, networks: Mapping[str, Network]) -> Conditioner:
    """Return the same with other networks, by role."""
    own = {role: networks.get(role, network) for role, network in self.networks.items()}
    return dataclasses.replace(self, networks=own) if own else self

  def inputs(self, height: int, width: int) -> dict[str, Spec]:
    """Return the fields of `Inputs` that it must be given for images of height x width pixels."""
    del height, width
    return {}

  def examples(self, images: np.ndarray) -> dict[str, np.ndarray]:
    """Return fields of `Inputs` for previews, made of images uint8 [n h w 3] of the data."""
    del images
    return {}

  def rows(self, request: Request) -> dict[str, np.ndarray]:
    """Return host arrays [n ...] that `encode` and `pair` take, with those of `Inputs`."""
    del request
    return {}

  @abc.abstractmethod
  def encode(self, weights: Weights, rows: Mapping[str, jax.Array]) -> Arrays:
    """Return the fields of `Condition`, [n ...], of rows; pure."""

  def of_prompts(self, weights: Weights, prompts: Sequence[str]) -> Arrays:
    """Return the condition [n ...] of prompts alone, for a cache of what is `kept`."""
    return self.encode(weights, self.rows(Request(prompts)))

  def pair(
    self, weights: Weights, rows: Mapping[str, jax.Array], clip_skip: int = 0
  ) -> tuple[Arrays, Arrays]:
    """Return (the condition, the one that guidance leads away from); pure."""
    del clip_skip
    condition = self.encode(weights, rows)
    return condition, condition

  def of_batch(
    self, weights: Weights, batch: Mapping[str, jax.Array], key: jax.Array | None = None
  ) -> Arrays:
    """Return the condition of a batch in training; pure."""
    del key
    return self.encode(weights, batch)

  def of_size(self, count: int, height: int, width: int) -> Arrays:
    """Return the condition [count ...] of images of height x width pixels, where it is `usual`."""
    raise NotImplementedError

  def same(self, rows: Mapping[str, np.ndarray]) -> bool:
    """Return whether both of `pair` are alike, so that guidance changes nothing."""
    del rows
    return True

  def at_step(
    self, weights: Weights, x: jax.Array, t: jax.Array, condition: Condition
  ) -> dict[str, Any]:
    """Return further arguments of the denoiser, by name, which depend on x and t; pure."""
    del weights, x, t, condition
    return {}


class Guided(Conditioner):
  """A conditioner with a null, which guidance leads away from and training puts in now and then."""

  @abc.abstractmethod
  def null(self, weights: Weights) -> Arrays:
    """Return the condition of nothing, without [n]."""

  def pair(self, weights, rows, clip_skip=0):
    condition, null = self.encode(weights, rows), self.null(weights)
    spread = lambda value, name: jnp.broadcast_to(null[name].astype(value.dtype), value.shape)
    return condition, {name: spread(value, name) for name, value in condition.items()}

  def same(self, rows):
    return False


def part_of(options: Mapping[str, Any], name: str, kinds: Sequence[str]) -> Part:
  """Return the network that `path` names, the only option of a conditioner called `name`."""
  if set(options) != {'path'}:
    raise UserError(f'settings.conditioners.{name} takes path alone, the directory of its network.')
  check_folder(resolve(options['path']))  # It is copied with what is trained, at the end.
  return read_part(options['path']).expect(kinds)


@dataclasses.dataclass(frozen=True)
class ClassLabel(Guided):
  """A class by its name or number in the prompt; the empty prompt is no class.

  Adds 'labels' [b], int32 places in `classes`; the null is their number.
  """

  classes: tuple[str, ...]
  fields: ClassVar = ('label',)
  kept: ClassVar = ('labels',)

  @classmethod
  def build(cls, options, context):
    """`classes`: () for those of the data."""
    found = sorted(set(getattr(context.train, 'labels', ())))
    classes = tuple(options.get('classes', ())) or tuple(found)
    if set(options) - {'classes'} or not classes:
      raise UserError(
        'settings.conditioners.class takes classes alone, the names of all of them; a data set '
        'without classes cannot be without it.'
      )
    return cls(classes), {}

  def options(self):
    return {'classes': list(self.classes)}

  def check(self, denoiser):
    rows, count = getattr(denoiser, 'num_embeds_ada_norm', None), len(self.classes)
    if rows not in (None, count):
      raise UserError(
        f'denoiser.num_embeds_ada_norm is {rows}, but there are {count} classes; set it to that.'
      )

  def prompt(self, record):
    return record.get('label', '')

  def number(self, prompt: str) -> int:
    """Return the number of the class that a prompt names; UserError where it is none."""
    prompt = prompt.strip()
    if not prompt:
      return len(self.classes)
    if prompt in self.classes:
      return self.classes.index(prompt)
    if prompt.isdecimal() and int(prompt) < len(self.classes):
      return int(prompt)
    raise UserError(
      f'{prompt!r} is no class of the model; give one of {", ".join(self.classes[:20])}, or a '
      f'number below {len(self.classes)}.'
    )

  def rows(self, request):
    labels = np.asarray([self.number(prompt) for prompt in request.prompts], np.int32)
    return {'label': labels, 'negative_label': np.full_like(labels, self.number(request.negative))}

  def encode(self, weights, rows):
    return {'labels': rows['label']}

  def null(self, weights):
    return {'labels': jnp.asarray(len(self.classes), jnp.int32)}

  def pair(self, weights, rows, clip_skip=0):
    return {'labels': rows['label']}, {'labels': rows['negative_label']}

  def same(self, rows):
    return bool((rows['label'] == rows['negative_label']).all())
