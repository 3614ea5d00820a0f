"""Colours of pictures: embedded profiles, and what is behind transparent places."""

import io
import struct

import numpy as np
import pytest
from PIL import Image, ImageCms

from diffusion_jax.config import DataConfig
from diffusion_jax.data.images import read_pixels
from diffusion_jax.data.sources import open_data
from diffusion_jax.errors import UserError


def icc_profile(name, gamma=1.8, space=b'RGB '):
  """A display's profile: red, green and blue of Apple's Display P3, and a power of the values."""
  number = lambda value: struct.pack('>i', round(value * 65536))
  xyz = lambda *values: b'XYZ \0\0\0\0' + b''.join(map(number, values))
  curve = b'curv\0\0\0\0' + struct.pack('>IH', 1, round(gamma * 256)) + b'\0\0'
  text = name.encode() + b'\0'
  described = b'desc\0\0\0\0' + struct.pack('>I', len(text)) + text + bytes(78)
  tags = {
    b'desc': described, b'wtpt': xyz(0.9642, 1, 0.8249), b'cprt': b'text\0\0\0\0none\0',
  }
  tags |= {b'kTRC': curve} if space == b'GRAY' else {
    b'rXYZ': xyz(0.5151, 0.2412, -0.0011), b'gXYZ': xyz(0.2920, 0.6922, 0.0419),
    b'bXYZ': xyz(0.1571, 0.0666, 0.7841), b'rTRC': curve, b'gTRC': curve, b'bTRC': curve,
  }
  body, rows = b'', b''
  for tag, data in tags.items():
    rows += tag + struct.pack('>II', 132 + 12 * len(tags) + len(body), len(data))
    body += data + bytes(-len(data) % 4)
  header = struct.pack('>I', 132 + len(rows) + len(body)) + bytes(4) + b'\2\x10\0\0mntr' + space
  header += b'XYZ ' + bytes(12) + b'acsp' + bytes(28) + b''.join(map(number, (0.9642, 1, 0.8249)))
  return header.ljust(128, b'\0') + struct.pack('>I', len(tags)) + rows + body


SRGB = ImageCms.createProfile('sRGB')


@pytest.mark.parametrize(('suffix', 'mode'), [
  ('png', 'RGB'), ('png', 'RGBA'), ('png', 'P'), ('png', 'L'), ('png', 'LA'), ('jpg', 'RGB'),
  ('jpg', 'L'), ('webp', 'RGB'), ('tif', 'RGB'), ('tif', 'RGBA'),
])
def test_colours_are_those_of_the_profile(tmp_path, suffix, mode):
  """As Pillow's own conversion to sRGB, under alpha; a profile of sRGB leaves them as they are."""
  path, gray = tmp_path / f'a.{suffix}', mode[0] == 'L'
  pixels = np.random.default_rng(0).integers(0, 256, (8, 9, len(mode) if mode != 'P' else 3))
  image = Image.fromarray(pixels.astype(np.uint8).squeeze())
  image = image.quantize(16) if mode == 'P' else image
  assert image.mode == mode
  profile = icc_profile('Display', space=b'GRAY' if gray else b'RGB ')
  options = {'lossless': True} if suffix == 'webp' else {}
  image.save(path, icc_profile=profile, **options)
  with Image.open(path) as image:
    image.load()
    alpha = image.getchannel('A') if mode in ('LA', 'RGBA') else None
    plain = image.convert('L' if gray else 'RGB')
  own = ImageCms.ImageCmsProfile(io.BytesIO(profile))
  wanted = ImageCms.profileToProfile(plain, own, SRGB, outputMode='RGB')
  assert np.abs(np.asarray(wanted).astype(int) - np.asarray(plain.convert('RGB'))).max() > 10
  if alpha:
    wanted.putalpha(alpha)
    wanted = Image.alpha_composite(Image.new('RGBA', wanted.size, 'blue'), wanted).convert('RGB')
  np.testing.assert_array_equal(read_pixels(path, background='blue'), np.asarray(wanted))
  for other in (icc_profile('sRGB IEC61966'), profile[:200], b'none'):
    Image.fromarray(np.full((4, 4, 3), 77, np.uint8)).save(tmp_path / 'b.png', icc_profile=other)
    assert (read_pixels(tmp_path / 'b.png') == 77).all()


def test_transparent_places_have_the_colour_of_the_background(tmp_path):
  pixels = np.random.default_rng(0).integers(0, 256, (24, 24, 4), np.uint8)
  Image.fromarray(pixels).save(tmp_path / 'a.png')
  (tmp_path / 'a.txt').write_text('a')
  with Image.open(tmp_path / 'a.png') as image:
    wanted = Image.alpha_composite(Image.new('RGBA', image.size, '#204060'), image).convert('RGB')
  for size, cut in ((24, slice(None)), ((24, 12), slice(6, 18))):
    data = DataConfig(f'folder:{tmp_path}', size, background='#204060', test_fraction=0.0)
    found = open_data(data)[0][0]['image']
    np.testing.assert_array_equal(found, np.asarray(wanted)[:, cut])
  with pytest.raises(UserError, match=r'data.background is'):
    DataConfig('openmoji', 8, background='none such')
  with pytest.raises(UserError, match=r'data.background has no effect on rings'):
    open_data(DataConfig('rings', 8, background='black'))
