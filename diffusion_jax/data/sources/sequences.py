"""Sequences: signals made by formula whose spectra are known, outlines of drawings, own arrays."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from diffusion_jax.config import DataConfig
from diffusion_jax.data.sources import OF_FOLDERS, open_data, square_of, without_effect
from diffusion_jax.data.sources.arrays import ArraySource
from diffusion_jax.data.unreadable import readable
from diffusion_jax.errors import UserError, require

COUNTS = {'train': (0, 8_192), 'test': (1, 1_024)}
"""Seed and number of the signals of each split."""
MOST_LENGTH, MOST_VALUES = 4_096, 2**27
DRAWING_SIZE = 64
TEST_FRACTION = 0.1


class Sequences(ArraySource):
  """Records with 'sequence', float32 [length channels].

  spectrum: the mean periodogram that is known of them, see `periodogram`, or None. plane: whether
  the two channels are points in the plane, in order.
  """

  def __init__(
    self, values: Float[np.ndarray, 'n l c'], spectrum: np.ndarray | None = None,
    plane: bool = False,
  ):
    super().__init__({'sequence': values})
    self.values, self.spectrum, self.plane = values, spectrum, plane


def periodogram(x: Float[np.ndarray, 'n l c']) -> Float[np.ndarray, 'f c']:
  """Return the mean of |X(f)|^2 / l over sequences, at frequencies 0, 1/l, ... 1/2 a place."""
  return (np.abs(np.fft.rfft(x, axis=1)) ** 2).mean(axis=0) / x.shape[1]


def expected_periodogram(covariance: Float[np.ndarray, ' l']) -> Float[np.ndarray, 'f 1']:
  """Return what a periodogram of l places is in the mean, of a stationary signal.

  covariance: at lags 0 to l - 1. The sum over lags of (1 - |lag| / l) covariance(lag)
  exp(-2 pi i f lag) (Priestley 1981, eq. 6.2.12).
  """
  length = len(covariance)
  weighted = covariance * (1 - np.arange(length) / length)
  return (2 * np.fft.rfft(weighted).real - weighted[0])[:, None]


RADIUS, PERIOD = 0.9, 12
"""Of the poles r exp(+-iw) of the autoregressive process: r, and 2 pi / w in places, which is the
period of its spectrum's peak."""


def autoregressive(rng: np.random.Generator, count: int, length: int) -> np.ndarray:
  """Return x_t = 2 r cos(w) x_{t-1} - r^2 x_{t-2} + noise, stationary, of unit variance: [n l]."""
  root = np.linalg.cholesky(_toeplitz(autoregressive_covariance(length)))
  return rng.standard_normal((count, length)) @ root.T


def autoregressive_covariance(length: int) -> np.ndarray:
  """Return the covariance of `autoregressive` at lags 0 to length - 1 (Yule-Walker equations)."""
  first, second = 2 * RADIUS * np.cos(2 * np.pi / PERIOD), -(RADIUS**2)
  found = [1.0, first / (1 - second)]
  while len(found) < length:
    found.append(first * found[-1] + second * found[-2])
  return np.asarray(found[:length])


SINES = {8.0: 0.8, 3.2: 0.4}
"""Amplitude (root of the variance) of each period, in places; noise makes up the rest."""


def sines(rng: np.random.Generator, count: int, length: int) -> np.ndarray:
  """Return sums of two sines of known periods and random phases, and noise, of unit variance."""
  time = np.arange(length)
  noise = 1 - sum(amplitude**2 for amplitude in SINES.values())
  x = np.sqrt(noise) * rng.standard_normal((count, length))
  for period, amplitude in SINES.items():
    phase = 2 * np.pi * rng.random((count, 1))
    x += np.sqrt(2) * amplitude * np.sin(2 * np.pi * time / period + phase)
  return x


def sines_covariance(length: int) -> np.ndarray:
  """Return the covariance of `sines` at lags 0 to length - 1."""
  lags = np.arange(length)
  parts = [a**2 * np.cos(2 * np.pi * lags / period) for period, a in SINES.items()]
  total = np.sum(parts, axis=0)
  total[0] = 1.0
  return total


def _toeplitz(covariance: np.ndarray) -> np.ndarray:
  lags = np.arange(len(covariance))
  return covariance[np.abs(lags[:, None] - lags)]


FORMULAS: dict[str, tuple[Callable, Callable]] = {
  'autoregressive': (autoregressive, autoregressive_covariance),
  'sines': (sines, sines_covariance),
}
"""How signals are drawn, and their covariance."""


