"""Score and show a denoiser of points in the plane, `train.tasks.toy.PointDiffusion`."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, UInt8
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from diffusion_jax.evaluation.evaluator import (
  EVALUATE,
  SAMPLE,
  Cached,
  Picture,
  Value,
  named,
  seed_of,
  with_untrained,
)
from diffusion_jax.evaluation.figures import bare, drawn
from diffusion_jax.evaluation.metrics.kernel import energy_distance
from diffusion_jax.parallel.mesh import to_host
from diffusion_jax.parallel.processes import heartbeat
from diffusion_jax.types import Weights

PREVIEW_POINTS = 1024
LATTICE, EXTENT = 21, 2.6
RATIOS = (1.0, 0.4, 0.15)
"""sigma / alpha of the scores that are shown."""
PIXELS = 384
_SAMPLES, _DATA = '#2A8FD0', '#D55E00'
Image = UInt8[np.ndarray, 'h w 3']


@dataclasses.dataclass(frozen=True, eq=False)
class PointsPreview(Cached):
  """Samples over the data [n 2], and the learned score at several noise levels.

  sample: argument of `model.points`.
  """

  sample: Any
  data: Float[np.ndarray, 'n 2']
  name = 'points_preview'
  when = SAMPLE
  about = (
    'Drawn points, as far as they lie in the frame, over those of the test, and the learned score '
    'of data with that much noise (sigma / alpha), over noised test points.'
  )

  def run(self, model, params: Weights, key: jax.Array) -> Iterator[tuple[str, Value]]:
    draw = self.once('points', lambda: model.points(self.sample))
    points = to_host(draw(params, seed_of(key), PREVIEW_POINTS))
    heartbeat()
    axis = np.linspace(-EXTENT, EXTENT, LATTICE, dtype=np.float32)
    lattice = np.stack(np.meshgrid(axis, axis), axis=-1)
    scores = self.once('scores', lambda: jax.jit(model.scores))
    fields = to_host(scores(params, lattice.reshape(-1, 2), jnp.asarray(RATIOS)))
    heartbeat()
    noise = np.random.default_rng(0).standard_normal((PREVIEW_POINTS, 2))
    data = self.data[:PREVIEW_POINTS]
    images = [scatter_image(points, data, EXTENT)] + [
      field_image(lattice, field.reshape(lattice.shape), data + ratio * noise[: len(data)])
      for field, ratio in zip(fields, RATIOS, strict=True)
    ]
    captions = ['samples over data'] + [f'score at sigma / alpha {r:g}' for r in RATIOS]
    yield 'samples', Picture(np.stack(images), captions, self.about)


@dataclasses.dataclass(frozen=True, eq=False)
class Points(Cached):
  """Energy distance to the test points; with baselines, bits per dimension of some.

  sample: as of `PointsPreview`. likelihood_points: number of points for bits, 0 for none.
  """

  sample: Any
  data: Float[np.ndarray, 'n 2']
  likelihood_points: int = 0
  samples: int = 256
  baselines: bool = True
  name = 'points'
  when = EVALUATE
  metrics = ('energy_distance',)

  def run(self, model, params: Weights, key: jax.Array) -> Iterator[tuple[str, Value]]:
    for name, weights in with_untrained(model, params, self.baselines):
      yield from named({name: self._scores(model, weights, seed_of(key) + 1)})
    if self.baselines:
      half = len(self.data) // 2
      yield 'real.energy_distance', energy_distance(self.data[:half], self.data[half:])

  def _scores(self, model, weights: Weights, seed: int) -> dict[str, float]:
    draw = self.once('points', lambda: model.points(self.sample))
    found = to_host(draw(weights, seed, min(self.samples, len(self.data))))
    heartbeat()
    scores = {'energy_distance': energy_distance(found, self.data)}
    if self.baselines and self.likelihood_points:
      bits = self.once('bits', lambda: jax.jit(model.bits))
      scores['bits_per_dim'] = float(
        to_host(bits(weights, self.data[: self.likelihood_points])).mean()
      )
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
  return drawn(figure)


def field_image(
  lattice: Float[np.ndarray, 'h w 2'], vectors: Float[np.ndarray, 'h w 2'],
  points: Float[np.ndarray, 'n 2'],
) -> Image:
  """Vectors at a lattice, over points; arrows are cut to the spacing, not scaled to it.

  The longest tenth has the spacing's length; vectors that are not finite are left out.
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
  return drawn(figure)


def _axes(extent: float) -> tuple[Figure, Axes]:
  figure, axes = bare(PIXELS)
  axes.set_xlim(-extent, extent)
  axes.set_ylim(-extent, extent)
  return figure, axes
