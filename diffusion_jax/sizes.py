"""Lists of sizes of pictures, for batches that each have one."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from diffusion_jax.errors import UserError
from diffusion_jax.limits import MOST_EDGE, Count, Positive, Range

Shape = tuple[int, int]
"""(height, width) in pixels."""

_WIDTHS = (
  (512, (2048, 1984, 1920, 1856)), (576, (1792, 1728, 1664)), (640, (1600, 1536)),
  (704, (1472, 1408, 1344)), (768, (1344, 1280)), (832, (1216, 1152)), (896, (1152, 1088)),
  (960, (1088, 1024)),
)
_UPRIGHT = tuple((short, long) for short, row in _WIDTHS for long in row)
_TALL = tuple(shape[::-1] for shape in reversed(_UPRIGHT) if shape != (704, 1344))
SDXL: tuple[Shape, ...] = (*_UPRIGHT, (1024, 1024), *_TALL)
"""The 40 sizes of SDXL's training (Podell et al. 2023, appendix I); 1344 x 704 is none of them."""

LISTS = {'sdxl': SDXL}


@dataclasses.dataclass(frozen=True)
class BucketSizes:
  """A list of sizes by its name, or one that is made.

  area: pixels of the largest; each size is as large as that allows. step: of what heights and
  widths are multiples. ratio: the largest of the longer to the shorter edge. most: sizes at most,
  then spread evenly over the ratios.
  """

  buckets: Literal['', 'sdxl'] = ''
  area: Count = 0
  step: Positive = 64
  ratio: Annotated[float, Range(1)] = 2.0
  most: Positive = 40

  def __post_init__(self):
    made = {field.name for field in dataclasses.fields(self) if field.name != 'buckets'}
    if self.buckets:
      for name in sorted(made):
        if getattr(self, name) != getattr(type(self), name):
          raise UserError(
            f'data.size.{name} has no effect on the list {self.buckets!r}; leave out one of them.'
          )
    elif not self.area:
      raise UserError(
        "data.size has neither buckets nor area; give {'buckets': 'sdxl'}, or the area of made "
        "sizes in pixels, such as {'area': 1048576}."
      )
    elif not 1 <= self.step <= math.isqrt(self.area) <= MOST_EDGE:
      raise UserError(
        f'data.size.area is {self.area}; give the pixels of sizes that are multiples of '
        f'{self.step}, from {self.step**2} to {MOST_EDGE**2}.'
      )

  def __str__(self) -> str:
    fields = {field.name: field.default for field in dataclasses.fields(self)}
    return str({name: getattr(self, name) for name, usual in fields.items()
                if getattr(self, name) != usual})

  @property
  def shapes(self) -> tuple[Shape, ...]:
    """The sizes, from the widest to the tallest."""
    if self.buckets:
      return LISTS[self.buckets]
    return spread(made_shapes(self.area, self.step, self.ratio), self.most)


def made_shapes(area: int, step: int, ratio: float) -> tuple[Shape, ...]:
  """Return each height that is a multiple of `step` with its largest width within the area, and
  each width with its largest height, up to a ratio of edges; from the widest to the tallest."""
  found = set()
  for edge in range(step, min(area // step, MOST_EDGE) + 1, step):
    other = area // edge // step * step
    if step <= other <= MOST_EDGE and max(edge, other) <= min(edge, other) * ratio:
      found |= {(edge, other), (other, edge)}
  return tuple(sorted(found, key=lambda shape: (shape[0] / shape[1], shape)))


def spread(shapes: tuple[Shape, ...], most: int) -> tuple[Shape, ...]:
  """Return at most so many of sizes that are sorted by ratio: the squarest, the others evenly."""
  if len(shapes) <= most:
    return shapes
  middle, last = shapes.index(nearest_to_square(shapes)), len(shapes) - 1
  before = min(middle, (most - 1) // 2)
  after = min(last - middle, most - 1 - before)
  before = min(middle, most - 1 - after)
  chosen = {middle, *(round(i * middle / before) for i in range(before))}
  chosen |= {last - round(i * (last - middle) / after) for i in range(after)}
  return tuple(shapes[i] for i in sorted(chosen))


def nearest_to_square(shapes: tuple[Shape, ...]) -> Shape:
  """Return the size whose edges differ least in ratio; of several the largest, then the first."""
  return min(shapes, key=lambda shape: (max(shape) / min(shape), -shape[0] * shape[1]))


def scored_at(shapes: tuple[Shape, ...]) -> tuple[str, ...]:
  """Return a sentence on the size of scores, () where all pictures have that."""
  if len(shapes) == 1:
    return ()
  height, width = nearest_to_square(shapes)
  return (
    f'Of the {len(shapes)} sizes of data.size, scores are of the one nearest to a square: all '
    f'pictures are cut to {height} x {width} pixels.',
  )


def shapes_of(size: Any) -> tuple[Shape, ...]:
  """Return the sizes that a `data.size` stands for, also one that has been read from JSON."""
  if isinstance(size, int):
    return ((size, size),)
  if isinstance(size, (Mapping, BucketSizes)):
    return (BucketSizes(**size) if isinstance(size, Mapping) else size).shapes
  one = all(isinstance(edge, int) for edge in size)
  return (tuple(size),) if one else tuple(map(tuple, size))
