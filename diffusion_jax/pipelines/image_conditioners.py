"""Conditions by images: to follow, to vary, to paint in, to edit, to enlarge."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.config import typed
from diffusion_jax.diffusion.noise import Schedule, ScheduleConfig
from diffusion_jax.errors import UserError
from diffusion_jax.formats.clip import HALF, PREPROCESSOR, pixel_statistics
from diffusion_jax.models.network import Network
from diffusion_jax.pipelines.conditioners import Conditioner, Guided, part_of
from diffusion_jax.pixels import edges, resize, to_float
from diffusion_jax.types import Images, Weights

if TYPE_CHECKING:
  from diffusion_jax.pipelines.spaces import Space

CONTROLNET, IMAGE_ENCODER = 'controlnet', 'image_encoder'
"""The roles of their weights."""
TOP_LEVEL = 350
"""The largest noise level that the x4 upscaler was trained with."""
WHOLE = 0.25
"""Fraction of masks that cover everything, as Stable Diffusion's inpainting was trained."""
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""Mean and deviation of CLIP's training pixels in [0, 1] (Radford et al. 2021)."""


@dataclasses.dataclass(frozen=True, eq=False)
class ControlNet(Conditioner):
  """An image that a ControlNet follows (Zhang et al. 2023): it adds to the denoiser's skips."""

  networks: Mapping[str, Network] = dataclasses.field()  # The base's is no default.
  fields: ClassVar = ('control',)
  paths: ClassVar = ('path',)
  about: ClassVar = (
    'Drawn for these captions and the edges of test images, from the same noise each time.'
  )

  @classmethod
  def build(cls, options, context):
    """`path`: of a ControlNet."""
    part = part_of(options, 'control', ('controlnet',))
    return cls({CONTROLNET: part.network(dtype=context.dtype)}), {CONTROLNET: part}

  def check(self, denoiser):
    config = self.networks[CONTROLNET].config
    for name in ('block_out_channels', 'cross_attention_dim', 'layers_per_block'):
      own, other = getattr(denoiser, name, None), getattr(config, name)
      if own != other:
        raise UserError(
          f'the ControlNet has {name} {other}, but the denoiser {own}; use one made for it.'
        )

  def inputs(self, height, width):
    return {'control': ((height, width, 3), np.uint8)}

  def examples(self, images):
    return {'control': np.stack([edges(image) for image in images])}

  def rows(self, request):
    strength = request.inputs.control_strength
    return {'strength': np.full(len(request.prompts), strength, np.float32)}

  def encode(self, weights, rows):
    """'control' uint8 [b H W 3] and 'strength' [b], 1 in training -> the same, in [0, 1]."""
    control = rows['control']
    strength = rows['strength'] if 'strength' in rows else jnp.ones(len(control), jnp.float32)
    return {'control': control / jnp.float32(255), 'strength': strength}

  def at_step(self, weights, x, t, condition):
    network = self.networks[CONTROLNET].bind(weights[CONTROLNET])
    return {'residuals': network(x, t, condition)}


