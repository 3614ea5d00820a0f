"""Extract features of images by several networks: in pieces on a disk, or batch after batch.

Each process works on its own pieces with its own devices: none waits for another, and a lost
process costs only its time. While devices compute one piece, the next one's images are read or
sampled and the last is written. Batches are for all processes together; if means and covariances
suffice, features are summed on the devices in the same program.
"""

import concurrent.futures
import dataclasses
import functools
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import UInt8
from PIL import Image, ImageOps
from tqdm import tqdm

from diffusion_jax.backend.xla import jit
from diffusion_jax.errors import UserError
from diffusion_jax.evaluation.extractors import Extractor, compiled
from diffusion_jax.evaluation.extractors.resize import resize_on_host
from diffusion_jax.evaluation.images import ImageSet
from diffusion_jax.evaluation.metrics.metric import sums_suffice
from diffusion_jax.evaluation.pieces import EACH, EDGES, ERRORS, THUMBNAILS, Chunks, Made
from diffusion_jax.evaluation.statistics import (
  PART,
  DeviceStatistics,
  Statistics,
  collect,
  empty,
  update,
)
from diffusion_jax.parallel.mesh import in_batches
from diffusion_jax.parallel.processes import heartbeat
from diffusion_jax.types import Params

MOST_SHAPES = 4
"""Shapes of images for which a program is compiled; images of others are resized on the host."""
THUMBNAIL = 96
"""Edge in pixels of the small pictures that a page shows."""
MOST_THUMBNAILS = 20_000
"""Half a gigabyte; of larger works none are kept."""
READERS = 4


Images = UInt8[np.ndarray, 'b h w 3']


@dataclasses.dataclass(frozen=True, eq=False)
class Features:
  """Features of a set of images.

  columns: name -> float32 [n d] of the readable images, perhaps memory-mapped. rows: their numbers.
  errors: a sentence for each of the others. each: name -> values of those images, [n]. edge: median
  shorter edge in pixels, if known. sums: of columns, also of some that are not kept.
  """

  columns: dict[str, np.ndarray]
  rows: np.ndarray
  errors: list[str]
  each: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
  edge: float | None = None
  sums: dict[str, Statistics] = dataclasses.field(default_factory=dict)

  def statistics(self, column: str) -> Statistics:
    """Return the sums of a column, which is read once."""
    if column not in self.sums:
      self.sums[column] = Statistics.from_features(self.columns[column])
    return self.sums[column]


