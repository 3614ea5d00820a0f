"""Random masks for inpainting."""

import jax
import numpy as np

from diffusion_jax.pipelines.image_conditioners import WHOLE, random_masks


def test_masks_are_rectangles_or_everything():
  n, edge = 800, 32
  one = np.asarray(random_masks(jax.random.key(0), (n, edge, 48), 1))
  assert one.shape == (n, edge, 48) and one.dtype == bool
  whole = one.all(axis=(1, 2))
  assert abs(whole.mean() - WHOLE) < 4.5 * (WHOLE * (1 - WHOLE) / n) ** 0.5
  for mask in one[~whole]:
    rows, columns = mask.any(axis=1), mask.any(axis=0)
    np.testing.assert_array_equal(mask, rows[:, None] & columns)  # A product: of two intervals.
    for line in (rows, columns):
      assert np.abs(np.diff(line.astype(int))).sum() <= 2
      assert 1 / 8 - 1 / 32 <= line.mean() <= 5 / 8 + 1 / 32
  covered = one[~whole].mean(axis=0)
  assert covered[16, 24] > covered[3, 4] > 0 and covered[16, 24] > covered[28, 43] > 0


def test_several_rectangles_cover_more():
  one, four = (
    np.asarray(random_masks(jax.random.key(1), (400, 16, 16), count)) for count in (1, 4)
  )
  assert four.mean() > one.mean() + 0.1
