"""Scores and shows a denoiser of points in the plane."""

import dataclasses
from collections.abc import Callable, Iterator

import jax
import numpy as np
from jaxtyping import Float, UInt8
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from diffusion_jax.evaluation.evaluator import EVALUATE, SAMPLE, Picture, Value, named, seed_of
from diffusion_jax.evaluation.metrics.kernel import energy_distance
from diffusion_jax.parallel.mesh import to_host
from diffusion_jax.parallel.processes import heartbeat

PREVIEW_POINTS = 1024
LATTICE, EXTENT = 21, 2.6
PIXELS = 384
_SAMPLES, _DATA = '#2A8FD0', '#D55E00'
Image = UInt8[np.ndarray, 'h w 3']


@dataclasses.dataclass(frozen=True, eq=False)
class PointsPreview:
  """Samples over the data, and the learned score of the data with several amounts of noise.

  sample: (params, seed, count) -> points [count 2]. fields: (params, x [n 2]) -> scores [k n 2] of
  the data with `levels` (sigma / alpha) of noise. data: [n 2].
  """

  sample: Callable
  fields: Callable
  levels: tuple[float, ...]
  data: Float[np.ndarray, 'n 2']
  name = 'points_preview'
  when = SAMPLE
  about = (
    'Drawn points, as far as they lie in the frame, over those of the test, and the learned score '
    'of data with that much noise (sigma / alpha), over noised test points.'
  )

  def run(self, model, params, key: jax.Array) -> Iterator[tuple[str, Value]]:
    points = to_host(self.sample(params, seed_of(key), PREVIEW_POINTS))
    heartbeat()
    axis = np.linspace(-EXTENT, EXTENT, LATTICE, dtype=np.float32)
    lattice = np.stack(np.meshgrid(axis, axis), axis=-1)
    fields = to_host(self.fields(params, lattice.reshape(-1, 2)))
    heartbeat()
    noise = np.random.default_rng(0).standard_normal((PREVIEW_POINTS, 2))
    data = self.data[:PREVIEW_POINTS]
    images = [scatter_image(points, data, EXTENT)] + [
      field_image(lattice, field.reshape(lattice.shape), data + ratio * noise[: len(data)])
      for field, ratio in zip(fields, self.levels, strict=True)
    ]
    captions = ['samples over data'] + [f'score at sigma / alpha {r:g}' for r in self.levels]
    yield 'samples', Picture(np.stack(images), captions, self.about)


@dataclasses.dataclass(frozen=True, eq=False)
class Points:
  """Energy distance to the test points; with baselines bits per dimension of some of them, too.

  sample: as of `PointsPreview`. bits: (params, x [n 2]) -> bits per dimension [n]. initialize: of
  an untrained network. likelihood_points: of which bits are computed, 0 for none.
  """

  sample: Callable
  bits: Callable
  initialize: Callable
  data: Float[np.ndarray, 'n 2']
  likelihood_points: int = 0
  samples: int = 256
  baselines: bool = True
  name = 'points'
  when = EVALUATE

  def run(self, model, params, key: jax.Array) -> Iterator[tuple[str, Value]]:
    columns = {'generated': params}
    if self.baselines:
      columns['untrained'] = jax.jit(self.initialize)(jax.random.key(1))
    for name, values in columns.items():
      yield from named({name: self._scores(values, seed_of(key) + 1)})
    if self.baselines:
      half = len(self.data) // 2
      yield 'real.energy_distance', energy_distance(self.data[:half], self.data[half:])

  def _scores(self, params, seed: int) -> dict[str, float]:
    found = to_host(self.sample(params, seed, min(self.samples, len(self.data))))
    heartbeat()
    scores = {'energy_distance': energy_distance(found, self.data)}
    if self.baselines and self.likelihood_points:
      bits = to_host(self.bits(params, self.data[:self.likelihood_points]))
      scores['bits_per_dim'] = float(bits.mean())
      heartbeat()
    return scores


def scatter_image(
  points: Float[np.ndarray, 'n 2'], reference: Float[np.ndarray, 'm 2'], extent: float
) -> Image:
  """Points over grey reference points, both axes from -extent to extent."""
  figure, axes = _axes(extent)
  axes.plot(*np.asarray(reference).T, 'o', markersize=2.2, markeredgewidth=0, color='0.8')
  axes.plot(*np.asarray(points).T, 'o', markersize=1.6, markeredgewidth=0, color=_SAMPLES,
            alpha=0.8)
  return _pixels(figure)


def field_image(
  lattice: Float[np.ndarray, 'h w 2'], vectors: Float[np.ndarray, 'h w 2'],
  points: Float[np.ndarray, 'n 2'],
) -> Image:
  """Vectors at a lattice, over points. Arrows are cut to the lattice's spacing, not scaled to it.

  The longest tenth is as long as the spacing; vectors that are not finite are left out.
  """
  extent = float(np.abs(lattice).max()) * 1.02
  figure, axes = _axes(extent)
  axes.plot(*np.asarray(points).T, 'o', markersize=1.6, markeredgewidth=0, color=_DATA, alpha=0.5)
  finite = np.isfinite(vectors).all(axis=-1)
  lengths = np.linalg.norm(np.where(finite[..., None], vectors, 0.0), axis=-1)
  longest = np.percentile(lengths[finite], 90) if finite.any() else 1.0
  spacing = np.ptp(lattice[..., 0]) / max(len(lattice) - 1, 1)
  arrows = vectors * (spacing / np.maximum(lengths, max(longest, 1e-30)))[..., None]
  axes.quiver(*lattice[finite].T, *arrows[finite].T, angles='xy', scale_units='xy', scale=1,
              pivot='mid', color='0.15', width=0.004)
  return _pixels(figure)


def _axes(extent: float):
  figure = Figure(figsize=(PIXELS / 100, PIXELS / 100), dpi=100)
  FigureCanvasAgg(figure)
  axes = figure.add_axes((0, 0, 1, 1))
  axes.set_axis_off()
  axes.set_xlim(-extent, extent)
  axes.set_ylim(-extent, extent)
  return figure, axes


def _pixels(figure: Figure) -> Image:
  figure.canvas.draw()
  return np.asarray(figure.canvas.buffer_rgba())[..., :3].copy()
