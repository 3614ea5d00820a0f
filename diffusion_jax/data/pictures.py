"""Pictures in files that belong together.

Masks, controls and depth maps are resized to their picture, whatever their own size, and the same
central rectangle is cropped from all.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from diffusion_jax.data.images import read_pixels, read_size
from diffusion_jax.errors import UserError
from diffusion_jax.pixels import central_crop

FRAMES = ('image', 'small', 'control', 'depth', 'mask')
"""The first of these that is given is laid out by itself, the others over it."""
ALONE = 'reference'
"""A picture whose places mean nothing to the one that is sampled."""
ON_BLACK = ('mask', 'control', 'depth')
"""Transparent places of these are black: not painted, not drawn, far away; of others, white."""
STRETCHED = 1.05
"""Ratio of two shapes from which on a note says that one of them is stretched."""


class Pictures(NamedTuple):
  """arrays: arguments of `pipelines.inputs.Inputs`; notes: sentences for people."""

  arrays: dict[str, np.ndarray]
  notes: list[str]


def frame_size(files: Mapping[str, str | Path]) -> tuple[int, int] | None:
  """Return (height, width) of the picture that the others are laid over; None without one."""
  frame = next((name for name in FRAMES if name in files), None)
  return frame and read_size(files[frame])


def read_pictures(
  files: Mapping[str, str | Path], sizes: Mapping[str, tuple[int, int]]
) -> Pictures:
  """Read pictures that belong together: 'image', 'mask', 'control', 'depth', 'small', 'reference'.

  Masks paint where they are white: resized with Lanczos' filter and thresholded at half, as in
  diffusers. Depth maps are scaled to [-1, 1]. sizes: of each the model's (height, width) in pixels.
  UserError: an unreadable one, or a mask that paints nothing of the crop.
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


def _ratio(a: tuple[int, int], b: tuple[int, int]) -> float:
  """The ratio of two aspect ratios, at least 1."""
  ratio = a[1] * b[0] / (a[0] * b[1])
  return max(ratio, 1 / ratio)


def _painted(pixels: np.ndarray, file: str | Path) -> tuple[np.ndarray, list[str]]:
  """bool [1 h w], true where uint8 [1 h w 3] is white, and warnings."""
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
