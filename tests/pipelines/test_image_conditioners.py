"""Random masks for inpainting, small images for upscaling."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.errors import UserError
from diffusion_jax.pipelines.conditioners import Context
from diffusion_jax.pipelines.image_conditioners import WHOLE, LowResolution, random_masks
from diffusion_jax.pipelines.spaces import PixelSpace
from tests import tiny


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


def test_an_upscaler_is_trained_on_small_images_with_noise_of_known_levels():
  """Of equal images the small one is the same, and its noise has the table's variance."""
  made, parts = LowResolution.build({'beta_start': 1e-4, 'beta_end': 0.02}, Context(PixelSpace(4)))
  assert (made.channels, parts) == (3, {})
  images = jnp.full((64, 32, 32, 3), 0.5)
  found = made.of_batch({}, {'image': images}, jax.random.key(0))
  level = np.asarray(found['labels'])
  assert level.min() >= 0 and 300 < level.max() <= 350
  bar = np.cumprod(1 - np.linspace(1e-2, 0.02**0.5, 1000) ** 2)[level].reshape(-1, 1, 1, 1)
  noise = (np.asarray(found['image']) - 0.5 * bar**0.5) / (1 - bar) ** 0.5
  assert noise.shape == (64, 8, 8, 3) and abs(noise.mean()) < 0.05 and abs(noise.std() - 1) < 0.05
  with pytest.raises(UserError, match='give the denoiser num_class_embeds above 350'):
    made.check(tiny.UNET)
