"""Transforms of a record between its source and its batch; the table TRANSFORMS names them.

Each is a frozen dataclass, called as f(record) or, if random, f(record, rng), that returns another
record. Images are uint8 [h, w, c] in [0, 255] until `normalize`. All PICTURES of a record move
together.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np

from diffusion_jax.errors import UserError
from diffusion_jax.pixels import edges, resize, to_float
from diffusion_jax.registry import TRANSFORMS, build_parts, load

_SIDED = re.compile(r'\b(?:left|right|leftwards|rightwards|clockwise|counterclockwise)\b', re.I)

@functools.cache
def _any_of(words: tuple[str, ...]) -> re.Pattern:
  """A pattern of whole words, in letters of any size."""
  return re.compile(rf'(?<!\w)(?:{"|".join(map(re.escape, words))})(?!\w)', re.I)


Size = int | tuple[int, int]
"""Edge of a square in pixels, or (height, width)."""

PICTURES = ('image', 'control')
"""Fields of a record that show the same places."""


SIZES, FRAME = 'sizes', 'frame'
"""Fields of what SDXL is told of a picture (`sources.pictures.PictureSource`), and of the height
and width, float32 [2], of all of the picture as it is scaled, of which the image is a part."""


class Cut(NamedTuple):
  """How an image was changed: top, left: of what was cut out, in its pixels. scale: then of both
  edges. size: then its (height, width); None as it was."""

  top: int = 0
  left: int = 0
  scale: tuple[float, float] = (1.0, 1.0)
  size: tuple[int, int] | None = None


MIRROR = Cut(-1)
"""That an image was mirrored left to right."""


class Transform:
  """random: whether it is called with a random generator, too. moves: whether it changes nothing
  but the pictures, so that what a network makes of them can be kept."""

  random: ClassVar[bool] = False
  moves: ClassVar[bool] = False


@dataclasses.dataclass(frozen=True)
class Resize(Transform):
  """Scale the image so that it just covers the size: of a square, so that its shorter edge is
  `size` pixels; bicubic, with antialiasing."""

  size: Size
  moves: ClassVar[bool] = True

  def __call__(self, record: dict) -> dict:
    image = _image(record)
    height, width = image.shape[:2]
    h, w = _pair(self.size)
    scale = max(h / height, w / width)
    height, width = round(height * scale), round(width * scale)
    scales = height / image.shape[0], width / image.shape[1]
    cut = Cut(scale=scales, size=(height, width))
    return _moved(record, lambda picture: resize(picture, height, width), cut)


@dataclasses.dataclass(frozen=True)
class CenterCrop(Transform):
  """Cut the central `size` x `size` pixels, or height x width."""

  size: Size
  moves: ClassVar[bool] = True

  def __call__(self, record: dict) -> dict:
    h, w = _pair(self.size)
    height, width = _at_least(_image(record), (h, w)).shape[:2]
    top, left = (height - h) // 2, (width - w) // 2
    return _moved(
      record, lambda picture: picture[top : top + h, left : left + w], Cut(top, left, size=(h, w))
    )


@dataclasses.dataclass(frozen=True)
class RandomCrop(Transform):
  """Pad every side by `padding` pixels of the border's colour, then cut `size` x `size` pixels, or
  height x width."""

  size: Size
  padding: int = 0
  random: ClassVar[bool] = True
  moves: ClassVar[bool] = True

  def __call__(self, record: dict, rng: np.random.Generator) -> dict:
    pad = (self.padding, self.padding)
    padded = lambda picture: np.pad(picture, (pad, pad, (0, 0)), mode='edge')
    h, w = _pair(self.size)
    height, width = _at_least(padded(_image(record)), (h, w)).shape[:2]
    top, left = int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1))
    rows, columns = slice(top, top + h), slice(left, left + w)
    cut = Cut(top - self.padding, left - self.padding, size=(h, w))
    return _moved(record, lambda picture: padded(picture)[rows, columns], cut)


@dataclasses.dataclass(frozen=True)
class RandomCut(Transform):
  """Cut 'cut', (height, width) of each record, out of its image, anywhere (`data.crop`)."""

  random: ClassVar[bool] = True
  moves: ClassVar[bool] = True

  def __call__(self, record: dict, rng: np.random.Generator) -> dict:
    rest = {name: value for name, value in record.items() if name != 'cut'}
    return RandomCrop(tuple(record['cut'].tolist()))(rest, rng)


@dataclasses.dataclass(frozen=True)
class RandomResizedCrop(Transform):
  """Cut a random rectangle and scale it to `size` x `size`, or height x width.

  scale: range of its area as a fraction of the image's. ratio: range of its width divided by its
  height, as a factor on that of the size, sampled uniformly in the logarithm.
  """

  size: Size
  scale: tuple[float, float] = (0.8, 1.0)
  ratio: tuple[float, float] = (1.0, 1.0)
  random: ClassVar[bool] = True
  moves: ClassVar[bool] = True

  def __post_init__(self):
    for name in ('scale', 'ratio'):
      low, high = getattr(self, name)
      if not 0 < low <= high or (name == 'scale' and high > 1):
        raise UserError(
          f'random_resized_crop cannot use {name}={(low, high)}: give 0 < low <= high'
          + (' <= 1.' if name == 'scale' else '.')
        )

  def __call__(self, record: dict, rng: np.random.Generator) -> dict:
    image = _image(record)
    height, width = image.shape[:2]
    area = rng.uniform(*self.scale) * height * width
    h, w = _pair(self.size)
    ratio = np.exp(rng.uniform(*np.log(self.ratio))) * w / h
    cut_h = min(height, max(1, round(np.sqrt(area / ratio))))
    cut_w = min(width, max(1, round(np.sqrt(area * ratio))))
    top, left = int(rng.integers(height - cut_h + 1)), int(rng.integers(width - cut_w + 1))
    rows, columns = slice(top, top + cut_h), slice(left, left + cut_w)
    return _moved(
      record, lambda picture: resize(picture[rows, columns], h, w),
      Cut(top, left, (h / cut_h, w / cut_w), (h, w)),
    )


@dataclasses.dataclass(frozen=True)
class RandomFlip(Transform):
  """Mirror left to right at random.

  keep_sided: not if captions mention left, right, clockwise. words: nor any of these, whole and in
  letters of any size.
  """

  probability: float = 0.5
  keep_sided: bool = True
  words: tuple[str, ...] = ()
  random: ClassVar[bool] = True
  moves: ClassVar[bool] = True

  def __call__(self, record: dict, rng: np.random.Generator) -> dict:
    _image(record)
    flip = rng.random() < self.probability  # Always, so that captions do not shift the rng.
    texts = [*record.get('captions', ()), record.get('caption', '')]
    if not flip or (self.keep_sided and any(map(_SIDED.search, texts))):
      return record
    if self.words and any(map(_any_of(tuple(self.words)).search, texts)):
      return record
    return _moved(record, lambda picture: np.ascontiguousarray(picture[:, ::-1]), MIRROR)


@dataclasses.dataclass(frozen=True)
class ChooseCaption(Transform):
  """Replace 'captions' by one of them, 'caption', each equally likely or by 'caption_weights'."""

  random: ClassVar[bool] = True

  def __call__(self, record: dict, rng: np.random.Generator) -> dict:
    captions = _captions(record)
    if weights := record.get('caption_weights'):
      return _with_caption(record, captions[weighted_choice(weights, rng)])
    return _with_caption(record, captions[int(rng.integers(len(captions)))])


@dataclasses.dataclass(frozen=True)
class FirstCaption(Transform):
  """Replace 'captions' by the canonical one, 'caption'."""

  def __call__(self, record: dict) -> dict:
    return _with_caption(record, _captions(record)[0])


@dataclasses.dataclass(frozen=True)
class Tokenize(Transform):
  """Turn 'caption' into 'tokens', int32 [l], and drop all texts, which devices cannot hold."""

  tokenizer: Callable[[str], np.ndarray]

  def __call__(self, record: dict) -> dict:
    if 'caption' not in record:
      raise UserError(
        'tokenize found no caption in the record: put choose_caption or first_caption before it.'
      )
    tokens = np.asarray(self.tokenizer(record['caption']), np.int32)
    return _without_texts(record) | {'tokens': tokens}


@dataclasses.dataclass(frozen=True)
class Label(Transform):
  """Turn 'label', a class by name, into its place among `classes`, int32 []; drop all texts."""

  classes: tuple[str, ...]

  def __call__(self, record: dict) -> dict:
    label = record.get('label')
    if label not in self.classes:
      raise UserError(
        f'Record {record.get("id", "?")} has the label {label!r}, which is none of the classes '
        f'{", ".join(self.classes)}.'
      )
    return _without_texts(record) | {'label': np.int32(self.classes.index(label))}


@dataclasses.dataclass(frozen=True)
class Normalize(Transform):
  """uint8 [0, 255] to float32 [-1, 1]."""

  def __call__(self, record: dict) -> dict:
    return record | {'image': to_float(_image(record))}


@dataclasses.dataclass(frozen=True)
class Edges(Transform):
  """Add 'control', the image's edges, uint8 [h w 3]; put it before `normalize`."""

  def __call__(self, record: dict) -> dict:
    return record | {'control': edges(_image(record))}


