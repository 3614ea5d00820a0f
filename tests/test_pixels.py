"""Bytes to values and back, and other sizes."""

import jax
import numpy as np
import pytest

from diffusion_jax.pixels import LONGEST, resize, size_like, to_float, to_uint8


def test_to_uint8_rounds_clips_and_inverts():
  values = np.array([-1.0, 1.0, -3.0, 3.0, 0.0, np.nan, np.inf, -np.inf])
  assert to_uint8(values).tolist() == [0, 255, 0, 255, 128, 0, 255, 0]
  every = np.arange(256, dtype=np.uint8)
  back = to_uint8(to_float(every))
  assert back.dtype == np.uint8
  np.testing.assert_array_equal(back, every)
  # 0.6 of a level rounds up, 0.4 down: truncation would fail the first.
  assert to_uint8(np.array([10.6, 10.4]) / 127.5 - 1).tolist() == [11, 10]


def test_to_float_is_alike_in_numpy_and_in_a_program():
  every = np.arange(256, dtype=np.uint8)
  # A compiler may multiply by the reciprocal.
  np.testing.assert_allclose(to_float(every), jax.jit(to_float)(every), rtol=0, atol=1.2e-7)
  assert to_float(every).dtype == np.float32
  assert to_float(every)[[0, 255]].tolist() == [-1, 1]
  np.testing.assert_array_equal(to_float(every, np.float64), every / 127.5 - 1)


def test_resize_keeps_a_solid_image_and_any_number_of_channels():
  for channels in (1, 3):
    image = np.full((4, 6, channels), 77, np.uint8)
    np.testing.assert_array_equal(resize(image, 5, 3), np.full((5, 3, channels), 77))


@pytest.mark.parametrize(('picture', 'area', 'multiple', 'wanted'), [
  ((9, 9), 512**2, 8, (512, 512)), ((1000, 1001), 512**2, 8, (512, 512)),
  ((768, 512), 768 * 512, 64, (768, 512)), ((512, 768), 768 * 512, 64, (512, 768)),
  ((480, 640), 512**2, 8, (440, 592)), ((9, 16), 1024**2, 64, (768, 1344)),
  ((1, 100), 512**2, 8, (256, 1024)), ((1, 1), 1, 8, (8, 8)),
])
def test_a_size_follows_the_aspect_of_a_picture(picture, area, multiple, wanted):
  assert size_like(*picture, area, multiple) == wanted


def test_a_size_is_near_the_aspect_and_the_area_it_follows():
  """Of steps that are an eighth of the edge: a tenth off each at most."""
  for picture in np.random.default_rng(0).integers(100, 400, (200, 2)):
    height, width = size_like(*picture, 64**2, 8)
    assert height % 8 == width % 8 == 0
    assert abs(np.log(height / width * picture[1] / picture[0])) < 0.13
    assert abs(np.log(height * width / 64**2)) < 0.25
  assert LONGEST == 4
