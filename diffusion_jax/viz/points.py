"""Pictures of points and vector fields in the plane, as arrays for grids of samples."""

import numpy as np
from jaxtyping import Float, UInt8
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from diffusion_jax.viz.curves import PALETTE

PIXELS = 384
Picture = UInt8[np.ndarray, 'h w 3']


def scatter_picture(
  points: Float[np.ndarray, 'n 2'], reference: Float[np.ndarray, 'm 2'], extent: float
) -> Picture:
  """Points over grey reference points, both axes from -extent to extent."""
  figure, axes = _axes(extent)
  axes.plot(*np.asarray(reference).T, 'o', markersize=2.2, markeredgewidth=0, color='0.8')
  axes.plot(*np.asarray(points).T, 'o', markersize=1.6, markeredgewidth=0, color=PALETTE[0],
            alpha=0.8)
  return _pixels(figure)


def field_picture(
  lattice: Float[np.ndarray, 'h w 2'], vectors: Float[np.ndarray, 'h w 2'],
  points: Float[np.ndarray, 'n 2'],
) -> Picture:
  """Vectors at a lattice, over points. Arrows are cut to the lattice's spacing, not scaled to it.

  The longest tenth is as long as the spacing; vectors that are not finite are left out.
  """
  extent = float(np.abs(lattice).max()) * 1.02
  figure, axes = _axes(extent)
  axes.plot(*np.asarray(points).T, 'o', markersize=1.6, markeredgewidth=0, color=PALETTE[1],
            alpha=0.5)
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


def _pixels(figure: Figure) -> Picture:
  figure.canvas.draw()
  return np.asarray(figure.canvas.buffer_rgba())[..., :3].copy()
