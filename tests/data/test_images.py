"""Pictures that people name: which pixels are taken, and what is refused.

Large pictures are read at reduced size, in little memory.
"""

import json
import os
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from diffusion_jax.data.images import read_pixels, read_square
from diffusion_jax.data.transforms import CenterCrop, Resize
from diffusion_jax.errors import Unreadable, UserError


@pytest.fixture
def path(tmp_path):
  return tmp_path / 'picture.png'


def test_the_central_square_is_scaled(path):
  pixels = np.zeros((8, 24, 3), np.uint8)
  pixels[:, 8:16] = 200
  Image.fromarray(pixels).save(path)
  found, _ = read_square(path, 4)
  assert found.shape == (4, 4, 3) and found.dtype == np.uint8 and (found == 200).all()


@pytest.mark.parametrize('mode', ['1', 'L', 'LA', 'P', 'RGB', 'RGBA', 'CMYK'])
def test_every_mode_becomes_rgb(tmp_path, mode):
  path = tmp_path / f'picture.{"tiff" if mode == "CMYK" else "png"}'
  Image.new('RGB', (6, 6), 'white').convert(mode).save(path)
  np.testing.assert_array_equal(read_square(path, 6)[0], np.full((6, 6, 3), 255))


@pytest.mark.parametrize(('name', 'mode', 'options'), [
  ('a.jpg', 'CMYK', {}), ('a.tif', 'CMYK', {}), ('a.jpg', 'L', {}), ('a.bmp', 'L', {}),
  ('a.gif', 'P', {}), ('a.bmp', 'P', {}), ('a.tif', 'P', {}), ('a.png', '1', {}),
  ('a.jpg', 'YCbCr', {'subsampling': 0}), ('a.jpg', 'RGB', {'progressive': True}),
  ('a.webp', 'RGB', {'lossless': True}), ('a.bmp', 'RGB', {}),
])
def test_pixels_are_those_of_pillows_own_conversion(tmp_path, name, mode, options):
  pixels = np.random.default_rng(0).integers(0, 256, (9, 14, 3), np.uint8)
  Image.fromarray(pixels).convert(mode).save(tmp_path / name, **options)
  with Image.open(tmp_path / name) as image:
    assert image.mode == mode or mode in ('YCbCr', '1', 'P')
    wanted = np.asarray(image.convert('RGB'))
  np.testing.assert_array_equal(read_pixels(tmp_path / name), wanted)
  square = Image.fromarray(wanted[:, 2:11]).resize((4, 4), Image.Resampling.BICUBIC)
  np.testing.assert_array_equal(read_square(tmp_path / name, 4)[0], np.asarray(square))


@pytest.mark.parametrize('suffix', ['gif', 'png', 'webp', 'tif'])
def test_of_several_frames_the_first_is_read(tmp_path, suffix):
  rng = np.random.default_rng(0)
  frames = [Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)) for _ in range(3)]
  options = {'lossless': True} if suffix == 'webp' else {}
  path = tmp_path / f'a.{suffix}'
  frames[0].save(path, save_all=True, append_images=frames[1:], **options)
  with Image.open(path) as image:
    assert image.n_frames == 3
    wanted = np.asarray(image.convert('RGB'))
  np.testing.assert_array_equal(read_pixels(path), wanted)


def test_transparent_places_are_white(path):
  Image.new('RGBA', (4, 4), (255, 0, 0, 0)).save(path)
  assert (read_square(path, 4)[0] == 255).all()


def turned(pixels, orientation):
  """As the reference turns it: Pillow, given EXIF data with nothing else in them."""
  image = Image.fromarray(pixels)
  image.getexif()[0x0112] = orientation
  return np.asarray(ImageOps.exif_transpose(image))


@pytest.mark.parametrize('orientation', range(1, 9))
@pytest.mark.parametrize('suffix', ['png', 'jpg', 'webp', 'tif', 'lzw.tif'])
def test_pictures_are_turned_upright(tmp_path, suffix, orientation):
  path = tmp_path / f'a.{suffix}'
  pixels = np.random.default_rng(0).integers(0, 256, (23, 40, 3), np.uint8)
  exif = Image.Exif()
  exif[0x0112] = orientation
  options = {
    'jpg': {'exif': exif}, 'png': {'exif': exif}, 'webp': {'exif': exif, 'lossless': True},
    'tif': {'tiffinfo': {0x0112: orientation}},
    'lzw.tif': {'tiffinfo': {0x0112: orientation}, 'compression': 'tiff_lzw'},
  }[suffix]
  Image.fromarray(pixels).save(path, **options)
  if suffix == 'jpg':
    with Image.open(path) as image:
      pixels = np.asarray(image)
  upright = turned(pixels, orientation)
  np.testing.assert_array_equal(read_pixels(path), upright)
  assert read_square(path, 2)[1] == upright.shape[:2]
  square = CenterCrop(23)({'image': upright})
  np.testing.assert_array_equal(read_square(path, 9)[0], Resize(9)(square)['image'])


