"""Sequences: signals of known spectra, outlines, and numbers of a file."""

import numpy as np
import pytest

from diffusion_jax.config import DataConfig
from diffusion_jax.data.sources import open_data, sequences
from diffusion_jax.errors import UserError

LENGTH = 48


@pytest.mark.parametrize('name', sequences.FORMULAS)
def test_signals_have_their_covariance_and_spectrum(name):
  """The mean over signals is what the formulas say, within what chance does to 8,192 of them."""
  train, test = open_data(DataConfig(name, size=LENGTH))
  x = train.values[..., 0].astype(np.float64)
  assert (train.values.shape, test.values.shape) == ((8192, LENGTH, 1), (1024, LENGTH, 1))
  covariance = sequences.FORMULAS[name][1](LENGTH)
  np.testing.assert_allclose(x[:, :1].T @ x / len(x), covariance[None], atol=0.05)
  ratio = sequences.periodogram(train.values) / train.spectrum
  assert np.abs(ratio - 1).max() < 0.08  # Its deviation is 1 / sqrt(8192) = .011 at most.
  # Parseval: power is that of the signal.
  full = np.concatenate([train.spectrum, train.spectrum[1:-1]])
  assert full.mean() == pytest.approx(1)


def test_an_autoregressive_signal_follows_its_recursion():
  """What is left of x_t after its two predecessors is white, of the variance of the formula."""
  x = open_data(DataConfig('autoregressive', size=LENGTH))[0].values[..., 0].astype(np.float64)
  first, second = 2 * 0.9 * np.cos(np.pi / 6), -0.81
  rest = x[:, 2:] - first * x[:, 1:-1] - second * x[:, :-2]
  assert np.corrcoef(rest[:, 1:].ravel(), rest[:, :-1].ravel())[0, 1] == pytest.approx(0, abs=0.01)
  rho = sequences.autoregressive_covariance(3)
  assert rest.var() == pytest.approx(1 - first * rho[1] - second * rho[2], rel=0.01)


def test_the_outline_of_a_disc_is_a_circle_and_of_a_square_its_edge():
  y, x = np.mgrid[:64, :64]
  disc = np.where((x - 30) ** 2 + (y - 28) ** 2 < 20**2, 0, 255).astype(np.uint8)
  points = sequences.outline(np.repeat(disc[..., None], 3, axis=-1), 40)
  radius = np.hypot(*points.T)
  assert radius.std() < 0.03 * radius.mean()
  assert points.std() == pytest.approx(1, rel=1e-5)
  assert points[0, 0] == pytest.approx(points[:, 0].max())
  turn = np.diff(np.unwrap(np.arctan2(points[:, 1], points[:, 0])))
  assert (np.sign(turn) == np.sign(turn[0])).all()
  empty = sequences.outline(np.full((64, 64, 3), 255, np.uint8), 40)
  assert empty.shape == (40, 2) and not empty.any()


def test_numbers_of_a_file_are_standardised_and_split(tmp_path):
  path = tmp_path / 'mine.npy'
  values = np.random.default_rng(0).normal(5, 3, (40, LENGTH, 2))
  np.save(path, values)
  train, test = open_data(DataConfig(f'sequences:{path}', size=LENGTH))
  assert (len(train), len(test)) == (36, 4)
  assert train[3]['sequence'].dtype == np.float32
  together = np.concatenate([train.values, test.values])
  np.testing.assert_allclose(together.mean(axis=(0, 1)), 0, atol=1e-5)
  np.testing.assert_allclose(together.std(axis=(0, 1)), 1, atol=1e-5)
  np.testing.assert_allclose(
    np.corrcoef(train.values.ravel(), values[:36].ravel())[0, 1], 1, atol=1e-2
  )


@pytest.mark.parametrize(('values', 'said'), [
  (np.zeros((4, LENGTH)), 'a channel that is constant'),
  (np.ones((4, LENGTH + 1)), f'sequences of {LENGTH + 1} places'),
  (np.full((4, LENGTH), np.nan), 'not finite'),
  (np.zeros(5), 'must hold numbers'),
  (np.array([['a'] * LENGTH] * 4), 'must hold numbers'),
  (np.array([{}] * 4, object), 'cannot be read as numbers'),
  (None, 'cannot be read as numbers'),
])
def test_a_file_that_cannot_be_used_is_refused(tmp_path, values, said):
  path = tmp_path / 'mine.npy'
  path.write_bytes(b'\x93NUMPY') if values is None else np.save(path, values, allow_pickle=True)
  with pytest.raises(UserError, match=said):
    open_data(DataConfig(f'sequences:{path}', size=LENGTH))
