"""The chart of a noise schedule, inline SVG in the style of `svg`."""

from __future__ import annotations

from collections.abc import Mapping

import matplotlib
import numpy as np

from diffusion_jax.viz import svg
from diffusion_jax.viz.svg import PALETTE

_MAX_LOG_SNR = 30.0


def schedule_chart(
  schedules: Mapping[str, tuple[np.ndarray, np.ndarray, np.ndarray]], *, title: str
) -> str:
  """Draws alpha, sigma and the log-SNR against time; returns an SVG string.

  Args:
    schedules: (t [n], alpha [n], sigma [n]) by name. Up to two share a panel for alpha, a solid
      line, and sigma, a dashed one; more have a panel for each, without one for alpha where all
      are 1. Sigmas above 3 make its axis logarithmic. Log-SNRs beyond +-30 (an alpha or sigma of
      0, or its rounding error) interrupt their line.
    title: what is shown, read out by screen readers; not drawn.
  """
  curves = {name: [np.asarray(part, np.float64) for part in of] for name, of in schedules.items()}
  apart = len(curves) > 2
  scales = not all((alpha == 1).all() for _, alpha, _ in curves.values())
  labels = (('α',) if scales else ()) + ('σ', 'log-SNR')
  labels = labels if apart else ('α solid, σ dashed', 'log-SNR')
  with matplotlib.rc_context(svg.STYLE):
    figure = svg.empty_figure(3.1 if apart else 4.4, 8.4 if apart else svg.WIDTH)
    panels = figure.subplots(*(1, len(labels)) if apart else (2, 1), sharex=True)
    of_sigma, of_log_snr = panels[-2:]
    for number, (name, (t, alpha, sigma)) in enumerate(curves.items()):
      line = dict(color=PALETTE[number % len(PALETTE)], linewidth=1.6)
      if scales or not apart:
        panels[0].plot(t, _with_gaps(alpha), **line)
      of_sigma.plot(t, _with_gaps(sigma), linestyle='-' if apart else '--', **line)
      of_log_snr.plot(t, _log_snr(alpha, sigma), label=svg.visible(name), **line)
    for axes, label in zip(panels, labels, strict=True):
      svg.plain_axes(axes, 't' if apart or axes is of_log_snr else '', label)
    if any(np.max(sigma) > 3 for _, _, sigma in curves.values()):
      of_sigma.set_yscale('log')
      svg.log_axis(of_sigma.yaxis)
    if len(curves) > 1:
      svg.legend_below(figure, of_log_snr, 6 if apart else 3)
    return svg.render(figure, title)


def _log_snr(alpha: np.ndarray, sigma: np.ndarray) -> np.ndarray:
  with np.errstate(divide='ignore'):
    value = 2 * (np.log(alpha) - np.log(sigma))
  return np.where(np.abs(value) > _MAX_LOG_SNR, np.nan, value)


def _with_gaps(values: np.ndarray) -> np.ndarray:
  return np.where(np.isfinite(values), values, np.nan)
