"""What a model takes beside the prompt: pictures to start from or to follow, masks, controls.

What the U-Net is told beside the latents follows from how many channels it takes: none; one, a
depth map; 1 + c, a mask and the latents of the masked picture (inpainting); c, the latents of the
picture to edit (InstructPix2Pix, Brooks et al. 2023); 3, a small picture to enlarge (Rombach et al.
2022, sec. 4.5) with a noise level. c are the channels of the latents.

Pictures in files that belong together keep their places: masks, controls and depth maps are laid
over the picture that they belong to, whatever their own size, and the same central square is cut
out of all.
"""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from diffusion_jax.data.images import read_pixels
from diffusion_jax.errors import UserError
from diffusion_jax.pipelines.conditioners import ImageEncoder
from diffusion_jax.pixels import to_float
from diffusion_jax.types import Condition, Latents, Weights

OPTIONS = {
  'images': '--image', 'masks': '--mask', 'control': '--control', 'depth': '--depth',
  'small': '--small', 'reference': '--reference',
}
"""The pictures among `Inputs`, and how the command `sample` is given them."""
STRENGTH = 0.8
TOP_LEVEL = 350
"""The largest noise level that the x4 upscaler was trained with."""


def kind_of_input(model) -> str:
  """'none', 'depth', 'inpaint', 'edit' or 'upscale'. UserError for another number of channels."""
  kinds = {0: 'none', 1: 'depth', 1 + model.channels: 'inpaint', model.channels: 'edit',
           3: 'upscale'}
  if model.beside not in kinds:
    raise UserError(
      f'the U-Net takes {model.beside} channels beside {model.channels} of latents; known are '
      f'{", ".join(f"{n} ({kind})" for n, kind in kinds.items())}.'
    )
  return kinds[model.beside]


@dataclasses.dataclass(frozen=True)
class Inputs:
  """Arrays of one picture for each prompt, or of one for all.

  images: uint8 [n H W 3]: what to start from (Meng et al. 2022, SDEdit), to repaint or to edit.
  strength: share of the steps in (0, 1] that starting from an image takes; None: 1 for a U-Net
  that is shown the image itself, else STRENGTH.
  masks: bool [n H W], true where an inpainting model paints.
  control: uint8 [n H W 3], what a ControlNet sees, with control_strength.
  depth: float32 [n h w] in [-1, 1], near is 1, at the latents' size.
  small: uint8 [n h w 3], to enlarge, at the latents' size, with noise_level in [0, 350].
  reference: uint8 [n s s 3], to vary, at the size of the model's image encoder.
  small_noise: float32 [n h w 3], what the small picture is noised with; None: noise of the seed.
  """

  images: np.ndarray | None = None
  strength: float | None = None
  masks: np.ndarray | None = None
  control: np.ndarray | None = None
  control_strength: float = 1.0
  depth: np.ndarray | None = None
  small: np.ndarray | None = None
  noise_level: int = 20
  small_noise: np.ndarray | None = None
  reference: np.ndarray | None = None

  def share(self, model) -> float:
    """Share of the steps that are taken."""
    if self.strength is not None:
      return self.strength
    return 1.0 if self.images is None or 'images' in _needs(model) else STRENGTH

  def rows(self, model, n: int) -> dict[str, np.ndarray]:
    """Columns [n ...] for the compiled program; UserError where they do not fit the model."""
    needs = _needs(model)
    given = {
      name: getattr(self, name) for name in OPTIONS if getattr(self, name) is not None
    }
    for name in sorted(needs - given.keys()):
      raise UserError(
        f'the model needs {name} beside the prompts; give {OPTIONS[name]}, in code '
        f'Inputs({name}=...).'
      )
    for name in given.keys() - needs - {'images'}:
      raise UserError(
        f'the model takes no {name}; leave {OPTIONS[name]} out, or use a model that does.'
      )
    edge, latent = model.image_size, model.latent_shape[0]
    seen = model.text.size if isinstance(model.text, ImageEncoder) else 0
    shapes = {
      'images': (edge, edge, 3), 'masks': (edge, edge), 'control': (edge, edge, 3),
      'depth': (latent, latent), 'small': (latent, latent, 3),
      'reference': (seen, seen, 3),
    }
    out = {name: _fitting(name, value, shapes[name], n) for name, value in given.items()}
    if 'images' in out and (not needs & {'images'} or self.share(model) < 1):
      out['start'] = out['images']
    if 'control' in given:
      out['strength'] = np.full(n, self.control_strength, np.float32)
    if 'small' in given:
      if not 0 <= self.noise_level <= TOP_LEVEL:
        raise UserError(f'noise_level is {self.noise_level}; give one from 0 to {TOP_LEVEL}.')
      out['level'] = np.full(n, self.noise_level, np.int32)
      if self.small_noise is not None:
        out['small_noise'] = _fitting('small_noise', self.small_noise, shapes['small'], n)
    return out


