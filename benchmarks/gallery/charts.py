"""Charts of schedules and sampler errors, and of paths and scores in the plane, from arrays."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from benchmarks.gallery import frame
from benchmarks.gallery.frame import INK, PALETTE
from diffusion_jax.errors import UserError
from diffusion_jax.viz.charts import log_snr

Density = tuple[Float[np.ndarray, 'h w 2'], Float[np.ndarray, 'h w']]
"""(points of a `lattice`, density there)."""

_LINES = ('-', '--', ':', '-.')
_PATHS = 200


def lattice(reach: float, count: int) -> Float[np.ndarray, 'count count 2']:
  """Points (x, y) of the square [-reach, reach]^2, row by row from the lowest y."""
  line = np.linspace(-reach, reach, count)
  return np.stack(np.meshgrid(line, line), axis=-1)


def schedules_chart(
  schedules: Mapping[str, tuple[np.ndarray, np.ndarray, np.ndarray]], *, title: str
) -> str:
  """Draw several schedules, (t, alpha, sigma) [n] each: a panel for alpha, sigma and the log-SNR.

  There is none for alpha where all are 1. Sigmas above 3 make their axis logarithmic.
  """
  scales = not all((alpha == 1).all() for _, alpha, _ in schedules.values())
  labels = ('α', 'σ', 'log-SNR') if scales else ('σ', 'log-SNR')
  with matplotlib.rc_context(frame.STYLE):
    figure = frame.empty_figure(3.1, 8.4)
    panels = figure.subplots(1, len(labels), sharex=True)
    for number, (name, (t, alpha, sigma)) in enumerate(schedules.items()):
      curves = (alpha, sigma, log_snr(alpha, sigma))[-len(labels):]
      for axes, values in zip(panels, curves, strict=True):
        axes.plot(t, values, color=PALETTE[number % len(PALETTE)], linewidth=1.6,
                  label=frame.visible(name))
    for axes, label in zip(panels, labels, strict=True):
      frame.plain_axes(axes, 't', label)
    if any(np.max(sigma) > 3 for _, _, sigma in schedules.values()):
      panels[-2].set_yscale('log')
      frame.log_axis(panels[-2].yaxis)
    frame.legend_below(figure, panels[-1], 6)
    return frame.render(figure, title)


def error_chart(
  errors: Mapping[str, Sequence[tuple[float, float]]], *, title: str, orders: Sequence[int] = (),
  ylabel: str = 'error',
) -> str:
  """Draw error against network calls, both logarithmic; returns an SVG string.

  Args:
    errors: (calls, error) points by sampler; those that are not positive and finite are left out
      and counted in a note.
    orders: slopes to draw as faint guides: of order p is an error that falls as calls^-p.
  """
  with matplotlib.rc_context(frame.STYLE):
    figure = frame.empty_figure(3.2 + 0.17 * -(-len(errors) // 3))
    axes = figure.add_subplot()
    frame.plain_axes(axes, 'network calls', ylabel)
    drawn, left_out = [], 0
    for number, (name, points) in enumerate(errors.items()):
      kept = sorted(p for p in points if min(p) > 0 and np.isfinite(p).all())
      drawn, left_out = drawn + kept, left_out + len(points) - len(kept)
      axes.plot(
        *zip(*kept, strict=True) if kept else ([], []), color=PALETTE[number % len(PALETTE)],
        linestyle=_LINES[number // len(PALETTE) % len(_LINES)], linewidth=1.5, marker='o',
        markersize=3, label=frame.visible(name),
      )
    if drawn:
      _log_log(axes, np.array(drawn), orders)
    frame.notes(axes, len(drawn), left_out)
    if errors:
      frame.legend_below(figure, axes)
    return frame.render(figure, title)


def _log_log(axes: Axes, points: np.ndarray, orders: Sequence[int]) -> None:
  """Logarithmic axes with plain calls, and guides from the upper left corner of the points."""
  axes.set_xscale('log')
  axes.set_yscale('log')
  (low, bottom), (high, top) = points.min(axis=0), points.max(axis=0)
  frame.log_axis(axes.xaxis, (1, 2, 5))
  frame.log_axis(axes.yaxis)
  bottom /= 4  # The steepest guide may run below all points.
  for order in orders if high > low else ():
    end = min(high, low * (top / bottom) ** (1 / order)) if top > bottom else high
    axes.plot([low, end], [top, top * (low / end) ** order], color=INK, alpha=0.4, linewidth=0.9,
              linestyle=(0, (1, 2)))
    axes.annotate(
      f'order {order}', (end, top * (low / end) ** order), (6, 0), textcoords='offset points',
      fontsize=8, alpha=0.6, va='center',
    )


def trajectory_chart(
  paths: Float[np.ndarray, 's n 2'], *, title: str, density: Density | None = None
) -> str:
  """Draw the paths of n points over s states in the plane; returns an SVG string.

  Args:
    paths: from noise (open circles) to data (filled circles); of more than 200 points an even
      choice is drawn. States that are not finite interrupt a path.
    density: drawn below, darker where higher; also sets the frame.

  Raises:
    UserError: for paths that are not [s n 2].
  """
  paths = _planar(paths, 3, 'paths')
  if paths.shape[1] > _PATHS:
    paths = paths[:, np.linspace(0, paths.shape[1] - 1, _PATHS).round().astype(int)]
  paths = _finite(paths)
  with matplotlib.rc_context(frame.STYLE):
    figure, axes = _plane(density, paths)
    axes.plot(paths[..., 0], paths[..., 1], color=INK, linewidth=0.7, alpha=0.45)
    start, end = paths[0], paths[-1]
    axes.plot(*start.T, 'o', markersize=3, markerfacecolor='none', color=PALETTE[1], label='start')
    axes.plot(*end.T, 'o', markersize=3, color=PALETTE[1], label='end')
    axes.legend(loc='upper right', frameon=False, fontsize=8, handletextpad=0.2)
    return _smooth(frame.render(figure, title))


def score_chart(
  points: Float[np.ndarray, 'h w 2'], vectors: Float[np.ndarray, 'h w 2'], *, title: str,
  density: Density | None = None, samples: Float[np.ndarray, 'n 2'] | None = None,
) -> str:
  """Draw a vector field, such as a score, as arrows in the plane; returns an SVG string.

  Args:
    points: a `lattice`, about 20 by 20.
    vectors: there. Arrows are as long as the lattice is wide at the 90th percentile of their
      lengths; longer ones are cut to that. Vectors that are not finite are left out.
    density: drawn below, darker where higher; its lattice may be finer.
    samples: drawn as dots.

  Raises:
    UserError: for arrays of other shapes.
  """
  points, vectors = _planar(points, 3, 'points'), _planar(vectors, 3, 'vectors')
  if points.shape != vectors.shape:
    raise UserError(
      f'{list(points.shape)} points came with {list(vectors.shape)} vectors; give one for each.'
    )
  finite = np.isfinite(vectors).all(axis=-1)
  lengths = np.linalg.norm(np.where(finite[..., None], vectors, 0.0), axis=-1)
  longest = np.percentile(lengths[finite], 90) if finite.any() else 0.0
  spacing = np.ptp(points.reshape(-1, 2), axis=0).max() / max(len(points) - 1, 1)
  scale = spacing / np.maximum(lengths, max(longest, 1e-30))
  arrows = (vectors * scale[..., None])[finite]
  with matplotlib.rc_context(frame.STYLE):
    figure, axes = _plane(density, points)
    if samples is not None:
      axes.plot(*_planar(samples, 2, 'samples').T, 'o', markersize=1.6, markeredgewidth=0,
                color=PALETTE[1], alpha=0.7)
    axes.quiver(*points[finite].T, *arrows.T, angles='xy', scale_units='xy', scale=1, pivot='mid',
                color=INK, alpha=0.75, width=0.0035)
    return _smooth(frame.render(figure, title))


def _planar(array: np.ndarray, ndim: int, name: str) -> np.ndarray:
  array = np.asarray(array, np.float64)
  if array.ndim != ndim or array.shape[-1] != 2 or 0 in array.shape:
    raise UserError(
      f'{name} of shape {list(array.shape)} cannot be drawn in the plane; give {ndim} dimensions, '
      'the last of size 2.'
    )
  return array


def _finite(values: np.ndarray) -> np.ndarray:
  return np.where(np.isfinite(values), values, np.nan)


def _plane(density: Density | None, points: np.ndarray) -> tuple[Figure, Axes]:
  """Square axes of equal scales around the density, or else around the finite points."""
  figure = frame.empty_figure(4.6)
  axes = figure.add_subplot()
  axes.patch.set_visible(False)
  axes.spines[:].set_alpha(0.3)
  axes.tick_params(length=0)
  axes.set_aspect('equal')
  for axis in (axes.xaxis, axes.yaxis):
    axis.set_major_locator(MaxNLocator(5, steps=(1, 2, 5, 10)))
  if density is not None:
    _shade(axes, *density)
    points = density[0]
  flat = np.asarray(points).reshape(-1, 2)
  flat = flat[np.isfinite(flat).all(axis=1)]
  low, high = (flat.min(axis=0), flat.max(axis=0)) if len(flat) else (np.zeros(2), np.ones(2))
  margin = 0.0 if density is not None else 0.05 * max((high - low).max(), 1e-6)
  axes.set_xlim(low[0] - margin, high[0] + margin)
  axes.set_ylim(low[1] - margin, high[1] + margin)
  return figure, axes


def _smooth(picture: str) -> str:
  """Let the browser interpolate the density, which is stored at the lattice's own resolution."""
  return re.sub(r' style="image-rendering:[^"]*"', '', picture)


def _shade(axes: Axes, points: np.ndarray, values: np.ndarray) -> None:
  """One colour, more opaque where the density is higher, so that any page shows through."""
  points, values = _planar(points, 3, 'density points'), np.asarray(values, np.float64)
  if values.shape != points.shape[:2]:
    raise UserError(
      f'{list(points.shape[:2])} points came with {list(values.shape)} densities; give one for '
      'each.'
    )
  values = np.maximum(np.nan_to_num(values, posinf=0.0), 0.0)
  image = np.empty((*values.shape, 4))
  image[..., :3] = to_rgb(PALETTE[0])
  # The root shows the tails, where samplers spend most of their steps.
  image[..., 3] = 0.8 * np.sqrt(values / max(values.max(), 1e-300))
  low, high = points[0, 0], points[-1, -1]
  half = (high - low) / (np.array(values.shape[::-1]) - 1).clip(1) / 2
  axes.imshow(
    image, origin='lower', interpolation='none', aspect='equal',
    extent=(low[0] - half[0], high[0] + half[0], low[1] - half[1], high[1] + half[1]),
  )
