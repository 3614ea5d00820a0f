"""Judge whether a picture of 'blue circle' is one: its colour and its shape, by rules.

A figure is what stands before a light background that reaches the border. Its shape is that of
`SHAPES` with which it overlaps most (intersection over union) once its bounding box is stretched to
theirs, at least LIKE; its colour is told by hue, saturation and value of its inside, without the
outline.

  python -m benchmarks.shapes --model asset:text-to-image-openmoji-64
"""

import argparse
import colorsys
import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from scipy import ndimage

from benchmarks.command import run_command
from diffusion_jax.files import atomic_write
from diffusion_jax.session import Session
from diffusion_jax.viz.grids import make_grid, save_png

DESCRIPTION = __doc__
COLOURS = ('red', 'orange', 'yellow', 'green', 'blue', 'purple')
PROMPTS = (
  *(f'{colour} {shape}' for shape in ('circle', 'square', 'heart') for colour in COLOURS),
  'blue diamond', 'red triangle',
)
"""Twenty, chosen before any was drawn."""
EDGE, LIKE, LIGHT = 64, 0.8, 235
"""Of masks; the least overlap with a shape; the least of all channels of a background."""
HUES = ((15, 'red'), (46, 'orange'), (66, 'yellow'), (170, 'green'), (250, 'blue'), (330, 'purple'))
"""Upper bounds in degrees; red again above the last."""
_EDGES = {
  'square': ((0, 0), (1, 0), (1, 1), (0, 1)),
  'diamond': ((0.5, 0), (1, 0.5), (0.5, 1), (0, 0.5)),
  'triangle': ((0.5, 0), (1, 1), (0, 1)),
  'triangle pointed down': ((0, 0), (1, 0), (0.5, 1)),
}


def _heart() -> tuple[tuple[float, float], ...]:
  """Two circles side by side and the tangents that meet below, within a unit square."""
  t = np.linspace(0, 2 * np.pi, 200, endpoint=False)
  x = 16 * np.sin(t) ** 3
  y = -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t))
  x, y = ((v - v.min()) / (v.max() - v.min()) for v in (x, y))
  return tuple(zip(x, y, strict=True))


def _mask(points: tuple[tuple[float, float], ...] | None) -> np.ndarray:
  """Return a filled polygon of a unit square, or the ellipse of None, as bool [EDGE EDGE]."""
  image = Image.new('1', (EDGE, EDGE))
  draw, last = ImageDraw.Draw(image), EDGE - 1
  if points is None:
    draw.ellipse((0, 0, last, last), fill=1)
  else:
    draw.polygon([(x * last, y * last) for x, y in points], fill=1)
  return np.asarray(image)


SHAPES = {
  'circle': _mask(None), 'heart': _mask(_heart()),
  **{name: _mask(points) for name, points in _EDGES.items()},
}


def figure(image: np.ndarray) -> np.ndarray:
  """Return where the largest figure of a picture, uint8 [h w 3], is, holes filled; bool [h w]."""
  light = (image >= LIGHT).all(axis=-1)
  border = np.zeros_like(light)
  border[[0, -1], :] = border[:, [0, -1]] = True
  background = ndimage.binary_propagation(border & light, mask=light)
  labels, count = ndimage.label(~background)
  if not count:
    return np.zeros_like(light)
  sizes = np.bincount(labels.ravel())
  return labels == 1 + sizes[1:].argmax()


def overlaps(mask: np.ndarray) -> dict[str, float]:
  """Return the overlap of a figure, stretched to the shapes' box, with each shape, in [0, 1]."""
  if not mask.any():
    return dict.fromkeys(SHAPES, 0.0)
  rows, columns = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
  part = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
  if not 2 / 3 <= part.shape[0] / part.shape[1] <= 3 / 2:
    return dict.fromkeys(SHAPES, 0.0)
  own = np.asarray(Image.fromarray(part).resize((EDGE, EDGE)))
  return {name: float((own & one).sum() / (own | one).sum()) for name, one in SHAPES.items()}


def shape_of(mask: np.ndarray) -> str:
  """Return the shape of a figure, '' for none of `SHAPES`."""
  found = overlaps(mask)
  best = max(found, key=found.get)
  return best if found[best] >= LIKE else ''


def colour_of(image: np.ndarray, mask: np.ndarray) -> str:
  """Return the colour inside a figure, '' for one that is not among COLOURS, such as brown."""
  inside = ndimage.binary_erosion(mask, iterations=max(1, image.shape[0] // 16))
  if not inside.any():
    return ''
  red, green, blue = np.median(image[inside], axis=0) / 255
  hue, saturation, value = colorsys.rgb_to_hsv(red, green, blue)
  name = next((name for bound, name in HUES if 360 * hue < bound), 'red')
  brown = name == 'orange' and value < 0.8
  return '' if brown or saturation < 0.2 or value < 0.35 else name


def judged(image: np.ndarray) -> str:
  """Return 'blue circle' for a picture, uint8 [h w 3], of one; what cannot be told is '?'."""
  mask = figure(image)
  return f'{colour_of(image, mask) or "?"} {shape_of(mask) or "?"}'


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Which model draws, and where its pictures and the judgement go."""
  parser.add_argument('--model', required=True, help='a directory, or a name of the package')
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument('--out', type=Path, help='file for the judgement (.json), a grid beside it')


def run(args: argparse.Namespace) -> int:
  """Draw PROMPTS and judge what comes."""
  session = Session.open(model=args.model)
  drawn = session.sample(PROMPTS, seed=args.seed, batch=len(PROMPTS))
  images = np.stack([image for image, _ in drawn])
  found = [judged(image) for image in images]
  right = sum(own == prompt for own, prompt in zip(found, PROMPTS, strict=True))
  for prompt, own in zip(PROMPTS, found, strict=True):
    print(f'{prompt:16} {own}')
  print(f'{right} of {len(PROMPTS)} have the right colour and shape')
  if args.out:
    report = {'model': args.model, 'seed': args.seed, 'right': right, 'of': len(PROMPTS)}
    report['judged'] = dict(zip(PROMPTS, found, strict=True))
    with atomic_write(args.out) as file:
      file.write((json.dumps(report, indent=1) + '\n').encode())
    captions = [f'{prompt}: {own}' for prompt, own in zip(PROMPTS, found, strict=True)]
    save_png(make_grid(images, columns=6, captions=captions), args.out.with_suffix('.png'), {})
  return 0


if __name__ == '__main__':
  raise SystemExit(run_command('benchmarks.shapes', sys.modules[__name__]))