def _needs(model) -> set[str]:
  needs = {'none': set(), 'depth': {'depth'}, 'inpaint': {'images', 'masks'}, 'edit': {'images'},
           'upscale': {'small'}}[kind_of_input(model)]
  needs |= {'reference'} if isinstance(model.text, ImageEncoder) else set()
  return needs | ({'control'} if model.controlnet else set())


def _fitting(name: str, value: np.ndarray, shape: tuple[int, ...], n: int) -> np.ndarray:
  dtype = {'masks': np.bool_, 'depth': np.float32, 'small_noise': np.float32}.get(name, np.uint8)
  if value.dtype != dtype or value.shape[1:] != shape or len(value) not in (1, n):
    raise UserError(
      f'{name} are {value.dtype} {list(value.shape)}; give {np.dtype(dtype)} [1 or {n}, '
      f'{", ".join(map(str, shape))}].'
    )
  return np.broadcast_to(value, (n, *shape))


def prepared(
  model, weights: Weights, condition: Condition, negative: Condition, rows: dict, grid
) -> tuple[Condition, Condition, Latents]:
  """The conditions with what `Inputs.rows` has, and x at the first noise level of the grid.

  With and without the prompt, the model is told the same beside it. The start is noise for a model
  that is shown the picture itself and takes all steps, else the noised picture.
  """
  kind, x, told = kind_of_input(model), rows['x'], {}
  autoencoder = weights['autoencoder']
  if kind == 'inpaint':
    told['image'] = inpainting_image(model, autoencoder, to_float(rows['images']), rows['masks'])
  elif kind == 'edit':
    told['image'] = edited_image(model, autoencoder, to_float(rows['images']))
  elif kind == 'depth':
    told['image'] = rows['depth'][..., None]
  elif kind == 'upscale':
    noise = rows['small_noise'] if 'small_noise' in rows else small_noise(rows)
    told['image'] = noised_small(model, to_float(rows['small']), rows['level'], noise)
    told['labels'] = rows['level']
  if 'reference' in rows:
    condition = condition._replace(text=model.text.see(weights, rows['reference']))
  if 'control' in rows:
    told |= {'control': rows['control'] / jnp.float32(255), 'strength': rows['strength']}
  if 'start' in rows:
    alpha, sigma = grid[0][0], grid[1][0]
    x = alpha * model.encode(autoencoder, to_float(rows['start'])) + sigma * x
  return condition._replace(**told), negative._replace(**told), x


def inpainting_image(model, autoencoder, images: jax.Array, masks: jax.Array) -> jax.Array:
  """Images [b H W 3] in [-1, 1] and masks [b H W], true where to paint -> [b h w 1 + c]."""
  masked = jnp.where(masks[..., None], 0.0, images)
  latents = model.encode(autoencoder, masked)
  step = masks.shape[1] // latents.shape[1]
  return jnp.concatenate([masks[:, ::step, ::step, None].astype(jnp.float32), latents], axis=-1)


def edited_image(model, autoencoder, images: jax.Array) -> jax.Array:
  """Images [b H W 3] in [-1, 1] -> [b h w c]; InstructPix2Pix sees latents that are not scaled."""
  mean, _ = model.autoencoder.bind(autoencoder).encode(images)
  return mean.astype(jnp.float32)


def noised_small(model, images: jax.Array, level: jax.Array, noise: jax.Array) -> jax.Array:
  """Images [b h w 3] in [-1, 1], noised to step level [b] of the schedule for small pictures."""
  alpha, sigma = (part[:, None, None, None] for part in model.small_schedule(level))
  return (alpha * images + sigma * noise).astype(jnp.float32)


def small_noise(rows: dict) -> jax.Array:
  """Unit noise [b h w 3] for the small pictures, from each image's key."""
  one = lambda key: jax.random.normal(
    jax.random.fold_in(jax.random.wrap_key_data(key), 2**31 - 1), rows['small'].shape[1:]
  )
  return jax.vmap(one)(rows['keys'])


def check_edited(model, image_guidance: float) -> None:
  """UserError for guidance by a picture in a model that edits none."""
  if image_guidance != 1 and kind_of_input(model) != 'edit':
    raise UserError(
      f'image_guidance is {image_guidance:g}, but the model edits no picture; leave it at 1.'
    )