class Extraction:
  """Features of images by several extractors at once.

  A call computes a piece, on a mesh of this process's devices; `collect` images in batches, on a
  mesh of all processes. batch_size: of the networks; rounded up to a multiple of the devices that
  split a batch. metrics: of `collect`; if means and covariances suffice, features are summed on the
  devices.
  """

  def __init__(
    self, extractors: Sequence[Extractor], mesh: Mesh, batch_size: int = 32,
    metrics: Sequence[str] = (),
  ):
    names = [extractor.name for extractor in extractors]
    if len(set(names)) < len(names):
      raise UserError(f'features are named twice: {", ".join(sorted(names))}; name each once.')
    ways = mesh.shape['data'] * mesh.shape['fsdp']
    self.extractors, self.mesh = list(extractors), mesh
    self.batch_size = -(-batch_size // ways) * ways
    self._apply = {extractor.name: compiled(extractor) for extractor in extractors}
    self._shapes: set[tuple[int, ...]] = set()
    self._summed = {
      e.name: [o for o in e.widths if metrics and sums_suffice(metrics, column(e, o))]
      for e in extractors
    }
    self._steps = {extractor.name: self._step(extractor) for extractor in extractors}

  @property
  def columns(self) -> dict[str, int]:
    """Name of each kind of features -> its width."""
    return {
      column(extractor, output): width
      for extractor in self.extractors for output, width in extractor.widths.items()
    }

  @functools.cached_property
  def plan(self) -> dict[str, Any]:
    """Names of the features and checksums of the weights, JSON-ready."""
    return {'features': sorted(self.columns), 'weights': {
      extractor.name: f'{checksum(extractor.params):08x}' for extractor in self.extractors
    }}

  def __call__(self, images: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
    """Return float32 [n d] by column, of images uint8 [h w 3] of any sizes."""
    if not images:
      return {name: np.zeros((0, width), np.float32) for name, width in self.columns.items()}
    whole = self._stacked(images)
    found = {}
    for extractor in self.extractors:
      x = whole if whole is not None else np.stack([
        resize_on_host(image, extractor.size, extractor.resizing) for image in images
      ])
      batches = list(in_batches(
        self._apply[extractor.name], extractor.params, x, mesh=self.mesh,
        batch_size=self.batch_size,
      ))
      for output in extractor.widths:
        found[column(extractor, output)] = np.concatenate([batch[output] for batch in batches])
    return found

  def _stacked(self, images: Sequence[np.ndarray]) -> np.ndarray | None:
    """All in one array, to be resized on the device; None where their shapes are too many."""
    shapes = {image.shape for image in images}
    if len(shapes) > 1 or len(self._shapes | shapes) > MOST_SHAPES:
      return None
    self._shapes |= shapes
    return np.stack(images)

  def _step(self, extractor: Extractor):
    """Return a jitted (params, sums, images, numbers) -> (sums, features of the other outputs)."""

    def step(params, sums: dict[str, DeviceStatistics], images: jax.Array, numbers: jax.Array):
      found = extractor.apply(params, images)
      valid = jnp.diff(numbers, prepend=-1) > 0  # Padding repeats the last row with its number.
      sums = {o: update(sums[o], found.pop(o), valid, mesh=self.mesh) for o in sums}
      return sums, found

    return jit(step, donate_argnums=1)

  def collect(self, batches: Iterable[Images]) -> Features:
    """Features or sums of all images for the metrics, in memory; all processes call it alike.

    UserError where sums are not finite.
    """
    sums = {
      e.name: {o: empty(e.widths[o], self.mesh) for o in self._summed[e.name]}
      for e in self.extractors
    }
    kept: dict[str, list[np.ndarray]] = {name: [] for name in self.columns}
    count = 0
    for images in regrouped(batches, self.batch_size):
      count += len(images)
      for extractor in self.extractors:
        for output, rows in self._kept(extractor, sums, images).items():
          kept[column(extractor, output)].append(rows)
    return Features(
      {name: np.concatenate(parts) for name, parts in kept.items() if parts}, np.arange(count), [],
      sums={
        column(e, output): collect(state, mesh=self.mesh)
        for e in self.extractors for output, state in sums[e.name].items()
      },
    )

  def _kept(self, extractor: Extractor, sums: dict, images: Images) -> dict[str, np.ndarray]:
    """Features of one batch that are kept; `sums` are brought up to date."""

    def run(params, *arrays):
      found = self._steps[extractor.name](params, sums[extractor.name], *arrays)
      sums[extractor.name], rows = found
      return rows or jax.block_until_ready(found)[1]  # Or batches would pile up.

    (rows,) = in_batches(
      run, extractor.params, images, np.arange(len(images), dtype=np.int32), mesh=self.mesh,
      batch_size=self.batch_size,
    )
    return rows


def checksum(params: Params) -> int:
  """Return CRC-32 of all arrays, for files of other weights may have the same name."""
  found = 0
  for leaf in jax.tree.leaves(params):
    found = zlib.crc32(np.ascontiguousarray(leaf).view(np.uint8), found)
  return found


def column(extractor: Extractor, output: str) -> str:
  """Return the name under which an extractor's output is kept."""
  return f'{extractor.name}:{output}'


def extract(
  chunks: Chunks, make: Callable[[range], Made], extraction: Extraction, *,
  missing: Sequence[int] | None = None, keep: Callable[[range, Made], None] | None = None,
  label: str = '',
) -> None:
  """Make the missing pieces of this process.

  make: the images of those items; called one piece ahead, in a thread. missing: pieces to make, if
  known. keep: called in a thread with a piece's images before its features are saved. label: of the
  progress bar; '' for none.
  """
  missing = chunks.missing() if missing is None else missing
  done = sum(len(chunks.items(i)) for i in missing)
  with (
    concurrent.futures.ThreadPoolExecutor(1) as ahead,
    concurrent.futures.ThreadPoolExecutor(1) as behind,
    tqdm(total=done, unit='img', desc=label, disable=not label, leave=False) as bar,
  ):
    for index, made in _one_ahead(ahead, make, chunks, missing):
      kept = behind.submit(keep, chunks.items(index), made) if keep else None
      arrays = _features(extraction, made)
      if chunks.total <= MOST_THUMBNAILS:
        arrays[THUMBNAILS] = np.stack([_thumbnail(image) for image in made.images])
      if kept:
        kept.result()
      chunks.save(index, arrays)
      heartbeat()
      bar.update(len(made.images))


def _one_ahead(
  pool: concurrent.futures.Executor, make: Callable, chunks: Chunks, missing: Sequence[int]
) -> Iterator[tuple[int, Made]]:
  following = pool.submit(make, chunks.items(missing[0])) if missing else None
  for place, index in enumerate(missing):
    made = following.result()
    if place + 1 < len(missing):
      following = pool.submit(make, chunks.items(missing[place + 1]))
    yield index, made


def _features(extraction: Extraction, made: Made) -> dict[str, np.ndarray]:
  """Rows of images that are not there are zero, and named by `ERRORS`."""
  there = [i for i, image in enumerate(made.images) if image is not None]
  arrays = {ERRORS: np.array(made.errors)}
  shapes = [(0, 0) if image is None else image.shape[:2] for image in made.images]
  arrays[EDGES] = np.array(shapes, np.int32).reshape(-1, 2)
  arrays |= {f'{EACH}{name}': np.asarray(values) for name, values in made.each.items()}
  for name, rows in extraction([made.images[i] for i in there]).items():
    arrays[name] = np.zeros((len(made.images), rows.shape[1]), np.float32)
    arrays[name][there] = rows
  return arrays


def _thumbnail(image: np.ndarray | None) -> np.ndarray:
  """The whole image on a white square, [t t 3]; white where there is none."""
  ground = Image.new('RGB', (THUMBNAIL, THUMBNAIL), 'white')
  if image is not None:
    small = ImageOps.contain(Image.fromarray(image), ground.size, Image.Resampling.BICUBIC)
    ground.paste(small, tuple((THUMBNAIL - edge) // 2 for edge in small.size))
  return np.asarray(ground)


def reader(images: ImageSet) -> Callable[[range], Made]:
  """Return what reads a set's images, several at a time; one that cannot be read has an error."""
  pool = concurrent.futures.ThreadPoolExecutor(READERS)

  def one(index: int) -> tuple[np.ndarray | None, str]:
    try:
      return images[index].pixels, ''
    except UserError as error:
      return None, str(error)

  def read(items: range) -> Made:
    found = list(pool.map(one, items))
    return Made([image for image, _ in found], [text for _, text in found])

  return read


def gather(chunks: Chunks, most_unreadable: float = 0.0) -> Features:
  """The features of all pieces; UserError if more than `most_unreadable` of the images failed."""
  columns = chunks.joined(without=(THUMBNAILS,))
  errors = columns.pop(ERRORS)
  there = errors == ''
  bad = [str(text) for text in errors[~there]]
  if len(bad) > most_unreadable * len(there):
    raise UserError(
      f'{len(bad)} of {len(there)} images cannot be read, more than the fraction of '
      f'{most_unreadable:g} that is allowed: {"; ".join(bad[:3])}'
    )
  rows = np.flatnonzero(there)
  edges = columns.pop(EDGES)[rows].min(axis=1)
  edge = float(np.median(edges)) if len(rows) else None
  found = {name: _only(values, rows) for name, values in columns.items()}
  each = {name.removeprefix(EACH): found.pop(name) for name in [*found] if name.startswith(EACH)}
  return Features(found, rows, bad, each, edge)


def _only(values: np.ndarray, rows: np.ndarray) -> np.ndarray:
  """These rows, in ascending order, moved to the front, part by part."""
  if len(rows) == len(values):
    return values
  for start in range(0, len(rows), PART):
    part = rows[start : start + PART]
    values[start : start + len(part)] = values[part]
  return values[: len(rows)]


def regrouped(batches: Iterable[Images], size: int) -> Iterator[Images]:
  """Yield the same images in order, `size` at a time; the last batch may be smaller."""
  waiting: list[np.ndarray] = []
  for batch in batches:
    waiting.append(batch)
    while sum(map(len, waiting)) >= size:
      whole = np.concatenate(waiting)
      yield whole[:size]
      waiting = [whole[size:]]
  rest = np.concatenate(waiting) if waiting else ()
  if len(rest):
    yield rest
