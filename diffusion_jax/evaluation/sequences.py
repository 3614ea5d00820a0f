"""Score and show a model of sequences: what it draws, and its spectrum beside that of the data."""

import dataclasses
from collections.abc import Iterator

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float

from diffusion_jax.data.sources.sequences import Sequences, periodogram
from diffusion_jax.evaluation import figures
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
from diffusion_jax.evaluation.metrics.kernel import energy_distance
from diffusion_jax.pipelines.sampling import SampleConfig
from diffusion_jax.pipelines.sequences import CANVAS
from diffusion_jax.types import Weights

SHOWN = 15
BATCH = 256
FLOOR = 1e-3
"""Below this fraction of the mean power a frequency counts as if it had that much: -30 dB."""


def decibels(power: np.ndarray, reference: np.ndarray) -> np.ndarray:
  """Return 10 log10 of spectra [f c], none below FLOOR of the reference's mean."""
  return 10 * np.log10(np.maximum(power, FLOOR * reference.mean()))


def spectrum_error(x: Float[np.ndarray, 'n l c'], known: Float[np.ndarray, 'f c']) -> float:
  """Return the mean over frequencies of how far the periodogram of x is off, in decibels."""
  return float(np.abs(decibels(periodogram(x), known) - decibels(known, known)).mean())


@dataclasses.dataclass(frozen=True, eq=False)
class _OfSequences(Cached):
  """sample: how to draw. train, test: the splits."""

  sample: SampleConfig
  train: Sequences
  test: Sequences
  mesh: Mesh

  @property
  def known(self) -> np.ndarray:
    """The spectrum that is known, or that of the training data."""
    known = self.train.spectrum
    return periodogram(self.train.values) if known is None else known

  def draw(self, model, weights: Weights, count: int, seed: int) -> np.ndarray:
    drawn = model.sample(
      weights, [''] * count, self.sample, seed=seed, mesh=self.mesh, batch_size=min(BATCH, count)
    )
    return np.concatenate(list(drawn))


@dataclasses.dataclass(frozen=True, eq=False)
class SequencesPreview(_OfSequences):
  """Some sequences, and the spectrum of all that were drawn beside the known one."""

  name = 'sequences_preview'
  when = SAMPLE
  about = (
    'Drawn sequences, and last the mean power of each frequency in decibels: of these sequences '
    '(blue) and as it is known, or of the training data (grey).'
  )

  def run(self, model, params: Weights, key: jax.Array) -> Iterator[tuple[str, Value]]:
    drawn = self.draw(model, params, BATCH, seed_of(key))
    images = np.concatenate([
      model.space.drawn(drawn[:SHOWN]), spectra_image(periodogram(drawn), self.known)[None],
    ])
    captions = [*(f'sequence {number}' for number in range(SHOWN)), 'spectrum']
    yield 'samples', Picture(images, captions, self.about)


@dataclasses.dataclass(frozen=True, eq=False)
class SequencesScores(_OfSequences):
  """Spectrum error in decibels and energy distance to test sequences; `real`: of others of the
  data, so what chance alone does to as many."""

  samples: int = 256
  baselines: bool = True
  name = 'sequences'
  when = EVALUATE

  def run(self, model, params: Weights, key: jax.Array) -> Iterator[tuple[str, Value]]:
    count = min(self.samples, len(self.test))
    for name, weights in with_untrained(model, params, self.baselines):
      drawn = self.draw(model, weights, count, seed_of(key) + 1)
      yield from named({name: self._scores(drawn)})
    if self.baselines:
      yield from named({'real': self._scores(self.train.values[:count])})
    yield 'settings', {'samples': count}

  def _scores(self, x: np.ndarray) -> dict[str, float]:
    flat = lambda values: values.reshape(len(values), -1)
    return {
      'spectrum_error': spectrum_error(x, self.known),
      'energy_distance': energy_distance(flat(x), flat(self.test.values)),
    }


def spectra_image(drawn: Float[np.ndarray, 'f c'], known: Float[np.ndarray, 'f c']) -> np.ndarray:
  """Draw the power of each frequency in decibels, uint8 [CANVAS CANVAS 3]."""
  figure, axes = figures.bare(CANVAS)
  axes.plot(decibels(known, known), color='0.65', linewidth=2.5)
  axes.plot(decibels(drawn, known), color='#2A8FD0', linewidth=1)
  return figures.drawn(figure)