def build_transforms(specs: Iterable[Any], **context: Any) -> list[Callable]:
  """Return transforms as `registry.build_parts` makes them."""
  return build_parts(TRANSFORMS, specs, 'data.transforms', **context)


def apply(transforms: Iterable[Callable], record: dict, rng: np.random.Generator) -> dict:
  """Apply transforms in order; random ones use `rng`."""
  for transform in transforms:
    record = transform(record, rng) if transform.random else transform(record)
  return record


def check_transforms(specs: Any, size: Size) -> None:
  """Apply transforms to a blank image, as they will be to those of the data.

  UserError unless they give images of that size, and leave `edges` where they are.
  """
  made = build_transforms(specs, size=size, tokenizer=None, classes=())
  record = {'image': np.zeros((*_pair(size), 3), np.uint8), 'captions': ['a'], 'id': 'none'}
  rng, last, with_edges = np.random.default_rng(0), '', False
  for transform in made:
    if isinstance(transform, (Label, Tokenize)):
      continue
    before = record['image'].shape
    record = apply([transform], record, rng)
    name = _name_of(transform)
    moved = record['image'].shape != before
    last = name if moved else last
    if with_edges and (moved or isinstance(transform, RandomFlip) or hasattr(transform, 'size')):
      raise UserError(
        f'data.transforms have edges before {name}, which would move the picture away from them; '
        'put edges after it.'
      )
    with_edges = with_edges or isinstance(transform, Edges)
  height, width = record['image'].shape[:2]
  if (height, width) != _pair(size):
    raise UserError(
      f'data.size is {size}, but data.transforms make pictures of {height} x {width} pixels '
      f'({last}); leave out its size, which is then data.size, or set both alike.'
    )