def exif_data(*entries, tail=b''):
  """A directory of (tag, kind, count, value as 4 bytes)."""
  rows = b''.join(struct.pack('<HHI', *entry[:3]) + entry[3] for entry in entries)
  return b'Exif\0\0II*\0' + struct.pack('<IH', 8, len(entries)) + rows + bytes(4) + tail


SIX = (0x0112, 3, 1, struct.pack('<HH', 6, 0))


@pytest.mark.parametrize(('exif', 'orientation'), [
  (exif_data((0x0103, 5, 1, struct.pack('<I', 38)), SIX, tail=struct.pack('<II', 1, 3)), 6),
  (exif_data(SIX, (0x8769, 4, 1, struct.pack('<I', 2**31))), 6),
  (exif_data((0x0112, 2, 2, b'6\0\0\0')), 1),
  (exif_data((0x0112, 3, 1, struct.pack('<HH', 9, 0))), 1),
  (exif_data((0x0112, 5, 1, struct.pack('<I', 26)), tail=struct.pack('<II', 6, 0)), 1),
  (exif_data((0x0112, 11, 1, struct.pack('<f', 6))), 1),
  (b'Exif\0\0II*\0' + b'\xff' * 20, 1),
  (b'Exif\0\0nothing', 1),
  (b'Exif\0\0', 1),
])
@pytest.mark.parametrize('suffix', ['png', 'jpg', 'webp'])
def test_only_a_valid_orientation_turns_a_picture(tmp_path, suffix, exif, orientation):
  """And whatever else is wrong with its EXIF data, its pixels are read."""
  path = tmp_path / f'a.{suffix}'
  plain = np.random.default_rng(0).integers(0, 256, (24, 32, 3), np.uint8)
  Image.fromarray(plain).save(path, exif=exif, **{'lossless': True} if suffix == 'webp' else {})
  if suffix == 'jpg':
    Image.fromarray(plain).save(tmp_path / 'b.jpg')
    with Image.open(tmp_path / 'b.jpg') as image:
      plain = np.asarray(image)
  np.testing.assert_array_equal(read_pixels(path), turned(plain, orientation))
  assert read_square(path, 2)[1] == turned(plain, orientation).shape[:2]


def test_damaged_exif_data_never_cost_the_pixels(tmp_path):
  """Three hundred mutants of what a camera writes, each with one to eight bytes changed."""
  path, rng = tmp_path / 'a.png', np.random.default_rng(1)
  pixels = rng.integers(0, 256, (5, 7, 3), np.uint8)
  exif = Image.Exif()
  exif.update({0x010F: 'maker', 0x0112: 6, 0x011A: 72.0, 0x0132: '2020:01:01 00:00:00'})
  exif.get_ifd(0x8769)[0x9003] = '2020:01:01 00:00:00'
  exif.get_ifd(0x8825)[1] = 'N'
  whole = exif.tobytes()
  possible = [turned(pixels, orientation) for orientation in range(1, 9)]
  for _ in range(300):
    data = np.frombuffer(whole, np.uint8).copy()
    places = rng.integers(6, len(data), rng.integers(1, 9))
    data[places] = rng.choice([0, 1, 255, rng.integers(256)], len(places))
    Image.fromarray(pixels).save(path, exif=data.tobytes())
    found = read_pixels(path)
    assert any(np.array_equal(found, one) for one in possible)
    assert read_square(path, 2)[1] == found.shape[:2]


def gray_of(path):
  found = read_pixels(path)
  assert (found == found[..., :1]).all()
  return found[..., 0].tolist()


@pytest.mark.parametrize('suffix', ['png', 'tif'])
def test_sixteen_bits_keep_their_range(tmp_path, suffix):
  """65535 / 257 = 255: nothing is cut off, and halves are rounded."""
  path = tmp_path / f'a.{suffix}'
  values = np.array([[0, 128, 129, 257, 256 * 128, 65535 - 129, 65535 - 128, 65535]], np.uint16)
  Image.fromarray(values).save(path)
  assert gray_of(path) == [[0, 0, 1, 1, 128, 254, 255, 255]]
  Image.fromarray(values.astype('>u2')).save(tmp_path / 'b.tif')
  assert gray_of(tmp_path / 'b.tif') == [[0, 0, 1, 1, 128, 254, 255, 255]]


