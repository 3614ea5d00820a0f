"""PSNR by hand; SSIM against its formula, window by window."""

import numpy as np
import pytest

from diffusion_jax.errors import UserError
from diffusion_jax.evaluation.metrics.images import psnr, psnr_of_each, ssim, ssim_of_each


def test_psnr_by_hand():
  x = np.zeros((2, 4, 4, 3))
  y = np.stack([np.full((4, 4, 3), 0.2), np.full((4, 4, 3), -0.02)])
  # Errors a tenth and a hundredth of the peak of 2: 20 and 40 dB, averaged per image.
  assert psnr(x, y) == pytest.approx(30.0, abs=1e-9)
  assert psnr_of_each(x, y) == pytest.approx([20, 40])
  assert psnr(x - 1, x + 1) == pytest.approx(0.0, abs=1e-9)
  assert psnr(x, x) == np.inf


def test_psnr_refuses_other_shapes():
  with pytest.raises(UserError, match='pairs'):
    psnr(np.zeros((2, 4, 4, 3)), np.zeros((1, 4, 4, 3)))


def _windows(x, y):
  """SSIM of two images [h w] by its definition: each window written out, in float64."""
  offsets = np.arange(-5, 6)
  weights = np.exp(-(offsets[:, None] ** 2 + offsets**2) / (2 * 1.5**2))
  weights /= weights.sum()
  c1, c2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2
  values = []
  for i in range(5, x.shape[0] - 5):
    for j in range(5, x.shape[1] - 5):
      a, b = (v[i - 5 : i + 6, j - 5 : j + 6] for v in (x, y))
      mean_a, mean_b = (weights * a).sum(), (weights * b).sum()
      var_a, var_b = (weights * (a - mean_a) ** 2).sum(), (weights * (b - mean_b) ** 2).sum()
      covariance = (weights * (a - mean_a) * (b - mean_b)).sum()
      values.append(
        (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
        / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
      )
  return np.mean(values)


def test_ssim_is_its_definition_window_by_window():
  rng = np.random.default_rng(0)
  x = np.clip(np.cumsum(rng.normal(size=(3, 17, 14, 2)) * 0.3, axis=1), -1, 1)
  y = np.clip(x + rng.normal(size=x.shape) * [[[[0.02]]], [[[0.2]]], [[[1.0]]]], -1, 1)
  wanted = [
    np.mean([_windows(x[i, ..., c], y[i, ..., c]) for c in range(2)]) for i in range(3)
  ]
  assert wanted[0] > 0.95 > 0.5 > wanted[2]
  np.testing.assert_allclose(ssim_of_each(x, y), wanted, atol=2e-6)
  assert ssim(x, y) == pytest.approx(np.mean(wanted), abs=2e-6)


def test_ssim_of_equal_opposite_and_flat_images():
  x = np.random.default_rng(0).uniform(-1, 1, size=(1, 16, 16, 3))
  assert ssim(x, x) == pytest.approx(1, abs=1e-6)
  # Windows of mean 0, so that only the structure counts.
  board = np.indices((16, 16)).sum(axis=0)[None, ..., None] % 2 * 2.0 - 1
  assert ssim(board, -board) == pytest.approx(-1, abs=0.01)
  # Flat images have no structure: (2 a b + c1) / (a^2 + b^2 + c1) with c1 = 0.02^2.
  flat = lambda value: np.full((1, 12, 12, 1), value)
  assert ssim(flat(0.5), flat(0.1)) == pytest.approx(0.1004 / 0.2604, rel=1e-5)


@pytest.mark.parametrize('x, y, message', [
  (np.zeros((2, 16, 16, 3)), np.zeros((1, 16, 16, 3)), 'pairs'),
  (np.zeros((1, 10, 16, 3)), np.zeros((1, 10, 16, 3)), '11 pixels'),
  (np.zeros((0, 16, 16, 3)), np.zeros((0, 16, 16, 3)), 'pairs'),
])
def test_ssim_refuses_what_has_no_windows(x, y, message):
  with pytest.raises(UserError, match=message):
    ssim(x, y)