def _length(config: DataConfig) -> int:
  length = square_of(config)
  if not 2 <= length <= MOST_LENGTH:
    raise UserError(f'data.size is {length}; give the places of a sequence, 2 to {MOST_LENGTH:,}.')
  return length


def signals(config: DataConfig) -> tuple[Sequences, Sequences]:
  """(train, test) of signals by formula, `data.size` places long."""
  without_effect(config, 'signals', *OF_FOLDERS)
  length = _length(config)
  draw, covariance = FORMULAS[config.dataset]
  spectrum = expected_periodogram(covariance(length))
  train, test = (
    Sequences(
      draw(np.random.default_rng(seed), count, length)[..., None].astype(np.float32), spectrum
    )
    for seed, count in COUNTS.values()
  )
  return train, test


def outlines(config: DataConfig) -> tuple[Sequences, Sequences]:
  """(train, test) of the outlines of OpenMoji's drawings: `data.size` points in the plane each."""
  without_effect(config, 'outlines', *OF_FOLDERS)
  length = _length(config)
  drawings = open_data(dataclasses.replace(config, dataset='openmoji', size=DRAWING_SIZE))
  train, test = (
    Sequences(
      np.stack([outline(record['image'], length) for record in readable(source)]), plane=True
    )
    for source in drawings
  )
  return train, test


def outline(image: UInt8[np.ndarray, 'h w 3'], points: int) -> Float[np.ndarray, 'n 2']:
  """Return the longest outline of what is not white: x and y, upwards, of points at equal
  distances, from the one that is rightmost, around the mean, of unit variance."""
  from contourpy import contour_generator

  ink = 255.0 - np.pad(image, ((1, 1), (1, 1), (0, 0)), constant_values=255).min(axis=-1)
  lines = contour_generator(z=ink).lines(32.0)
  steps = lambda line: np.linalg.norm(np.diff(line, axis=0), axis=1)
  line = max(lines, key=lambda line: steps(line).sum(), default=np.zeros((2, 2)))
  line = np.roll(line[:-1], -int(line[:-1, 0].argmax()), axis=0)
  line = np.concatenate([line, line[:1]])
  along = np.concatenate([[0], np.cumsum(steps(line))])
  at = np.linspace(0, along[-1], points, endpoint=False)
  found = np.stack([np.interp(at, along, line[:, 0]), np.interp(at, along, -line[:, 1])], axis=-1)
  found -= found.mean(axis=0)
  return (found / max(found.std(), 1e-6)).astype(np.float32)


def from_file(config: DataConfig) -> tuple[Sequences, Sequences]:
  """(train, test) of 'sequences:FILE.npy', numbers [n length] or [n length channels].

  Channels are brought to mean 0 and variance 1; the last tenth of the rows is the test split.
  """
  without_effect(config, 'arrays', *OF_FOLDERS)
  path = Path(config.dataset.partition(':')[2])
  values, length = _read(path), _length(config)
  if values.shape[1] != length:
    raise UserError(f'{path} has sequences of {values.shape[1]} places; set data.size to that.')
  deviation = values.std(axis=(0, 1))
  require(bool((deviation > 0).all()), f'{path} has a channel that is constant; leave it out.')
  values = (values - values.mean(axis=(0, 1))) / deviation
  rows = max(1, round(TEST_FRACTION * len(values)))
  return Sequences(values[:-rows]), Sequences(values[-rows:])


def _read(path: Path) -> Float[np.ndarray, 'n l c']:
  """Return the numbers of an npy file. UserError: it cannot be read, is too large, or has other
  things in it than numbers."""
  try:
    values: Any = np.load(path, mmap_mode='r', allow_pickle=False)
  except (OSError, ValueError) as error:
    raise UserError(
      f'{path} cannot be read as numbers ({error}); save it by numpy.save.'
    ) from error
  shape = getattr(values, 'shape', ())
  require(
    len(shape) in (2, 3) and shape[0] >= 2 and 0 < values.size <= MOST_VALUES
    and values.dtype.kind in 'fiu',
    f'{path} must hold numbers [n length] or [n length channels], at least 2 sequences and at most '
    f'{MOST_VALUES:,} numbers, not {getattr(values, "dtype", "several arrays")} {list(shape)}.',
  )
  values = np.asarray(values, np.float32).reshape(*shape[:2], -1)
  require(bool(np.isfinite(values).all()), f'{path} has numbers that are not finite; mend them.')
  return values
