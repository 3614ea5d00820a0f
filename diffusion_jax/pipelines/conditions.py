"""What a model takes beside the prompt: pictures to start from or to follow, masks, controls.

Pictures in files that belong together keep their places: masks, controls and depth maps are laid
over the picture that they belong to, whatever their own size, and the same central
rectangle is cut out of all.
"""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from diffusion_jax.data.images import read_pixels
from diffusion_jax.errors import UserError
from diffusion_jax.pipelines.conditioners import Editing, Spec

OPTIONS = {
  'images': '--image', 'masks': '--mask', 'control': '--control', 'depth': '--depth',
  'small': '--small', 'reference': '--reference',
}
"""The pictures among `Inputs`, and how the command `sample` is given them."""
STRENGTH = 0.8
"""Fraction of the steps that starting from a picture takes, if nothing else is said."""


@dataclasses.dataclass(frozen=True)
class Inputs:
  """Arrays of one picture for each prompt, or of one for all.

  images: uint8 [n H W 3]: what to start from (Meng et al. 2022, SDEdit), to repaint or to edit.
  strength: fraction of the steps in (0, 1] that starting from an image takes; None: 1 for a
  model that is shown the image itself, else STRENGTH.
  masks: bool [n H W], true where an inpainting model paints.
  control: uint8 [n H W 3], what a ControlNet sees, with control_strength.
  depth: float32 [n h w] in [-1, 1], near is 1, at the size of z.
  small: uint8 [n h w 3], to enlarge, at the size of z, with noise_level in [0, 350].
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

  def fraction(self, model) -> float:
    """Fraction of the steps that are taken."""
    if self.strength is not None:
      return self.strength
    shown = 'images' in picture_specs(model, *model.trained_size)
    return 1.0 if self.images is None or shown else STRENGTH

  def rows(self, model, n: int, height: int, width: int) -> dict[str, np.ndarray]:
    """Columns [n ...] for the compiled program; UserError where they do not fit the model."""
    needs = picture_specs(model, height, width)
    given = {
      name: getattr(self, name) for name in OPTIONS if getattr(self, name) is not None
    }
    for name in sorted(needs.keys() - given.keys()):
      raise UserError(
        f'the model needs {name} beside the prompts; give {OPTIONS[name]}, in code '
        f'Inputs({name}=...).'
      )
    for name in given.keys() - needs.keys() - {'images'}:
      raise UserError(
        f'the model takes no {name}; leave {OPTIONS[name]} out, or use a model that does.'
      )
    specs = {'images': ((height, width, 3), np.uint8)} | needs
    out = {name: _fitting(name, value, *specs[name], n) for name, value in given.items()}
    if 'images' in out and ('images' not in needs or self.fraction(model) < 1):
      out['start'] = out['images']
    if 'small' in given and self.small_noise is not None:
      out['small_noise'] = _fitting('small_noise', self.small_noise, specs['small'][0],
                                    np.float32, n)
    return out


def picture_specs(model, height: int, width: int) -> dict[str, Spec]:
  """The pictures that all conditioners of a model take, with shape and type."""
  parts = [c.pictures(model.space, height, width) for c in model.conditioners.values()]
  return {name: spec for part in parts for name, spec in part.items()}


def _fitting(
  name: str, value: np.ndarray, shape: tuple[int, ...], dtype: type, n: int
) -> np.ndarray:
  if value.dtype != dtype or value.shape[1:] != shape or len(value) not in (1, n):
    raise UserError(
      f'{name} are {value.dtype} {list(value.shape)}; give {np.dtype(dtype)} [1 or {n}, '
      f'{", ".join(map(str, shape))}].'
    )
  return np.broadcast_to(value, (n, *shape))


def check_edited(model, image_guidance: float) -> None:
  """UserError for guidance by a picture in a model that edits none."""
  edits = any(isinstance(c, Editing) for c in model.conditioners.values())
  if image_guidance != 1 and not edits:
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


def read_pictures(
  files: Mapping[str, str | Path], sizes: Mapping[str, tuple[int, int]]
) -> Pictures:
  """Reads pictures that belong together.

  Masks paint where they are white: shrunk or enlarged with Lanczos' filter and cut at half, as
  diffusers does it. Depth maps fill the range from -1 to 1.

  Args:
    files: 'image', 'mask', 'control', 'depth', 'small' and 'reference', those that there are.
    sizes: of each the (height, width) in pixels that the model takes.

  Raises:
    UserError: one that cannot be read, or a mask that paints nothing of what is cut out.
  """
  frame = next((name for name in FRAMES if name in files), None)
  arrays, notes, found = {}, [], {}
  for name in sorted(files, key=lambda name: name != frame):
    pixels = read_pixels(files[name], background='black' if name in ON_BLACK else 'white')
    own = found[name] = pixels.shape[:2]
    frame_size = own if name == ALONE else found[frame]
    if _ratio(own, frame_size) > STRETCHED:
      notes.append(
        f'{files[name]} is {own[1]} x {own[0]} pixels, {files[frame]} '
        f'{frame_size[1]} x {frame_size[0]}; it is stretched to lie over it.'
      )
    kind = Image.Resampling.LANCZOS if name == 'mask' else Image.Resampling.BICUBIC
    arrays[name] = central_crop(pixels, frame_size, sizes[name], kind)[None]
  if 'mask' in arrays:
    arrays['masks'], said = _painted(arrays.pop('mask'), files['mask'])
    notes += said
  if 'image' in arrays:
    arrays['images'] = arrays.pop('image')
  if 'depth' in arrays:
    arrays['depth'] = _filling(arrays['depth'].mean(axis=-1))
  return Pictures(arrays, notes)


def central_crop(
  pixels: np.ndarray, frame: tuple[int, int], size: tuple[int, int],
  filtered: Image.Resampling = Image.Resampling.BICUBIC,
) -> np.ndarray:
  """The middle of a frame (height, width), in the shape of `size`, out of a picture laid over it.

  Args:
    pixels: uint8 [h w 3].

  Returns:
    uint8 [*size 3].
  """
  height, width = size
  wide = frame[0] * width <= frame[1] * height
  sides = (frame[0], frame[0] * width / height) if wide else (frame[1] * height / width, frame[1])
  lows = [(whole - side) // 2 for whole, side in zip(frame, sides, strict=True)]
  scales = [own / whole for own, whole in zip(pixels.shape, frame, strict=False)]
  top, left = (low * scale for low, scale in zip(lows, scales, strict=True))
  bottom, right = (
    (low + side) * scale for low, side, scale in zip(lows, sides, scales, strict=True)
  )
  y, x = math.floor(top), math.floor(left)
  # Cut first, so that nothing beyond the rectangle shows in it.
  cut = Image.fromarray(pixels[y : math.ceil(bottom), x : math.ceil(right)])
  box = (left - x, top - y, min(right - x, cut.width), min(bottom - y, cut.height))
  return np.asarray(cut.resize((width, height), filtered, box))


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
      f'the mask {file} paints nothing of the middle that is cut out; make white and opaque what '
      'is to be painted.'
    )
  said = f'the mask {file} paints everything, so that nothing of the picture is kept.'
  return painted, [said] * bool(painted.all())


def _filling(depth: np.ndarray) -> np.ndarray:
  """float32 in [-1, 1]: models of depth were shown maps that fill the range."""
  low, high = depth.min(), max(depth.max(), depth.min() + 1)
  return (2 * (depth - low) / (high - low) - 1).astype(np.float32)