FRAMES = ('image', 'small', 'control', 'depth', 'mask')
"""Of the pictures that are given, the first of these is laid out by itself, the others over it."""
ALONE = 'reference'
"""A picture whose places mean nothing to the one that is drawn."""
ON_BLACK = ('mask', 'control', 'depth')
"""What is transparent in these is nothing: not painted, not drawn, far away. In others it is white.
"""
STRETCHED = 1.05
"""Ratio of two shapes from which on people are told that one of them is stretched."""


class Pictures(NamedTuple):
  """What `read_pictures` made of files: arguments of `conditions.Inputs`, and what to tell people.
  """

  arrays: dict[str, np.ndarray]
  notes: list[str]


def read_pictures(files: Mapping[str, str | Path], edges: Mapping[str, int]) -> Pictures:
  """Reads pictures that belong together.

  Masks paint where they are white: shrunk or enlarged with Lanczos' filter and cut at half, as
  diffusers does it. Depth maps fill the range from -1 to 1.

  Args:
    files: 'image', 'mask', 'control', 'depth', 'small' and 'reference', those that there are.
    edges: of each the edge in pixels that the model takes.

  Raises:
    UserError: one that cannot be read, or a mask that paints nothing of what is cut out.
  """
  frame = next((name for name in FRAMES if name in files), None)
  arrays, notes, sizes = {}, [], {}
  for name in sorted(files, key=lambda name: name != frame):
    pixels = read_pixels(files[name], background='black' if name in ON_BLACK else 'white')
    own = sizes[name] = pixels.shape[:2]
    frame_size = own if name == ALONE else sizes[frame]
    if _ratio(own, frame_size) > STRETCHED:
      notes.append(
        f'{files[name]} is {own[1]} x {own[0]} pixels, {files[frame]} '
        f'{frame_size[1]} x {frame_size[0]}; it is stretched to lie over it.'
      )
    kind = Image.Resampling.LANCZOS if name == 'mask' else Image.Resampling.BICUBIC
    arrays[name] = central_square(pixels, frame_size, edges[name], kind)[None]
  if 'mask' in arrays:
    arrays['masks'], said = _painted(arrays.pop('mask'), files['mask'])
    notes += said
  if 'image' in arrays:
    arrays['images'] = arrays.pop('image')
  if 'depth' in arrays:
    arrays['depth'] = _filling(arrays['depth'].mean(axis=-1))
  return Pictures(arrays, notes)


def central_square(
  pixels: np.ndarray, frame: tuple[int, int], edge: int,
  filtered: Image.Resampling = Image.Resampling.BICUBIC,
) -> np.ndarray:
  """The central square of a frame (height, width) out of a picture that is laid over it.

  Args:
    pixels: uint8 [h w 3].

  Returns:
    uint8 [edge edge 3].
  """
  side = min(frame)
  lows = [(whole - side) // 2 for whole in frame]
  scales = [own / whole for own, whole in zip(pixels.shape, frame, strict=False)]
  top, left = (low * scale for low, scale in zip(lows, scales, strict=True))
  bottom, right = ((low + side) * scale for low, scale in zip(lows, scales, strict=True))
  y, x = math.floor(top), math.floor(left)
  # Cut first, so that nothing beyond the square shows in it.
  cut = Image.fromarray(pixels[y : math.ceil(bottom), x : math.ceil(right)])
  box = (left - x, top - y, min(right - x, cut.width), min(bottom - y, cut.height))
  return np.asarray(cut.resize((edge, edge), filtered, box))


def _ratio(a: tuple[int, int], b: tuple[int, int]) -> float:
  """How many times as wide for its height one is as the other, at least 1."""
  ratio = a[1] * b[0] / (a[0] * b[1])
  return max(ratio, 1 / ratio)


def _painted(pixels: np.ndarray, file: str | Path) -> tuple[np.ndarray, list[str]]:
  """bool [1 h w], true where uint8 [1 h w 3] is white, and what is to be said of it."""
  gray = np.asarray(Image.fromarray(pixels[0]).convert('L'))[None]
  painted = gray >= 128
  if not painted.any():
    raise UserError(
      f'the mask {file} paints nothing of the central square; make white and opaque what is to be '
      'painted.'
    )
  said = f'the mask {file} paints everything, so that nothing of the picture is kept.'
  return painted, [said] * bool(painted.all())


def _filling(depth: np.ndarray) -> np.ndarray:
  """float32 in [-1, 1]: models of depth were shown maps that fill the range."""
  low, high = depth.min(), max(depth.max(), depth.min() + 1)
  return (2 * (depth - low) / (high - low) - 1).astype(np.float32)
