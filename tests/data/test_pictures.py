"""Pictures that belong together keep their places; masks are as diffusers prepares them."""

import numpy as np
import pytest
from PIL import Image

from diffusion_jax.data.pictures import frame_size, read_pictures
from diffusion_jax.errors import UserError

EDGE, LATENT = 16, 8
SIZES = dict.fromkeys(('image', 'mask', 'control'), (EDGE, EDGE)) | dict.fromkeys(
  ('depth', 'small'), (LATENT, LATENT)
) | {'reference': (10, 10)}
PHOTO = np.zeros((64, 96, 3), np.uint8)
PHOTO[16:32, 40:56] = 255
WHERE = np.zeros((EDGE, EDGE), bool)
WHERE[4:8, 6:10] = True
"""The object within the central square of 64 pixels, shrunk to 16."""


@pytest.fixture
def read(tmp_path):
  """read(**pictures): what becomes of them, each an array, a picture, or how one is saved."""

  def run(sizes=SIZES, **given):
    files = {}
    for name, picture in given.items():
      picture, suffix, more = picture if isinstance(picture, tuple) else (picture, 'png', {})
      picture = Image.fromarray(picture) if isinstance(picture, np.ndarray) else picture
      picture.save(tmp_path / f'{name}.{suffix}', **more)
      files[name] = tmp_path / f'{name}.{suffix}'
    return read_pictures(files, sizes)

  return run


def _gray(size=None):
  gray = Image.fromarray(PHOTO[..., 0])
  return gray.resize(size) if size else gray


def _with_alpha(gray, colour):
  """Painted by how opaque it is."""
  picture = Image.new('RGBA', gray.size, colour)
  picture.putalpha(gray)
  return picture


MASKS = {
  'gray': _gray(), 'rgb': Image.fromarray(PHOTO), 'one bit': _gray().convert('1'),
  'palette': Image.fromarray(PHOTO).quantize(2), 'square': _gray((64, 64)),
  'half': _gray((48, 32)), 'twice': _gray((192, 128)), 'tall': _gray((96, 256)),
  'clear': Image.fromarray(np.repeat(PHOTO[..., :1], 4, -1)),
  'white': _with_alpha(_gray(), 'white'), 'gray and alpha': _with_alpha(_gray(), 'white').convert(
    'LA'
  ),
}


@pytest.mark.parametrize('name', MASKS)
def test_a_mask_lies_over_its_picture(read, name):
  found, notes = read(image=PHOTO, mask=MASKS[name])
  np.testing.assert_array_equal(found['masks'], WHERE[None])
  np.testing.assert_array_equal(found['images'][0, ..., 0] > 127, WHERE)
  assert found['masks'].dtype == bool and found['images'].dtype == np.uint8
  assert bool(notes) == (name in ('square', 'tall'))


def test_a_palette_s_clear_colour_is_not_painted(read):
  """Of two colours, both white, one is clear."""
  picture = Image.fromarray((PHOTO[..., 0] > 0).astype(np.uint8))
  picture.putpalette([255] * 6)
  found, _ = read(image=PHOTO, mask=(picture, 'png', {'transparency': 0}))
  np.testing.assert_array_equal(found['masks'], WHERE[None])


@pytest.mark.parametrize('mode', ['L', 'RGB', '1'])
def test_masks_are_those_of_diffusers(read, mode):
  """Of a picture as wide as high, and of the central square of one that is not."""
  image_processor = pytest.importorskip('diffusers.image_processor')
  processor = image_processor.VaeImageProcessor(
    vae_scale_factor=1, do_normalize=False, do_binarize=True, do_convert_grayscale=True
  )
  rng = np.random.default_rng(0)
  for height, width, box in ((61, 61, (0, 0, 61, 61)), (64, 90, (13, 0, 77, 64))):
    rough = Image.fromarray(rng.integers(0, 256, (9, 9, 3), np.uint8)).resize((width, height))
    mask = rough.convert(mode)
    # One bit as people load it, for Pillow does not filter such pictures.
    loaded = mask.convert('RGB') if mode == '1' else mask
    wanted = processor.preprocess(loaded.crop(box), EDGE, EDGE)[0, 0].numpy()
    found, _ = read(image=np.zeros((height, width, 3), np.uint8), mask=mask)
    assert 0.1 < wanted.mean() < 0.9
    np.testing.assert_array_equal(found['masks'][0], wanted > 0)


def test_pictures_are_turned_before_they_are_laid_over_each_other(read):
  """The photo lies on its side in its file, the mask does not, and the other way round."""
  turned = Image.fromarray(PHOTO).transpose(Image.Transpose.ROTATE_90)
  exif = Image.Exif()
  exif[0x112] = 6
  lying = (turned, 'png', {'exif': exif})
  for image, mask in ((lying, Image.fromarray(PHOTO)), (PHOTO, lying), (lying, lying)):
    found, notes = read(image=image, mask=mask)
    np.testing.assert_array_equal(found['masks'][0], WHERE)
    np.testing.assert_array_equal(found['images'][0, ..., 0] > 127, WHERE)
    assert not notes