@pytest.mark.parametrize(('values', 'kind', 'expected'), [
  ([0, 7, 255], np.int32, [0, 7, 255]),
  ([0, 257, 65535], np.int32, [0, 1, 255]),
  ([-100, 0, 100], np.int32, [0, 128, 255]),
  ([0, 0.5, 1], np.float32, [0, 128, 255]),
  ([0, 7, 255], np.float32, [0, 7, 255]),
  ([0, 257, 65535], np.float32, [0, 1, 255]),
  ([-1, 0, 1], np.float32, [0, 128, 255]),
  ([0, np.nan, 1], np.float32, [0, 0, 255]),
  ([np.inf, -np.inf, np.nan], np.float32, [255, 0, 0]),
])
def test_wide_numbers_are_scaled_from_the_range_that_holds_them(
  tmp_path, values, kind, expected
):
  path = tmp_path / 'a.tif'
  Image.fromarray(np.array([values], kind)).save(path)
  assert gray_of(path) == [expected]


def test_lab_is_a_colour_space(tmp_path):
  """White, black, and the red of sRGB: L* 53.2, a* 80.1, b* 67.2 (seen at D65)."""
  path = tmp_path / 'a.tif'
  values = np.array([[(255, 128, 128), (0, 128, 128), (138, 208, 198)]], np.uint8) ^ np.array(
    [0, 128, 128], np.uint8
  )  # Pillow keeps a* and b* with their signs.
  Image.frombytes('LAB', (3, 1), values.tobytes()).save(path)
  found = read_pixels(path)[0].astype(int)
  assert (found[0] > 250).all() and (found[1] < 5).all()
  assert found[2, 0] > 225 and (found[2, 1:] < 60).all()


def test_the_first_frame_is_read(tmp_path):
  frames = [Image.new('RGB', (6, 6), color) for color in ('red', 'blue')]
  for name in ('a.gif', 'a.webp', 'a.png', 'a.tif'):
    options = {'lossless': True} if name == 'a.webp' else {}
    frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], **options)
    assert (read_pixels(tmp_path / name) == (255, 0, 0)).all(), name


@pytest.mark.parametrize(('mode', 'options'), [
  ('P', {'transparency': 0}), ('P', {'transparency': bytes([0, 255])}), ('L', {'transparency': 9}),
  ('RGB', {'transparency': (9, 9, 9)}), ('1', {'transparency': 0}), ('I;16', {'transparency': 9}),
])
def test_what_is_transparent_by_its_colour_is_white(path, mode, options):
  if mode == 'P':
    image = Image.new('P', (4, 4))
    image.putpalette([9, 9, 9, 80, 80, 80])
  else:
    image = Image.new(mode, (4, 4), {'RGB': (9, 9, 9), '1': 0}.get(mode, 9))
  image.save(path, **options)
  assert (read_pixels(path) == 255).all()


def chunk(kind, data):
  return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))


PACKED = zlib.compress(bytes(3 * 2**20))


@pytest.mark.parametrize('extra', [
  chunk(b'zTXt', b'prompt\0\0' + PACKED), chunk(b'iTXt', b'prompt\0\1\0\0\0' + PACKED),
  chunk(b'iCCP', b'profile\0\0' + PACKED), chunk(b'tEXt', b'prompt\0' + b'x' * (70 * 2**20)),
  chunk(b'zTXt', b'Raw profile type exif\0\0' + PACKED),
  chunk(b'tEXt', b'prompt\0damaged')[:-4] + b'none', chunk(b'eXIf', b'damaged')[:-4] + b'none',
  chunk(b'IDAT'[::-1], b'\0'), chunk(b'fcTL', b''), chunk(b'acTL', b''),
])
@pytest.mark.parametrize('place', ['before', 'after'])
def test_texts_and_profiles_of_any_size_leave_a_png_readable(path, extra, place):
  pixels = np.random.default_rng(0).integers(0, 256, (6, 8, 3), np.uint8)
  Image.fromarray(pixels).save(path)
  data = path.read_bytes()
  at = data.index(b'IDAT') - 4 if place == 'before' else data.index(b'IEND') - 4
  path.write_bytes(data[:at] + extra + data[at:])
  np.testing.assert_array_equal(read_pixels(path), pixels)
  assert read_square(path, 2)[1] == (6, 8)


