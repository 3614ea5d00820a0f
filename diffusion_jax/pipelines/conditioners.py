"""What a denoiser is conditioned on, one class for each kind.

A conditioner says what it adds to `types.Condition`, what its null is, in whose place training puts
it now and then and which guidance compares with, and what it needs: fields of a batch in training,
prompts and pictures in sampling. It holds networks, but no weights. Outside of this file a
conditioner needs no more than a subclass of `Conditioner` and a row in `registry.CONDITIONERS`.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.errors import UserError
from diffusion_jax.models.network import Network
from diffusion_jax.pixels import edges, to_float
from diffusion_jax.types import Condition, Weights

if TYPE_CHECKING:
  from diffusion_jax.diffusion.noise import Schedule
  from diffusion_jax.formats.networks import Part
  from diffusion_jax.pipelines.spaces import Space

Arrays = dict[str, jax.Array]
Spec = tuple[tuple[int, ...], type]
"""Shape without the leading [n], and type, of a picture."""

CONTROLNET = 'controlnet'
TOP_LEVEL = 350
"""The largest noise level that the x4 upscaler was trained with."""
WHOLE = 0.25
"""Fraction of masks that cover everything, as Stable Diffusion's inpainting was trained."""


class Request(NamedTuple):
  """What is sampled: prompts, the one negative prompt, `conditions.Inputs`, and the size."""

  prompts: Sequence[str]
  negative: str
  inputs: Any
  height: int
  width: int


class Context(NamedTuple):
  """What a conditioner is built in: the space, the source that is trained on, and the type."""

  space: Space
  train: Any = None
  dtype: Any = jnp.float32


