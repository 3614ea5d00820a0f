"""How rows of a cache are computed: views of pictures, and texts, by the frozen networks."""

import abc
import collections
import concurrent.futures
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh

from diffusion_jax.backend.xla import jit
from diffusion_jax.data.cache import identity
from diffusion_jax.data.cache.rows import DTYPES, Row, pack
from diffusion_jax.data.splits import spread
from diffusion_jax.data.transforms import apply
from diffusion_jax.data.unreadable import about
from diffusion_jax.errors import Unreadable, require
from diffusion_jax.parallel.layout import AXES
from diffusion_jax.parallel.mesh import in_batches, put_params, to_host
from diffusion_jax.pixels import to_float
from diffusion_jax.types import Source

IMAGES, CAPTIONS = 64, 256
"""Encoded at a time, at most."""
_PIXELS = 2**22
"""Of the images that one device encodes at a time, unless a single one has more."""
_MOST_ROWS = 128
"""In a shard: what is lost when a process is killed."""
_SHARD = 2**28
"""Bytes of a shard, about, from which on it has fewer rows."""
_MEASURED = 64
"""Records whose captions are counted to know about how many there are of all."""


@dataclasses.dataclass(frozen=True)
class Options:
  """What a cache keeps.

  dtype: of moments; text_dtype: of texts. views: of each picture, what the `transforms` of the
  pictures make of it for each of so many random numbers, which follow from `seed` and its content.
  specs: of the transforms, as in the config. looks: of each part of a mixture, what of how its
  pictures look is its own, None for nothing. size: of the images, as in the config; shape: (height,
  width) of about all. threads: that read. progress: shown. report: takes a state
  and more, for the status file.
  """

  dtype: str = 'float32'
  text_dtype: str = 'float16'
  views: int = 1
  transforms: Sequence[Callable] = ()
  specs: Any = ()
  looks: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  seed: int = 0
  size: Any = 0
  shape: tuple[int, int] = (0, 0)
  threads: int = 2
  progress: bool = True
  report: Callable[..., None] = lambda *args, **values: None


