"""Grids by their pixels, PNG files by reading them back."""

import numpy as np
import pytest
from PIL import Image

from diffusion_jax.errors import UserError
from diffusion_jax.viz import grids
from diffusion_jax.viz.grids import Overview, framed, make_grid, save_png


def _solid(*colours, h=6, w=8):
  return np.stack([np.full((h, w, 3), colour, np.uint8) for colour in colours])


def test_images_lie_where_the_docstring_says():
  images = _solid(10, 60, 110, 160, 210)
  grid = np.asarray(make_grid(images, 3, scale=2, padding=5))
  h, w = 12, 16
  assert grid.shape == (5 + 2 * (h + 5), 5 + 3 * (w + 5), 3)
  covered = np.zeros(grid.shape[:2], bool)
  for i, value in enumerate((10, 60, 110, 160, 210)):
    y, x = 5 + i // 3 * (h + 5), 5 + i % 3 * (w + 5)
    assert (grid[y : y + h, x : x + w] == value).all()
    covered[y : y + h, x : x + w] = True
  assert (grid[~covered] == 255).all()


def test_scale_repeats_pixels():
  image = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(1, 2, 3, 3)
  grid = np.asarray(make_grid(image, 4, scale=3, padding=0))
  np.testing.assert_array_equal(grid, image[0].repeat(3, 0).repeat(3, 1))


def test_captions_are_drawn_below_their_own_image_only():
  images = _solid(0, 0, h=20, w=80)
  grid = np.asarray(make_grid(images, 2, ['man farmer', ''], padding=4))
  bare = np.asarray(make_grid(images, 2, padding=4))
  assert grid.shape[0] > bare.shape[0] + 8 and grid.shape[1] == bare.shape[1]
  np.testing.assert_array_equal(grid[:24], bare[:24])
  assert (grid[24:, :84] < 128).any()  # Ink.
  assert (grid[24:, 84:] == 255).all()


def test_an_overview_shows_the_first_and_stays_small():
  overview = Overview(10_000)
  for i in range(300):
    overview.add(np.full((1000, 1000, 3), i % 251, np.uint8))
  grid = overview.grid(['c'] * 256)
  pixels, cell = np.asarray(grid), (grid.width - 4) // 16 - 4
  assert cell == 334 and grid.width * grid.height < 2**26
  for i in (0, 17, 255):
    y, x = 4 + i // 16 * (grid.height - 4) // 16, 4 + i % 16 * (cell + 4)
    assert (pixels[y : y + cell, x : x + cell] == i % 251).all()
  few = Overview(3)
  for image in (images := _solid(0, 90, 200, h=64, w=64)):
    few.add(image)
  np.testing.assert_array_equal(few.grid('abc'), make_grid(images, 2, 'abc', scale=3))


@pytest.mark.parametrize('caption', ['word '  * 200, 'x' * 500, 'a\nb\tc ' * 50])
def test_long_captions_stay_in_their_cell(caption):
  images = _solid(0, 0, h=20, w=80)
  grid = np.asarray(make_grid(images, 2, [caption, ''], padding=10))
  three = np.asarray(make_grid(images, 2, ['aaaaaaaa bbbbbbbb cccccccc', ''], padding=10))
  assert grid.shape == three.shape
  assert (grid[30:, 92:] == 255).all()  # One pixel of antialiasing past the cell is allowed.
  assert (grid[-10:] == 255).all()


def test_an_ellipsis_marks_what_was_cut():
  images = _solid(0, h=20, w=80)
  cut = make_grid(images, 1, ['one two three four five six seven eight nine ten eleven'])
  other = make_grid(images, 1, ['one two three four five six seven eight nine ten twelve'])
  np.testing.assert_array_equal(np.asarray(cut), np.asarray(other))
  # The words that fit, without the cut, look different: the ellipsis is ink.
  font = grids.ImageFont.load_default(size=10)
  lines = grids._wrap('one two three four five six seven eight nine ten eleven', font, 80)
  assert len(lines) == 3 and lines[-1].endswith('…')
  assert all(font.getlength(line) <= 80 for line in lines)
  assert grids._wrap('short', font, 80) == ['short']
  assert grids._wrap('wordy medium-light', font, 64) == ['wordy', 'medium-', 'light']


def test_captions_of_any_script_do_not_fail():
  captions = ['狐 🦊 été', 'lone \udc80 surrogate']
  grid = np.asarray(make_grid(_solid(255, 255, h=20, w=80), 2, captions))
  left, right = np.split(grid, 2, axis=1)
  assert left.min() < 128 and right.min() < 128  # Both captions left ink on the white.


def test_accents_and_cyrillic_have_their_own_glyphs():
  # A font without a letter draws the same box for all of them.
  images = _solid(0, h=20, w=80)
  drawn = [np.asarray(make_grid(images, 1, [letter])).tobytes() for letter in 'éüñжλ']
  assert len(set(drawn)) == 5


@pytest.mark.parametrize(
  'arguments, message',
  [
    ((_solid(0).astype(float), 1), 'to_uint8'),
    ((_solid(0)[0], 1), 'to_uint8'),
    ((_solid(0)[:0], 1), 'to_uint8'),
    ((_solid(0), 0), 'columns'),
    ((_solid(0), 1, None, 0), 'scale'),
    ((_solid(0), 1, ['a', 'b']), 'caption'),
  ],
)
def test_mistakes_are_refused(arguments, message):
  with pytest.raises(UserError, match=message):
    make_grid(*arguments)


def test_png_metadata_and_pixels_come_back(tmp_path):
  image = make_grid(_solid(1, 2, 3), 2)
  metadata = {'prompt': 'a 狐 🦊 & <b>', 'plain': 'café', 'config': '{"a": 1}\nline', 'empty': ''}
  path = tmp_path / 'samples' / 'step_00000001.png'
  save_png(image, path, metadata)
  with Image.open(path) as read:
    assert read.text == metadata
    np.testing.assert_array_equal(np.asarray(read), np.asarray(image))
  assert list(path.parent.iterdir()) == [path]


def test_a_failed_write_leaves_the_old_file_alone(tmp_path, monkeypatch):
  path = tmp_path / 'a.png'
  save_png(make_grid(_solid(1), 1), path, {})
  before = path.read_bytes()

  def fail(self, file, **_):
    file.write(b'half')
    raise OSError('no space left')

  monkeypatch.setattr(Image.Image, 'save', fail)
  with pytest.raises(OSError):
    save_png(make_grid(_solid(2), 1), path, {})
  assert path.read_bytes() == before
  assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize('key', ['', 'k' * 80, 'ключ', 'a\0b'])
def test_impossible_metadata_keys_are_refused(tmp_path, key):
  with pytest.raises(UserError, match='PNG metadata'):
    save_png(make_grid(_solid(1), 1), tmp_path / 'a.png', {key: 'x'})


def test_images_of_several_sizes_stand_in_the_middle_of_white():
  wide, tall = np.zeros((2, 6, 3), np.uint8), np.full((4, 2, 3), 9, np.uint8)
  found = framed([wide, tall])
  assert found.shape == (2, 4, 6, 3) and found.dtype == np.uint8
  np.testing.assert_array_equal(found[0, 1:3], wide)
  np.testing.assert_array_equal(found[1, :, 2:4], tall)
  assert (found[0, [0, 3]] == 255).all() and (found[1][:, [0, 1, 4, 5]] == 255).all()