class Conditioner(abc.ABC):
  """One thing that a denoiser is conditioned on. Rows are arrays [n ...] by name."""

  fields: ClassVar[tuple[str, ...]] = ()
  """Fields of a batch that `of_batch` reads."""
  paths: ClassVar[tuple[str, ...]] = ()
  """Those of its options that are directories, or 'asset:NAME'."""
  guided: ClassVar[bool] = False
  """Whether it has a null, so that guidance and the dropout of training apply."""
  shows: ClassVar[str] = ''
  """A sentence on previews of a model that is trained to take it."""
  random: ClassVar[bool] = False
  """Whether `of_batch` needs its key."""
  networks: ClassVar[Mapping[str, Network]] = MappingProxyType({})
  """By the role of their weights."""

  @classmethod
  def build(
    cls, options: Mapping[str, Any], context: Context
  ) -> tuple[Conditioner, dict[str, Part]]:
    """Make the conditioner of a section of a config; its frozen parts, by role."""
    del context
    try:
      return cls(**options), {}
    except TypeError as error:
      raise UserError(f'{cls.__name__} cannot be made of its section: {error}.') from error

  def options(self) -> dict[str, Any]:
    """What `build` needs beside the section of the config, where there is no data set."""
    return {}

  def prompt(self, record: Mapping[str, Any]) -> str | None:
    """The prompt for which a model should sample a record; None where it says nothing."""
    del record
    return None

  def replaced(self, networks: Mapping[str, Network]) -> Conditioner:
    """The same with other networks, by role."""
    del networks
    return self

  def channels(self, space: Space) -> int:
    """Channels that it adds to the denoiser's input."""
    del space
    return 0

  def pictures(self, space: Space, height: int, width: int) -> dict[str, Spec]:
    """The fields of `Inputs` that it must be given to sample images of height x width pixels."""
    del space, height, width
    return {}

  def examples(self, images: np.ndarray) -> dict[str, np.ndarray]:
    """Fields of `Inputs` for previews, made of images uint8 [n h w 3] of the data."""
    del images
    return {}

  def rows(self, request: Request) -> dict[str, np.ndarray]:
    """Host arrays [n ...] that `encode` and `pair` take, beside the pictures."""
    del request
    return {}

  @abc.abstractmethod
  def encode(self, weights: Weights, rows: Mapping[str, jax.Array]) -> Arrays:
    """Rows -> fields of `Condition`, [n ...]; pure."""

  def null(self, weights: Weights) -> Arrays:
    """The same fields of nothing, without [n]; of those that are `guided`."""
    raise NotImplementedError

  def pair(
    self, weights: Weights, rows: Mapping[str, jax.Array], clip_skip: int = 0
  ) -> tuple[Arrays, Arrays]:
    """(what is wanted, what guidance leads away from); pure."""
    del clip_skip
    told = self.encode(weights, rows)
    if not self.guided:
      return told, told
    null = self.null(weights)
    return told, {k: jnp.broadcast_to(null[k].astype(v.dtype), v.shape) for k, v in told.items()}

  def of_batch(
    self, weights: Weights, batch: Mapping[str, jax.Array], key: jax.Array | None = None
  ) -> Arrays:
    """What training is told of a batch; pure."""
    del key
    return self.encode(weights, batch)

  def same(self, rows: Mapping[str, np.ndarray]) -> bool:
    """Whether what is wanted and what is not are alike, so that guidance changes nothing."""
    del rows
    return not self.guided

  def cached(self) -> tuple[str, ...]:
    """The columns of a cache that hold what it needs. UserError where there are none."""
    raise UserError('settings.cache keeps latents, texts and classes alone; switch it off.')

  def of_record(self, record: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The columns of `cached`, for one record of a source."""
    raise NotImplementedError

  def of_cache(self, batch: Mapping[str, jax.Array]) -> Arrays:
    """What training is told of a batch of those columns; pure."""
    return {name: batch[name] for name in self.cached()}

  def drop(self, told: Arrays, null: Arrays, key: jax.Array, fraction: float) -> Arrays:
    """Put the null [...] in the place of a random fraction of the examples [b ...]; pure."""
    drop = jax.random.bernoulli(key, fraction, (len(next(iter(told.values()))),))
    replace = lambda x, none: jnp.where(drop.reshape(-1, *[1] * (x.ndim - 1)), none, x)
    return {name: replace(value, null[name]) for name, value in told.items()}

  def at_step(
    self, weights: Weights, x: jax.Array, t: jax.Array, condition: Condition
  ) -> dict[str, Any]:
    """Further arguments of the denoiser, by name, which depend on x and t; pure."""
    del weights, x, t, condition
    return {}


@dataclasses.dataclass(frozen=True)
class ClassLabel(Conditioner):
  """A class by its name or number, as the prompt says it; the empty prompt is no class.

  Adds 'labels' [b], int32. `classes` are their names in order; the null is the number after the
  last, as in `models.dit`.
  """

  classes: tuple[str, ...]
  fields: ClassVar = ('label',)
  guided: ClassVar = True

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

  def prompt(self, record):
    return record.get('label', '')

  def number(self, prompt: str) -> int:
    """Of the class that a prompt names; UserError where it is none."""
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
    del weights
    return {'labels': rows['label']}

  def cached(self):
    return self.fields

  def of_record(self, record):
    return {'label': np.int32(self.number(record.get('label', '')))}

  def of_cache(self, batch):
    return {'labels': batch['label']}

  def null(self, weights):
    del weights
    return {'labels': jnp.asarray(len(self.classes), jnp.int32)}

  def pair(self, weights, rows, clip_skip=0):
    return {'labels': rows['label']}, {'labels': rows['negative_label']}

  def same(self, rows):
    return bool((rows['label'] == rows['negative_label']).all())


@dataclasses.dataclass(frozen=True)
class Sizes(Conditioner):
  """SDXL's sizes [b 6] in pixels: original height and width, top and left of the crop, target
  height and width (Podell et al. 2023, sec. 2.2); those of whole images where none are given."""

  fields: ClassVar = ('sizes',)

  def rows(self, request):
    return {'sizes': self.whole(len(request.prompts), request.height, request.width)}

  @staticmethod
  def whole(count: int, height: int, width: int) -> np.ndarray:
    """Of images that nothing is cut off from, float32 [count 6]."""
    return np.tile(np.asarray([height, width, 0, 0, height, width], np.float32), (count, 1))

  def encode(self, weights, rows):
    del weights
    return {'sizes': rows['sizes']}


@dataclasses.dataclass(frozen=True, eq=False)
class ControlNet(Conditioner):
  """A picture that a ControlNet follows (Zhang et al. 2023): it adds to the denoiser's skips."""

  network: Network
  fields: ClassVar = ('control',)
  shows: ClassVar = (
    'Drawn for these captions and the edges of test images, from the same noise each time.'
  )

  def options(self) -> dict[str, Any]:
    """What `build` needs beside the section of the config, where there is no data set."""
    return {}

  def prompt(self, record: Mapping[str, Any]) -> str | None:
    """The prompt for which a model should sample a record; None where it says nothing."""
    del record
    return None

  def replaced(self, networks):
    return dataclasses.replace(self, network=networks.get(CONTROLNET, self.network))

  @property
  def networks(self) -> dict[str, Network]:
    return {CONTROLNET: self.network}

  def pictures(self, space, height, width):
    return {'control': ((height, width, 3), np.uint8)}

  def examples(self, images):
    return {'control': np.stack([edges(image) for image in images])}

  def rows(self, request):
    n, inputs = len(request.prompts), request.inputs
    return {'strength': np.full(n, inputs.control_strength, np.float32)}

  def encode(self, weights, rows):
    """'control' uint8 [b H W 3] and 'strength' [b] -> the same, in [0, 1]."""
    del weights
    return {'control': rows['control'] / jnp.float32(255), 'strength': rows['strength']}

  def of_batch(self, weights, batch, key=None):
    strength = jnp.ones(len(batch['control']), jnp.float32)
    return self.encode(weights, {**batch, 'strength': strength})

  def at_step(self, weights, x, t, condition):
    network = self.network.bind(weights[CONTROLNET])
    return {'residuals': network(x, t, condition)}


@dataclasses.dataclass(frozen=True, eq=False)
class Concatenated(Conditioner):
  """Channels beside z in the denoiser's input; guidance keeps them on both sides."""

  space: Space

  @classmethod
  def build(cls, options, context):
    return super().build({'space': context.space, **options}, context)


class Inpainting(Concatenated):
  """A mask and the masked picture, encoded (Rombach et al. 2022, sec. 4.5): 1 + c channels."""

  fields: ClassVar = ('image',)
  random: ClassVar = True
  shows: ClassVar = (
    'Test images whose middle is drawn for these captions, from the same noise each time.'
  )

  def channels(self, space):
    return 1 + space.channels

  def pictures(self, space, height, width):
    return {'images': ((height, width, 3), np.uint8), 'masks': ((height, width), np.bool_)}

  def examples(self, images):
    """With the middle to be painted."""
    masks = np.zeros(images.shape[:3], bool)
    top, left = (edge // 4 for edge in images.shape[1:3])
    masks[:, top:-top, left:-left] = True
    return {'images': images, 'masks': masks}

  def encode(self, weights, rows):
    return {'image': self.image(weights, to_float(rows['images']), rows['masks'])}

  def image(self, weights: Weights, images: jax.Array, masks: jax.Array) -> jax.Array:
    """Images [b H W 3] in [-1, 1] and masks [b H W], true where to paint -> [b h w 1 + c]."""
    z = self.space.encode(weights, jnp.where(masks[..., None], 0.0, images))
    rows, columns = (masks.shape[i] // z.shape[i] for i in (1, 2))
    masks = masks[:, ::rows, ::columns, None].astype(jnp.float32)
    return jnp.concatenate([masks, z], axis=-1)

  def of_batch(self, weights, batch, key=None):
    """With random masks."""
    masks = random_masks(key, batch['image'].shape[:3])
    return {'image': self.image(weights, batch['image'], masks)}


class Editing(Concatenated):
  """The picture to edit, encoded but not scaled (InstructPix2Pix, Brooks et al. 2023)."""

  def channels(self, space):
    return space.channels

  def pictures(self, space, height, width):
    return {'images': ((height, width, 3), np.uint8)}

  def encode(self, weights, rows):
    return {'image': self.space.raw(weights, to_float(rows['images']))}


class Depth(Concatenated):
  """A depth map at the size of z, near is 1, in one channel."""

  def channels(self, space):
    return 1

  def pictures(self, space, height, width):
    return {'depth': (space.shape(height, width)[:2], np.float32)}

  def encode(self, weights, rows):
    del weights
    return {'image': rows['depth'][..., None]}


@dataclasses.dataclass(frozen=True, eq=False)
class LowResolution(Concatenated):
  """A small picture to enlarge, with noise of a level that the denoiser is told as its label.

  Three channels at the size of z (Rombach et al. 2022, sec. 4.5). `schedule` has the noise levels.
  """

  schedule: Schedule | None = None

  def channels(self, space):
    return 3

  def pictures(self, space, height, width):
    return {'small': ((*space.shape(height, width)[:2], 3), np.uint8)}

  def rows(self, request):
    inputs = request.inputs
    if not 0 <= inputs.noise_level <= TOP_LEVEL:
      raise UserError(f'noise_level is {inputs.noise_level}; give one from 0 to {TOP_LEVEL}.')
    return {'level': np.full(len(request.prompts), inputs.noise_level, np.int32)}

  def encode(self, weights, rows):
    """'small' uint8 [b h w 3], 'level' [b], and 'small_noise' [b h w 3] or 'keys' to make it of."""
    del weights
    noise = rows['small_noise'] if 'small_noise' in rows else self._noise(rows)
    alpha, sigma = (part[:, None, None, None] for part in self.schedule(rows['level']))
    image = (alpha * to_float(rows['small']) + sigma * noise).astype(jnp.float32)
    return {'image': image, 'labels': rows['level']}

  @staticmethod
  def _noise(rows) -> jax.Array:
    one = lambda key: jax.random.normal(
      jax.random.fold_in(jax.random.wrap_key_data(key), 2**31 - 1), rows['small'].shape[1:]
    )
    return jax.vmap(one)(rows['keys'])


CONCATENATED = {
  'depth': Depth, 'inpaint': Inpainting, 'edit': Editing, 'upscale': LowResolution,
}
"""By the names of config and messages."""


def concatenated(space: Space, channels: int, **options: Any) -> dict[str, Conditioner]:
  """The conditioner, by its name, for so many input channels beside those of z.

  UserError for a number that none has; `options` are those of an upscaler.
  """
  if channels == 0:
    return {}
  made = {
    name: kind(space, **(options if kind is LowResolution else {}))
    for name, kind in CONCATENATED.items()
  }
  known = {one.channels(space): name for name, one in made.items()}
  if channels not in known:
    numbers = ', '.join(f'{n} ({name})' for n, name in {0: 'none', **known}.items())
    raise UserError(
      f'the denoiser takes {channels} channels beside {space.channels} of latents; known are '
      f'{numbers}.'
    )
  return {known[channels]: made[known[channels]]}


def random_masks(key: jax.Array, shape: tuple[int, int, int], count: int = 4) -> jax.Array:
  """Unions of up to `count` random rectangles, bool [b h w], true where to paint; pure.

  A rectangle has edges of 1/8 to 5/8 of the picture's; WHOLE of the masks are true everywhere.
  """
  b, h, w = shape
  keys = jax.random.split(key, 4)
  size = jax.random.uniform(keys[0], (2, b, count), minval=1 / 8, maxval=5 / 8)
  start = jax.random.uniform(keys[1], (2, b, count)) * (1 - size)
  used = jnp.arange(count) < jax.random.randint(keys[2], (b, 1), 1, count + 1)

  def inside(axis: int, edge: int) -> jax.Array:
    place = (jnp.arange(edge) + 0.5) / edge
    low, high = start[axis][..., None], (start + size)[axis][..., None]
    return (place >= low) & (place < high)

  rectangles = inside(0, h)[..., :, None] & inside(1, w)[..., None, :]
  some = (rectangles & used[..., None, None]).any(axis=1)
  return some | jax.random.bernoulli(keys[3], WHOLE, (b, 1, 1))
