"""Large pictures are read at reduced size, in little memory."""

import json
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from PIL import Image

from diffusion_jax.data.images import read_pixels, read_square
from diffusion_jax.errors import Unreadable

READ = """
import json, sys
import numpy as np
from PIL import Image
from diffusion_jax.data.images import read_pixels, read_square

def peak():
  with open('/proc/self/status') as file:
    return next(int(line.split()[1]) for line in file if line.startswith('VmHWM')) / 1024

Image.new('RGB', (8, 8)).resize((4, 4), Image.Resampling.BICUBIC)
path, found = sys.argv[1], []
sizes = read_square(path, 64)[1]
for read in (lambda: read_square(path, 64)[0], lambda: read_pixels(path)):
  before = peak()
  pixels = read()
  found.append([peak() - before, pixels.shape, pixels.reshape(-1, 3).mean(0).tolist()])
print(json.dumps([sizes, found]))
"""


def read_alone(path):
  """((height, width), [MB, shape, mean] of a square of 64 pixels and of all), in a new process."""
  done = subprocess.run(
    [sys.executable, '-c', READ, str(path)], capture_output=True, text=True, check=True
  )
  return json.loads(done.stdout)


@pytest.mark.parametrize(('name', 'mode', 'size', 'options', 'most'), [
  ('a.jpg', 'RGB', (8192, 8192), {'quality': 30}, 300),
  ('a.png', 'RGBA', (8192, 8192), {'compress_level': 1}, 300),
  pytest.param('a.gif', 'P', (8192, 8192), {}, 300, marks=pytest.mark.slow),
  pytest.param('a.png', '1', (16384, 16384), {'compress_level': 1}, 300, marks=pytest.mark.slow),
  pytest.param('a.bmp', 'RGB', (8192, 8192), {}, 400, marks=pytest.mark.slow),
  pytest.param('a.webp', 'RGB', (8192, 8192), {'method': 0}, 1100, marks=pytest.mark.slow),
])
def test_memory_and_sizes_of_large_pictures(tmp_path, name, mode, size, options, most):
  """Half black, half red (white, with one bit), turned by nothing: the mean is known."""
  colors = {'1': (0, 1), 'P': (0, 1), 'RGBA': ((0, 0, 0, 255), (200, 0, 0, 255))}
  black, red = colors.get(mode, ((0, 0, 0), (200, 0, 0)))
  image = Image.new(mode, size, black)
  if mode == 'P':
    image.putpalette([0, 0, 0, 200, 0, 0])
  image.paste(red, (0, 0, size[0] // 2, size[1]))
  image.save(tmp_path / name, **options)
  sizes, (square, whole) = read_alone(tmp_path / name)
  edge = size[0] // (4 if size[0] > 10_000 else 2)
  assert sizes == [size[1], size[0]]
  assert square[1] == [64, 64, 3] and whole[1] == [edge, edge, 3]
  mean = [127.5] * 3 if mode == '1' else [100, 0, 0]
  np.testing.assert_allclose([square[2], whole[2]], [mean] * 2, atol=3)
  assert square[0] < most and whole[0] < most


@pytest.mark.parametrize('name', ['a.png', 'a.jpg'])
def test_a_large_picture_is_the_mean_of_its_pixels(tmp_path, name):
  """Turned by a quarter, with edges that cannot be halved; Pillow decodes the reference whole."""
  exif = Image.Exif()
  exif[0x0112] = 6
  small = np.random.default_rng(0).integers(0, 256, (41, 64), np.uint8)
  image = Image.fromarray(small).resize((10_241, 6_601), Image.Resampling.BILINEAR)
  image.save(tmp_path / name, exif=exif, **{'compress_level': 1} if name == 'a.png' else {})
  found = read_pixels(tmp_path / name)
  with Image.open(tmp_path / name) as image:
    expected = np.rot90(np.asarray(image.reduce(4)), -1)
  assert found.shape == (*expected.shape, 3)
  most = 0 if name == 'a.png' else 2  # A JPEG's coefficients are cut off in place of a mean.
  assert np.abs(found[..., 1].astype(int) - expected).max() <= most


def test_the_square_of_a_large_strip_keeps_its_pixels(tmp_path):
  """What is beside it would have to be dropped, not halved."""
  pixels = np.random.default_rng(0).integers(0, 256, (64, 2**20), np.uint8)
  image = Image.fromarray(pixels)
  image.save(tmp_path / 'a.png', compress_level=0)
  left = (2**20 - 64) // 2
  found = read_square(tmp_path / 'a.png', 64)[0]
  np.testing.assert_array_equal(found[..., 0], pixels[:, left : left + 64])


def a_png(width, height, kind, data):
  chunk = lambda kind, data: (
    struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))
  )
  return b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', struct.pack('>IIBBBBB', width, height, *kind)) + (
    chunk(b'IDAT', data) + chunk(b'IEND', b'')
  )


@pytest.mark.parametrize(('kind', 'data', 'words'), [
  ((8, 0, 0, 0, 0), zlib.compress(bytes(2**20)), 'truncated'),
  ((8, 0, 0, 0, 0), zlib.compress(bytes(2**26 + 2**13), 1)[:-2000], 'truncated'),
  ((8, 0, 0, 0, 0), b'damaged', 'cannot be read'),
  ((8, 0, 0, 0, 0), b'', 'truncated'),
])
def test_damaged_large_pngs_are_one_sentence(tmp_path, kind, data, words):
  path = tmp_path / 'a.png'
  path.write_bytes(a_png(2**13, 2**13, kind, data))
  with pytest.raises(Unreadable, match=rf'^the image .*{words}[^\n]*$'):
    read_pixels(path)


def test_what_would_take_too_much_memory_is_refused_by_its_header(tmp_path):
  path = tmp_path / 'a.png'
  path.write_bytes(a_png(2**14, 2**14 + 1, (8, 0, 0, 0, 0), b''))
  with pytest.raises(Unreadable, match='16384 x 16385 pixels; give one of at most 268,435,456'):
    read_square(path, 8)
  path.write_bytes(a_png(2**21, 2**5, (8, 0, 0, 0, 0), b''))
  with pytest.raises(Unreadable, match='1,048,576 along an edge'):
    read_square(path, 8)
  Image.new('L', (8, 8)).save(tmp_path / 'a.webp', lossless=True)
  data = bytearray((tmp_path / 'a.webp').read_bytes())
  at = data.index(b'VP8L') + 9
  data[at : at + 4] = struct.pack('<I', (12_000 - 1) | (12_000 - 1) << 14)
  (tmp_path / 'a.webp').write_bytes(data)
  with pytest.raises(Unreadable, match='12000 x 12000 pixels and would take too much'):
    read_square(tmp_path / 'a.webp', 8)
