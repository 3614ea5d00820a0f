"""Small pictures by matplotlib that are all plot: no frame, no numbers at the axes."""

import numpy as np
from jaxtyping import UInt8
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


def bare(pixels: int) -> tuple[Figure, Axes]:
  """Return a square figure of that many pixels, and axes that fill it."""
  figure = Figure(figsize=(pixels / 100, pixels / 100), dpi=100)
  FigureCanvasAgg(figure)
  axes = figure.add_axes((0, 0, 1, 1))
  axes.set_axis_off()
  return figure, axes


def drawn(figure: Figure) -> UInt8[np.ndarray, 'h w 3']:
  """Return the pixels of a figure."""
  figure.canvas.draw()
  return np.asarray(figure.canvas.buffer_rgba())[..., :3].copy()