@dataclasses.dataclass(frozen=True, eq=False)
class ImageEncoder(Guided):
  """An image by CLIP's vision tower in place of a text: for variations of it.

  Adds 'text' [b 1 d]; the null is zeros; prompts have no effect. Trained on the images themselves.
  mean, std: per channel of pixels in [0, 1]; the tower sees (pixel - mean) / std.
  """

  networks: Mapping[str, Network] = dataclasses.field()  # The base's is no default.
  mean: tuple[float, ...] = MEAN
  std: tuple[float, ...] = STD
  fields: ClassVar = ('image',)
  paths: ClassVar = ('path',)
  about: ClassVar = 'Drawn as variations of test images, from the same noise each time.'

  @classmethod
  def build(cls, options, context):
    """`path`: of a CLIP, or of its vision tower with the projection."""
    part = part_of(options, 'image_embedding', ('clip_vision_projection', 'clip'))
    pixels = {'mean': HALF, 'std': HALF} | pixel_statistics(*part.json(PREPROCESSOR))
    network = part.network(dtype=context.dtype)
    return cls({IMAGE_ENCODER: network}, **pixels), {IMAGE_ENCODER: part}

  @property
  def size(self) -> int:
    """Edge of the images that it sees, in pixels."""
    config = self.networks[IMAGE_ENCODER].config
    return getattr(config, 'vision_config', config).image_size

  @property
  def width(self) -> int:
    """Width d of its text [b 1 d]."""
    return self.networks[IMAGE_ENCODER].config.projection_dim

  def check(self, denoiser):
    wanted = getattr(denoiser, 'cross_attention_dim', None)
    if wanted and wanted != self.width:
      raise UserError(
        f'the denoiser has cross_attention_dim {wanted}, but the image encoder gives embeddings of '
        f'width {self.width}; set it to {self.width}.'
      )

  def inputs(self, height, width):
    return {'reference': ((self.size, self.size, 3), np.uint8)}

  def examples(self, images):
    return {'reference': np.stack([resize(image, self.size, self.size) for image in images])}

  def encode(self, weights, rows):
    """'reference' uint8 [b s s 3] -> float32 'text' [b 1 d]."""
    if 'embedding' in rows:
      return {'text': rows['embedding'][:, None]}
    return self._embed(weights, rows['reference'] / jnp.float32(255))

  def of_batch(self, weights, batch, key=None):
    """'image' [b H W 3] in [-1, 1], brought to the tower's size."""
    shape = (len(batch['image']), self.size, self.size, 3)
    return self._embed(weights, (jax.image.resize(batch['image'], shape, 'linear') + 1) / 2)

  def _embed(self, weights: Weights, pixels: Images) -> dict[str, jax.Array]:
    pixels = (pixels - jnp.asarray(self.mean)) / jnp.asarray(self.std)
    network = self.networks[IMAGE_ENCODER].bind(weights[IMAGE_ENCODER])
    embedding = network.encode_image(pixels.astype(jnp.float32))
    return {'text': embedding.astype(jnp.float32)[:, None]}

  def null(self, weights):
    return {'text': jnp.zeros((1, self.width), jnp.float32)}


@dataclasses.dataclass(frozen=True, eq=False)
class Concatenated(Conditioner):
  """Channels joined to z in the denoiser's input; guidance keeps them on both sides."""

  space: Space

  @classmethod
  def build(cls, options, context):
    return super().build({'space': context.space, **options}, context)


