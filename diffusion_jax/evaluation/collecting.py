"""Features of images that come batch after batch, on a mesh of any number of processes.

Where means and covariances are all that is asked for, features never leave the devices: they are
summed there, in the program that computes them, and the sums are put together at the end.
"""

from collections.abc import Iterable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, UInt8

from diffusion_jax.backend.xla import jit
from diffusion_jax.evaluation.device_statistics import DeviceStatistics, collect, empty, update
from diffusion_jax.evaluation.extraction import column
from diffusion_jax.evaluation.extractors import Extractor
from diffusion_jax.evaluation.figures import sums_suffice
from diffusion_jax.evaluation.statistics import Statistics
from diffusion_jax.parallel.mesh import in_batches

Images = UInt8[np.ndarray, 'b h w 3']
Collected = dict[str, Float[np.ndarray, 'n d'] | Statistics]
"""Column -> features of all images, or their sums where the metrics need no more."""


class Collector:
  """Collects what metrics need of sets of images, all of one size in pixels.

  batch_size: of the networks; rounded up to a multiple of the devices that share a batch.
  """

  def __init__(
    self, extractors: Sequence[Extractor], mesh: Mesh, metrics: Sequence[str], batch_size: int = 32
  ):
    ways = mesh.shape['data'] * mesh.shape['fsdp']
    self.mesh, self.batch_size = mesh, -(-batch_size // ways) * ways
    self.extractors = list(extractors)
    self.columns = [column(e, output) for e in extractors for output in e.widths]
    self._summed = {
      e.name: [o for o in e.widths if sums_suffice(metrics, column(e, o))] for e in extractors
    }
    self._steps = {e.name: self._step(e) for e in extractors}

  def _step(self, extractor: Extractor):
    """Jitted (params, sums, images, numbers) -> (sums, features of the other outputs)."""

    def step(params, sums: dict[str, DeviceStatistics], images: jax.Array, numbers: jax.Array):
      found = extractor.apply(params, images)
      valid = jnp.diff(numbers, prepend=-1) > 0  # Padding repeats the last row with its number.
      sums = {o: update(sums[o], found.pop(o), valid, mesh=self.mesh) for o in sums}
      return sums, found

    return jit(step, donate_argnums=1)

  def __call__(self, batches: Iterable[Images]) -> Collected:
    """What the metrics need of all images together. All processes must call it with the same.

    UserError where sums are not finite.
    """
    sums = {
      e.name: {o: empty(e.widths[o], self.mesh) for o in self._summed[e.name]}
      for e in self.extractors
    }
    kept: dict[str, list[np.ndarray]] = {name: [] for name in self.columns}
    for images in regrouped(batches, self.batch_size):
      for extractor in self.extractors:
        for output, rows in self._features(extractor, sums, images).items():
          kept[column(extractor, output)].append(rows)
    found: Collected = {name: np.concatenate(parts) for name, parts in kept.items() if parts}
    for e in self.extractors:
      for output, state in sums[e.name].items():
        found[column(e, output)] = collect(state, mesh=self.mesh)
    return found

  def _features(self, extractor: Extractor, sums: dict, images: Images) -> dict[str, np.ndarray]:
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


def regrouped(batches: Iterable[Images], size: int) -> Iterator[Images]:
  """The same images in the same order, `size` at a time; the last batch may be smaller."""
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
