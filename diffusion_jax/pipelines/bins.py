"""Sizes of one area and many aspects, at which PixArt was trained (Chen et al. 2023, sec. 2.4).

A picture of another size is drawn at the nearest of them and cut out of that. The sizes are those
of Stable Diffusion XL (Podell et al. 2023, appendix I), of which PixArt leaves out some below 2048.
"""

import functools

import jax

from diffusion_jax.types import Images

PIXELS = 8
"""Pixels of an edge to one place of the latents of PixArt's autoencoder."""
EDGES = (256, 512, 1024, 2048)
PARTS = 16
"""Edges are multiples of a square's edge over this."""
LEAST = 0.9
"""Fraction of the square's area that all of them have at least."""
NEVER = {(21, 11)}
"""In parts, what the rule gives and the published tables do not have ..."""
LARGEST_ALONE = {(8, 31), (8, 30), (26, 9), (28, 9), (29, 8), (30, 8), (31, 8)}
"""... and what only the table of the largest edge has."""


@functools.cache
def bins(edge: int) -> dict[float, tuple[int, int]]:
  """Return (height, width) by their ratio, which is rounded to hundredths, from wide to high."""
  left_out = NEVER | (set() if edge == EDGES[-1] else LARGEST_ALONE)
  step, whole = edge // PARTS, PARTS**2
  sizes = [
    (h, w) for h in range(PARTS // 2, 2 * PARTS + 1) for w in range(PARTS // 2, 2 * PARTS + 1)
    if LEAST * whole <= h * w <= whole and (h, w) not in left_out
  ]
  sizes.sort(key=lambda size: size[0] / size[1])
  return {round(h / w, 2): (h * step, w * step) for h, w in sizes}


def nearest_bin(height: int, width: int, places: object) -> tuple[int, int]:
  """Return the size to draw height x width pixels at; itself where there are no bins.

  Args:
    places: edge of the latents of training.
  """
  edge = PIXELS * places if isinstance(places, int) else 0
  if edge not in EDGES:
    return height, width
  ratios = bins(edge)
  return ratios[min(ratios, key=lambda ratio: abs(ratio - height / width))]


def cut_out(images: Images, height: int, width: int) -> Images:
  """Scale images [b h w 3] until they cover a size, bilinearly, and return the middle."""
  b, h, w, c = images.shape
  if (h, w) == (height, width):
    return images
  ratio = max(height / h, width / w)
  rows, columns = max(int(h * ratio), height), max(int(w * ratio), width)  # Whatever rounds down.
  scaled = jax.image.resize(images, (b, rows, columns, c), 'linear', antialias=False)
  top, left = (rows - height) // 2, (columns - width) // 2
  return scaled[:, top : top + height, left : left + width]