@pytest.mark.parametrize('kind', ['tEXt', 'zTXt', 'iTXt', 'eXIf behind'])
def test_a_png_is_turned_by_what_older_programs_write(path, kind):
  """ImageMagick's texts, Adobe's XMP, and eXIf data that follow the pixels."""
  pixels = np.random.default_rng(0).integers(0, 256, (6, 8, 3), np.uint8)
  Image.fromarray(pixels).save(path)
  hexadecimal = f'\nexif\n{len(exif_data(SIX)):8}\n{exif_data(SIX).hex()}\n'.encode()
  key = b'Raw profile type exif\0'
  extra = {
    'tEXt': chunk(b'tEXt', key + hexadecimal),
    'zTXt': chunk(b'zTXt', key + b'\0' + zlib.compress(hexadecimal)),
    'iTXt': chunk(b'iTXt', b'XML:com.adobe.xmp\0\0\0\0\0<a tiff:Orientation="6"/>'),
    'eXIf behind': chunk(b'eXIf', exif_data(SIX)[6:]),
  }[kind]
  data = path.read_bytes()
  at = data.index(b'IEND' if 'behind' in kind else b'IDAT') - 4
  path.write_bytes(data[:at] + extra + data[at:])
  np.testing.assert_array_equal(read_pixels(path), turned(pixels, 6))
  assert read_square(path, 2)[1] == (8, 6)


@pytest.mark.parametrize('size', [0, 1, 8, 20, 40, 100, 150])
@pytest.mark.parametrize('suffix', ['png', 'jpg', 'webp', 'bmp', 'gif', 'tif'])
def test_cut_files_are_one_sentence(tmp_path, suffix, size):
  path = tmp_path / f'a.{suffix}'
  Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)).save(path)
  path.write_bytes(path.read_bytes()[:size])
  with pytest.raises(Unreadable, match=rf'^the image .*a.{suffix} cannot be read \([^\n]*$'):
    read_pixels(path)


WAITS = """
import sys
from diffusion_jax.data.images import read_pixels, read_square
from diffusion_jax.errors import Unreadable
for path in sys.argv[1:]:
  for read in (read_pixels, lambda path: read_square(path, 4)):
    try:
      read(path)
    except Unreadable as error:
      print(error)
"""


def test_what_is_no_regular_file_is_not_opened(tmp_path):
  """A pipe without a writer would wait for ever; a link to a picture is one."""
  os.mkfifo(tmp_path / 'pipe.png')
  (tmp_path / 'zero.png').symlink_to('/dev/zero')
  (tmp_path / 'to_pipe.png').symlink_to('pipe.png')
  (tmp_path / 'folder.png').mkdir()
  (tmp_path / 'gone.png').symlink_to('nowhere.png')
  Image.new('RGB', (8, 8)).save(tmp_path / 'a.png')
  (tmp_path / 'link.png').symlink_to('a.png')
  names = ['pipe.png', 'zero.png', 'to_pipe.png', 'folder.png', 'gone.png', 'link.png']
  found = subprocess.run(
    [sys.executable, '-c', WAITS, *(str(tmp_path / name) for name in names)],
    capture_output=True, text=True, timeout=60, check=True,
  ).stdout.splitlines()
  assert len(found) == 2 * 5
  assert all('is not a regular file' in line for line in found[:8])
  assert all('No such file' in line for line in found[8:])


def test_a_strip_is_not_blown_up(path):
  Image.new('L', (100_000, 1)).save(path)
  assert read_square(path, 64)[0].shape == (64, 64, 3)


def test_pictures_that_are_none(tmp_path, path):
  with pytest.raises(UserError, match='cannot be read'):
    read_square(path, 4)
  path.write_bytes(b'no picture')
  with pytest.raises(UserError, match='cannot be read'):
    read_square(path, 4)
  with pytest.raises(UserError, match='cannot be read'):
    read_square(tmp_path, 4)
  Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)).save(path)
  path.write_bytes(path.read_bytes()[:200])
  with pytest.raises(UserError, match='cannot be read'):
    read_square(path, 4)


@pytest.mark.parametrize('edge', [16_385, 20_000, 100_000])
def test_a_huge_picture_is_refused_by_its_header(path, recwarn, edge):
  """The file holds no pixels at all: decoding it would fail with other words."""
  header = struct.pack('>IIBBBBB', edge, edge, 8, 2, 0, 0, 0)
  start = b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', header)
  path.write_bytes(start + chunk(b'IDAT', b'') + chunk(b'IEND', b''))
  with pytest.raises(Unreadable, match='268,435,456 pixels'):
    read_square(path, 4)
  assert not recwarn.list


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