def check_pictures(specs: Any, key: str, where: str = 'data.transforms') -> bool:
  """Return whether transforms, of the key `where`, draw random numbers. UserError, which names
  `key`, for any that do more than to move pictures."""
  made = build_transforms(specs, size=1, tokenizer=None, classes=())
  for transform in made:
    if not getattr(transform, 'moves', False):
      raise UserError(
        f'{where} have {_name_of(transform)}, which has no effect with {key}, that keeps '
        'pictures and texts encoded; leave it out, or switch the cache off.'
      )
  return any(transform.random for transform in made)


def _name_of(transform: Any) -> str:
  kind = type(transform)
  return next((name for name in TRANSFORMS if load(TRANSFORMS, name) is kind), kind.__name__)


def _image(record: Mapping[str, Any]) -> np.ndarray:
  """The record's image; UserError unless it is uint8 [h, w, c] with at least one pixel."""
  image = record.get('image')
  if image is None:
    raise UserError(f'The record has no image, only {", ".join(record)}: check its source.')
  if image.ndim != 3 or image.dtype != np.uint8 or 0 in image.shape:
    raise UserError(
      f'The image of record {record.get("id", "?")} is {image.dtype} {list(image.shape)}: '
      'give uint8 [height, width, channels], and put normalize last.'
    )
  return image


def _moved(record: dict, move: Callable[[np.ndarray], np.ndarray], cut: Cut) -> dict:
  """The record with all its pictures moved, and what it says of that; UserError unless all have the
  image's size."""
  found = {name: record[name] for name in PICTURES if name in record}
  for name, picture in found.items():
    if picture.shape[:2] != record['image'].shape[:2]:
      raise UserError(
        f'The {name} of record {record.get("id", "?")} is {list(picture.shape)} and its image '
        f'{list(record["image"].shape)}: give both alike.'
      )
  return record | {name: move(picture) for name, picture in found.items()} | _told(record, cut)


def whole(image: np.ndarray) -> np.ndarray:
  """What SDXL is told of an image that was not cut out of a larger one, float32 [6]."""
  return np.asarray((*image.shape[:2], 0, 0, *image.shape[:2]), np.float32)


def _told(record: Mapping[str, Any], cut: Cut) -> dict[str, np.ndarray]:
  """What SDXL is told of a picture after a cut: where it lies in all of the scaled picture."""
  if SIZES not in record:
    return {}
  own, corner, size = np.asarray(record[SIZES], np.float64).reshape(3, 2)
  frame = record[FRAME] if FRAME in record else np.round(own * (size / own).max())
  if cut is MIRROR:
    corner = np.array([corner[0], frame[1] - corner[1] - size[1]])
  else:
    scale = np.asarray(cut.scale)
    corner, frame = (corner + np.array([cut.top, cut.left])) * scale, frame * scale
    size = np.asarray(cut.size, np.float64)
  told = np.concatenate([own, np.round(corner), size])
  return {SIZES: told.astype(np.float32), FRAME: np.asarray(frame, np.float32)}


def _pair(size: Size) -> tuple[int, int]:
  height, width = (size, size) if isinstance(size, int) else size
  return height, width


def _at_least(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
  height, width = image.shape[:2]
  if height < size[0] or width < size[1]:
    raise UserError(
      f'Cannot cut {size[0]} x {size[1]} pixels from an image of {height} x {width}: put resize '
      'before.'
    )
  return image


def _captions(record: Mapping[str, Any]) -> list[str]:
  captions = record.get('captions')
  if not captions:
    raise UserError(f'Record {record.get("id", "?")} has no captions: check its source.')
  return captions


def _with_caption(record: dict, caption: str) -> dict:
  kept = {k: value for k, value in record.items() if k not in ('captions', 'caption_weights')}
  return kept | {'caption': caption}


def weighted_choice(weights: Sequence[float], rng: np.random.Generator) -> int:
  """A number below len(weights), each as likely as its weight."""
  ends = np.cumsum(weights)
  return int(min(np.searchsorted(ends, rng.random() * ends[-1], side='right'), len(weights) - 1))


def _without_texts(record: dict) -> dict:
  texts = lambda value: isinstance(value, (str, list))
  return {name: value for name, value in record.items() if not texts(value)}