class Inpainting(Concatenated):
  """A mask and the masked image, encoded (Rombach et al. 2022, sec. 4.5): 1 + c channels."""

  fields: ClassVar = ('image',)
  random: ClassVar = True
  about: ClassVar = (
    'Test images whose middle is drawn for these captions, from the same noise each time.'
  )

  @property
  def channels(self) -> int:
    return 1 + self.space.channels

  def inputs(self, height, width):
    return {'images': ((height, width, 3), np.uint8), 'masks': ((height, width), np.bool_)}

  def examples(self, images):
    """With the middle to be painted."""
    masks = np.zeros(images.shape[:3], bool)
    top, left = (edge // 4 for edge in images.shape[1:3])
    masks[:, top:-top, left:-left] = True
    return {'images': images, 'masks': masks}

  def encode(self, weights, rows):
    return {'image': self.image(weights, to_float(rows['images']), rows['masks'])}

  def image(self, weights: Weights, images: Images, masks: jax.Array) -> Images:
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
  """The image to edit, encoded but not scaled (InstructPix2Pix, Brooks et al. 2023)."""

  @property
  def channels(self) -> int:
    return self.space.channels

  def inputs(self, height, width):
    return {'images': ((height, width, 3), np.uint8)}

  def encode(self, weights, rows):
    return {'image': self.space.raw(weights, to_float(rows['images']))}


class Depth(Concatenated):
  """A depth map at the size of z, near is 1, in one channel."""

  channels: ClassVar = 1

  def inputs(self, height, width):
    return {'depth': (self.space.shape(height, width)[:2], np.float32)}

  def encode(self, weights, rows):
    return {'image': rows['depth'][..., None]}


@dataclasses.dataclass(frozen=True, eq=False)
class LowResolution(Concatenated):
  """A small image to enlarge, three channels at z's size, with noise; the noise level is its label.

  Rombach et al. 2022, sec. 4.5; `schedule` has the noise levels.
  """

  schedule: Schedule
  channels: ClassVar = 3
  fields: ClassVar = ('image',)
  random: ClassVar = True
  about: ClassVar = (
    'Drawn for these captions from test images made small, from the same noise each time.'
  )

  @classmethod
  def build(cls, options, context):
    """Options are those of a `ScheduleConfig`."""
    schedule = Schedule(typed(ScheduleConfig, options, 'settings.conditioners.upscale.'))
    return cls(context.space, schedule), {}

  def check(self, denoiser):
    if 'labels' not in getattr(denoiser, 'conditions', {}):
      raise UserError(
        f'an upscaler has the level of the noise as its label; give the denoiser num_class_embeds '
        f'above {TOP_LEVEL}.'
      )

  def inputs(self, height, width):
    return {'small': ((*self.space.shape(height, width)[:2], 3), np.uint8)}

  def examples(self, images):
    size = self.space.shape(*images.shape[1:3])[:2]
    return {'small': np.stack([resize(image, *size) for image in images])}

  def rows(self, request):
    level = request.inputs.noise_level
    if not 0 <= level <= TOP_LEVEL:
      raise UserError(f'noise_level is {level}; give one from 0 to {TOP_LEVEL}.')
    return {'level': np.full(len(request.prompts), level, np.int32)}

  def encode(self, weights, rows):
    """'small' uint8 [b h w 3], 'level' [b], and 'small_noise' [b h w 3] or 'keys' to make it of."""
    one = lambda key: jax.random.normal(
      jax.random.fold_in(jax.random.wrap_key_data(key), 2**31 - 1), rows['small'].shape[1:]
    )
    noise = rows['small_noise'] if 'small_noise' in rows else jax.vmap(one)(rows['keys'])
    return self._noised(to_float(rows['small']), rows['level'], noise)

  def of_batch(self, weights, batch, key=None):
    """'image' [b H W 3] in [-1, 1], made as small as z, with noise of random levels."""
    b, height, width, _ = batch['image'].shape
    shape = (b, *self.space.shape(height, width)[:2], 3)
    key_level, key_noise = jax.random.split(key)
    return self._noised(
      jax.image.resize(batch['image'], shape, 'linear'),
      jax.random.randint(key_level, (b,), 0, TOP_LEVEL + 1), jax.random.normal(key_noise, shape),
    )

  def _noised(self, small: Images, level: jax.Array, noise: jax.Array) -> dict[str, jax.Array]:
    alpha, sigma = (part[:, None, None, None] for part in self.schedule(level))
    return {'image': (alpha * small + sigma * noise).astype(jnp.float32), 'labels': level}


CONCATENATED = {
  'depth': Depth, 'inpaint': Inpainting, 'edit': Editing, 'upscale': LowResolution,
}
"""By the names of config and messages."""


def concatenated(
  space: Space, channels: int, schedule: Schedule | None = None
) -> dict[str, Conditioner]:
  """The conditioner by name, for so many input channels besides z's; or UserError.

  schedule: noise levels of an upscaler.
  """
  if channels == 0:
    return {}
  made = {
    name: kind(space, *[schedule or Schedule(ScheduleConfig())] * (kind is LowResolution))
    for name, kind in CONCATENATED.items()
  }
  known = {one.channels: name for name, one in made.items()}
  if channels not in known:
    numbers = ', '.join(f'{n} ({name})' for n, name in {0: 'none', **known}.items())
    raise UserError(
      f'the denoiser takes {channels} channels beside {space.channels} of latents; known are '
      f'{numbers}.'
    )
  return {known[channels]: made[known[channels]]}


def random_masks(key: jax.Array, shape: tuple[int, int, int], count: int = 4) -> jax.Array:
  """Unions of up to `count` random rectangles, bool [b h w], true where to paint.

  Edges are 1/8 to 5/8 of the image's; a fraction WHOLE of the masks is true everywhere.
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