class Encoder(abc.ABC):
  """One kind of rows, of all records of a source.

  name: of the kind. rows: in a shard. bytes: of a row, about.
  """

  name: ClassVar[str]
  rows: int
  bytes: int

  def __init__(self, source: Source, mesh: Mesh, options: Options):
    self.source, self.mesh, self.options = source, mesh, options

  def __len__(self) -> int:
    return len(self.source)

  @functools.cached_property
  @abc.abstractmethod
  def keys(self) -> np.ndarray:
    """Digests of what a row follows from besides `identity`, uint8 [n DIGEST]."""

  @abc.abstractmethod
  def identity(self) -> dict[str, str]:
    """Return short hashes or texts of what all rows follow from, by name."""

  @abc.abstractmethod
  def ready(self) -> None:
    """Put the weights onto the mesh; all processes call it together, before `encode`."""

  @abc.abstractmethod
  def encode(self, numbers: Sequence[int]) -> list[Row]:
    """Return the rows of these records."""

  def _in_shards(self, size: int) -> None:
    self.bytes, self.rows = size, max(1, min(_MOST_ROWS, _SHARD // max(size, 1)))

  @abc.abstractmethod
  def read(self, number: int) -> Any:
    """Return what of a record is encoded. Unreadable."""

  def _read(self, numbers: Sequence[int], read: Callable[[int], Any]) -> Iterator[Any]:
    """Yield what `read` gives, or the Unreadable that it raises; a few are read ahead."""

    def one(number: int) -> Any:
      try:
        return read(number)
      except Unreadable as error:
        return error

    threads, waiting = max(self.options.threads, 1), collections.deque()
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
      for number in numbers:
        waiting.append(pool.submit(one, number))
        if len(waiting) > 4 * threads:
          yield waiting.popleft().result()
      while waiting:
        yield waiting.popleft().result()


class Latents(Encoder):
  """The moments of views of pictures, and 'sizes' [6] where records have them."""

  name = 'latents'

  def __init__(self, source: Source, model: Any, frozen: Mapping, mesh: Mesh, options: Options):
    super().__init__(source, mesh, options)
    self.space, self._frozen = model.space, frozen
    self._random = any(transform.random for transform in options.transforms)
    self._encode = moments_encoder(model)
    self._in_shards(self._size(options.shape) * options.views)

  def _size(self, shape: tuple[int, int]) -> int:
    """Return the bytes of one view."""
    if 0 in shape:
      return 0
    images = jax.ShapeDtypeStruct((1, *shape, 3), jnp.uint8)
    weights = {role: self._frozen[role] for role in self.space.networks}
    found = jax.eval_shape(self._encode, weights, images)
    item = DTYPES[self.options.dtype].itemsize
    return sum(math.prod(leaf.shape) for leaf in found.values()) * item

  def identity(self):
    options = self.options
    weights = {f'weights of {role}': identity.of_weights(self._frozen[role])
               for role in sorted(self.space.networks)}
    return {
      'space': identity.of_value(self.space), **weights, 'data.size': str(options.size),
      'data.transforms': identity.of_value(options.specs) if options.specs else 'none',
      'views': str(options.views), 'dtype': options.dtype,
      **({'seed': str(options.seed)} if self._random else {}),
    }

  @functools.cached_property
  def keys(self):
    # Some transforms heed captions, such as flips.
    found = identity.of_pictures(self.source, bool(self.options.transforms))
    return identity.of_looks(found, self.source, self.options.looks)

  def ready(self):
    self._weights = _on_mesh(self._frozen, self.space.networks, self.mesh)
    if self._random:
      assert len(self.keys) == len(self)  # Computed here, before threads ask for them.

  def read(self, number):
    return self.source[number]

  def _views(self, number: int) -> list[dict]:
    """The record after the transforms, once for each view."""
    record = self.read(number)
    if not self.options.transforms:
      return [record]
    if (mixed := getattr(self.source, 'mixed', None)) is not None:
      record = record | mixed.fields(number)
    key = self.keys[number].view(np.uint32).tolist() if self._random else []
    return [
      apply(self.options.transforms, record, np.random.default_rng([self.options.seed, *key, view]))
      for view in range(self.options.views)
    ]

  def encode(self, numbers):
    rows, parts = {}, collections.defaultdict(dict)
    waiting: dict[tuple, list] = collections.defaultdict(list)

    def flush(batch: list) -> None:
      images = np.stack([view['image'] for _, _, view in batch])
      most = self._at_a_time(*images.shape[1:3])
      found = in_batches(self._encode, self._weights, images, mesh=self.mesh, batch_size=most)
      for (number, place, view), moments in zip(batch, _one_by_one(found), strict=True):
        part = {k: v.astype(DTYPES[self.options.dtype]) for k, v in moments.items()}
        part |= {'sizes': np.asarray(view['sizes'], np.float32)} if 'sizes' in view else {}
        parts[number][place] = pack(part)
      batch.clear()

    for number, views in zip(numbers, self._read(numbers, self._views), strict=True):
      if isinstance(views, Unreadable):
        rows[number] = Row((), str(views))
        continue
      for place, view in enumerate(views):
        batch = waiting[view['image'].shape]
        batch.append((number, place, view))
        if len(batch) >= self._at_a_time(*view['image'].shape[:2]):
          flush(batch)
    for batch in waiting.values():
      if batch:
        flush(batch)
    return [rows.get(n) or Row([part for _, part in sorted(parts[n].items())]) for n in numbers]

  def _at_a_time(self, height: int, width: int) -> int:
    return min(IMAGES, len(self.mesh.local_devices) * max(1, _PIXELS // (height * width)))


class Texts(Encoder):
  """The condition of every caption, with what other conditioners make of a record's prompt.

  Of the empty prompt that is the null.
  """

  name = 'texts'

  def __init__(self, source: Source, model: Any, frozen: Mapping, mesh: Mesh, options: Options):
    super().__init__(source, mesh, options)
    self.text, self._frozen = model.text, frozen
    self._encode = jax.jit(lambda weights, tokens: self.text.encode(weights, {'tokens': tokens}))
    self.others = {
      name: one for name, one in model.conditioners.items() if one.kept and one is not model.text
    }
    some = [record for record in self._read(spread(len(source), _MEASURED), self.read)
            if not isinstance(record, Unreadable)]
    captions = sum(len(record.get('captions', ())) for record in some) / max(len(some), 1)
    self._in_shards(self._size() * max(1, round(captions)))
    self._at_a_time = min(CAPTIONS, max(1, round(min(self.rows, len(source)) * captions)))

  def read(self, number):
    return about(self.source, number)

  def _size(self) -> int:
    if self.text is None:
      return 0
    weights = {role: self._frozen[role] for role in self.text.networks}
    found = jax.eval_shape(self.text.encode, weights, {'tokens': self.text.tokens([''])})
    item = DTYPES[self.options.text_dtype].itemsize
    return sum(math.prod(leaf.shape) for leaf in found.values()) * item

  def identity(self):
    roles = sorted({} if self.text is None else self.text.networks)
    return {
      'text encoders': identity.of_value(self.text),
      'other conditions': identity.of_value(self.others),
      **{f'weights of {role}': identity.of_weights(self._frozen[role]) for role in roles},
      'dtype': self.options.text_dtype,
    }

  @functools.cached_property
  def keys(self):
    return identity.of_texts(self.source, [one.prompt for one in self.others.values()])

  def ready(self):
    roles = {} if self.text is None else self.text.networks
    self._weights = _on_mesh(self._frozen, roles, self.mesh)

  def encode(self, numbers):
    records = list(self._read(numbers, self.read))
    readable = [record for record in records if not isinstance(record, Unreadable)]
    found = self._encoded([text for record in readable for text in record['captions']])
    more = self._of_others(readable)
    rows = []
    for record in records:
      if isinstance(record, Unreadable):
        rows.append(Row((), str(record)))
        continue
      own = next(more)
      texts = [''] if self.text is None else record['captions']
      require(bool(texts), f'Record {record.get("id", "?")} has no captions: check its source.')
      parts = [pack(found.get(text, {}) | own) for text in texts]
      rows.append(Row(parts, weights=record.get('caption_weights', ()) if found else ()))
    return rows

  def _encoded(self, captions: Sequence[str]) -> dict[str, dict[str, np.ndarray]]:
    """The condition of each caption by its text; each is encoded once."""
    texts = list(dict.fromkeys(captions))
    if self.text is None or not texts:
      return {}
    found = _one_by_one(in_batches(
      self._encode, self._weights, self.text.tokens(texts), mesh=self.mesh,
      batch_size=self._at_a_time,
    ))
    dtype = DTYPES[self.options.text_dtype]
    typed = lambda value: value if value.dtype == np.int32 else value.astype(dtype)
    return {
      text: {name: typed(value) for name, value in one.items()}
      for text, one in zip(texts, found, strict=True)
    }

  def _of_others(self, records: Sequence[dict]) -> Iterator[dict[str, np.ndarray]]:
    found: dict[str, np.ndarray] = {}
    for one in self.others.values():
      prompts = [one.prompt(record) or '' for record in records]
      found |= jax.tree.map(np.asarray, one.of_prompts(self._frozen, prompts)) if prompts else {}
    return ({name: np.asarray(value[i]) for name, value in found.items()}
            for i in range(len(records)))


class Null(Encoder):
  """The condition of nothing, which takes the place of others now and then: one row."""

  name = 'null'

  def __init__(self, null: Mapping[str, np.ndarray], mesh: Mesh, options: Options):
    super().__init__([null], mesh, options)
    self._in_shards(sum(value.nbytes for value in null.values()))

  @functools.cached_property
  def keys(self):
    return identity.of_rows([pack(self.source[0])])

  def identity(self):
    return {}

  def ready(self):
    pass

  def read(self, number):
    return self.source[number]

  def encode(self, numbers):
    return [Row([pack(self.source[number])]) for number in numbers]


def moments_encoder(model: Any) -> Callable:
  """The jitted (weights, uint8 images [b h w 3]) -> moments of z."""
  return jit(lambda weights, images: model.space.moments(weights, to_float(images)))


def local_mesh(mesh: Mesh) -> Mesh:
  """The mesh itself, or one of this process's devices, which split weights if it does."""
  if jax.process_count() == 1:
    return mesh
  devices = np.array(mesh.local_devices)
  split = mesh.shape['fsdp'] * mesh.shape['tensor'] > 1
  sizes = {'fsdp' if split else 'data': len(devices)}
  shape = [sizes.get(axis, 1) for axis in AXES]
  return Mesh(devices.reshape(shape), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _on_mesh(frozen: Mapping, roles: Any, mesh: Mesh) -> dict:
  """Weights on the devices of `mesh`; all processes call it together."""
  host = (lambda params: params) if jax.process_count() == 1 else to_host
  return {role: put_params(host(frozen[role]), mesh) for role in roles}


def _one_by_one(batches: Iterator[dict[str, np.ndarray]]) -> Iterator[dict[str, np.ndarray]]:
  for batch in batches:
    for i in range(len(next(iter(batch.values())))):
      yield {name: column[i] for name, column in batch.items()}

