"""Pictures that people name: which pixels are taken, and what is refused."""

import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from diffusion_jax.data.images import read_image
from diffusion_jax.errors import UserError


@pytest.fixture
def path(tmp_path):
  return tmp_path / 'picture.png'


def test_the_central_square_is_scaled(path):
  pixels = np.zeros((8, 24, 3), np.uint8)
  pixels[:, 8:16] = 200
  Image.fromarray(pixels).save(path)
  found = read_image(path, 4)
  assert found.shape == (4, 4, 3) and found.dtype == np.uint8 and (found == 200).all()


@pytest.mark.parametrize('mode', ['1', 'L', 'LA', 'P', 'RGB', 'RGBA', 'CMYK'])
def test_every_mode_becomes_rgb(tmp_path, mode):
  path = tmp_path / f'picture.{"tiff" if mode == "CMYK" else "png"}'
  Image.new('RGB', (6, 6), 'white').convert(mode).save(path)
  np.testing.assert_array_equal(read_image(path, 6), np.full((6, 6, 3), 255))


def test_transparent_places_are_white(path):
  Image.new('RGBA', (4, 4), (255, 0, 0, 0)).save(path)
  assert (read_image(path, 4) == 255).all()


def test_a_photograph_is_turned_upright(tmp_path):
  pixels = np.zeros((8, 8, 3), np.uint8)
  pixels[:4] = 255
  exif = Image.Exif()
  exif[0x0112] = 6  # To be turned clockwise by a quarter.
  Image.fromarray(pixels).save(tmp_path / 'a.png', exif=exif)
  found = read_image(tmp_path / 'a.png', 8)
  assert (found[:, 4:] == 255).all() and (found[:, :4] == 0).all()


def test_a_strip_is_not_blown_up(path):
  Image.new('L', (100_000, 1)).save(path)
  assert read_image(path, 64).shape == (64, 64, 3)


def test_pictures_that_are_none(tmp_path, path):
  with pytest.raises(UserError, match='cannot be read'):
    read_image(path, 4)
  path.write_bytes(b'no picture')
  with pytest.raises(UserError, match='cannot be read'):
    read_image(path, 4)
  with pytest.raises(UserError, match='cannot be read'):
    read_image(tmp_path, 4)
  Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)).save(path)
  path.write_bytes(path.read_bytes()[:200])
  with pytest.raises(UserError, match='cannot be read'):
    read_image(path, 4)
  Image.fromarray(np.zeros((4, 4), np.uint16)).save(path)
  with pytest.raises(UserError, match='8 bits'):
    read_image(path, 4)


@pytest.mark.parametrize('edge', [8_200, 12_000, 100_000])
def test_a_huge_picture_is_refused_by_its_header(path, recwarn, edge):
  """The file holds no pixels at all: decoding it would fail with other words."""
  chunk = lambda kind, data: (
    struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))
  )
  header = struct.pack('>IIBBBBB', edge, edge, 8, 2, 0, 0, 0)
  start = b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', header)
  path.write_bytes(start + chunk(b'IDAT', b'') + chunk(b'IEND', b''))
  with pytest.raises(UserError, match='pixels'):
    read_image(path, 4)
  assert not recwarn.list