@pytest.mark.parametrize('size', [(96, 64), (64, 64), (48, 32), (300, 200)])
def test_controls_and_depth_lie_over_the_photo(read, size):
  found, notes = read(
    image=PHOTO, control=Image.fromarray(PHOTO).resize(size), depth=_gray(size),
    small=Image.fromarray(PHOTO).resize(size),
  )
  np.testing.assert_array_equal(found['control'][0, ..., 0] > 127, WHERE)
  np.testing.assert_array_equal(found['depth'][0] > 0, WHERE[::2, ::2])
  np.testing.assert_array_equal(found['small'][0, ..., 0] > 127, WHERE[::2, ::2])
  assert found['depth'].min() == -1 and found['depth'].max() == 1
  assert len(notes) == (3 if size == (64, 64) else 0)


def test_without_a_photo_a_control_is_the_frame_of_the_depth(read):
  found, _ = read(control=PHOTO, depth=_gray((64, 64)))
  np.testing.assert_array_equal(found['control'][0, ..., 0] > 127, WHERE)
  np.testing.assert_array_equal(found['depth'][0] > 0, WHERE[::2, ::2])
  alone, notes = read(depth=_gray())
  np.testing.assert_array_equal(alone['depth'][0] > 0, WHERE[::2, ::2])
  assert not notes


def test_a_reference_is_a_picture_of_its_own(read):
  pixels = np.random.default_rng(0).integers(0, 256, (30, 20, 3), np.uint8)
  wanted = Image.fromarray(pixels[5:25]).resize((10, 10), Image.Resampling.BICUBIC)
  for more in ({}, {'image': PHOTO}):
    found, notes = read(reference=pixels, **more)
    np.testing.assert_array_equal(found['reference'][0], wanted)
    assert not notes


def test_what_is_clear_is_white_in_a_photo_and_nothing_in_a_control(read):
  clear = Image.new('RGBA', (20, 20), (90, 90, 90, 0))
  depth = _with_alpha(Image.linear_gradient('L'), 'white')
  found, _ = read(image=clear, control=clear, depth=depth)
  assert (found['images'] == 255).all() and not found['control'].any()
  assert (np.diff(found['depth'][0], axis=0) > 0).all()


def test_masks_that_paint_nothing_or_everything_are_said(read):
  black, white = Image.new('L', (96, 64)), Image.new('L', (96, 64), 255)
  assert 'paints everything' in ' '.join(read(image=PHOTO, mask=white).notes)
  margin = np.zeros((64, 96), np.uint8)
  margin[:, :16] = 255
  for mask in (black, margin, _with_alpha(black, 'white'), _with_alpha(white, 'black')):
    with pytest.raises(UserError, match=r'mask\.png paints nothing of the middle that is cut'):
      read(image=PHOTO, mask=mask)


def test_a_picture_that_is_stretched_is_named(read):
  _, (note,) = read(image=PHOTO, mask=_gray((64, 64)))
  assert 'mask.png is 64 x 64 pixels' in note and 'image.png 96 x 64; it is stretched' in note


def test_oblong_pictures_keep_their_shape(read):
  """Nothing is cut off where the shapes agree; else the middle is left, of all alike."""
  sizes = {'image': (16, 24), 'mask': (16, 24)}
  arrays, notes = read(sizes, image=PHOTO, mask=_gray((48, 32)))
  assert arrays['images'].shape == (1, 16, 24, 3) and not notes
  np.testing.assert_array_equal(np.argwhere(arrays['masks'][0])[[0, -1]], [[4, 10], [7, 13]])
  arrays, _ = read({'image': (16, 8)}, image=PHOTO)
  np.testing.assert_array_equal(
    arrays['images'][0], np.asarray(Image.fromarray(PHOTO[:, 32:64]).resize((8, 16)))
  )


def test_the_frame_is_measured_as_it_is_turned(tmp_path):
  """Of the picture that the others are laid over, without its pixels."""
  exif = Image.Exif()
  exif[0x112] = 6
  Image.fromarray(PHOTO).save(tmp_path / 'lying.png', exif=exif)
  Image.fromarray(PHOTO).save(tmp_path / 'photo.png')
  (tmp_path / 'cut.png').write_bytes((tmp_path / 'photo.png').read_bytes()[:60])
  files = {name: tmp_path / f'{name}.png' for name in ('lying', 'photo', 'cut')}
  assert frame_size({'mask': files['photo'], 'control': files['lying']}) == (96, 64)
  assert frame_size({'mask': files['cut'], 'image': files['photo']}) == (64, 96)
  assert frame_size({'reference': files['photo']}) is None
  for name in ('missing', 'text'):
    (tmp_path / 'text').write_text('no picture')
    with pytest.raises(UserError, match='cannot be read'):
      frame_size({'image': tmp_path / name})
