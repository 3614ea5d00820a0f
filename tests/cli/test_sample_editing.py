"""sample: masks, wider canvases, more pixels, variations and patterns by any model."""

import numpy as np
import pytest
from PIL import Image

from tests import tiny

EDGE = tiny.SIZE


@pytest.fixture(scope='module')
def files(tmp_path_factory):
  """Of a picture, a mask of its right half, and a small picture."""
  folder = tmp_path_factory.mktemp('given')
  rng = np.random.default_rng(0)
  pixels = rng.integers(0, 256, (EDGE, EDGE, 3), np.uint8)
  mask = np.zeros((EDGE, EDGE), np.uint8)
  mask[:, EDGE // 2 :] = 255
  for name, array in (('image', pixels), ('mask', mask), ('small', pixels[:8, :8])):
    Image.fromarray(array).save(folder / f'{name}.png')
  return {name: folder / f'{name}.png' for name in ('image', 'mask', 'small')}


@pytest.fixture(scope='module')
def draw(command, finished, tmp_path_factory):
  """draw(*arguments): (pixels of each picture, its metadata), in their order."""

  def run(*arguments):
    out = tmp_path_factory.mktemp('pictures')
    assert command('sample', '--workdir', finished, '--out', out, *arguments) == 0
    found = [Image.open(path) for path in sorted(out.glob('0*.png'))]
    return [(np.asarray(image.convert('RGB')), image.text) for image in found]

  return run


def test_pixels_outside_a_mask_are_those_of_the_file(draw, files):
  picture = np.asarray(Image.open(files['image']))
  (found, said), = draw('--prompt', 'cat', '--image', files['image'], '--mask', files['mask'],
                        '--feather', 2, '--resample', 2, '--resample_jump', 1)
  half = EDGE // 2
  np.testing.assert_array_equal(found[:, :half], picture[:, :half])
  assert (found[:, half:] != picture[:, half:]).mean() > 0.9
  wanted = {'mask': str(files['mask']), 'feather': '2', 'resample': '2', 'resample_jump': '1'}
  assert {name: said[name] for name in wanted} == wanted and 'strength' not in said


def test_a_wider_canvas(draw, files):
  picture = np.asarray(Image.open(files['image']))
  (found, said), = draw('--prompt', 'cat', '--image', files['image'], '--outpaint', '8,0,4,4')
  assert found.shape == (EDGE + 4, EDGE + 12, 3) and said['outpaint'] == '8,0,4,4'
  np.testing.assert_array_equal(found[:EDGE, 8 : 8 + EDGE], picture)
  margins = ('--outpaint', '0,16,0,0', '--mask', files['mask'])
  (found, _), = draw('--prompt', '', '--image', files['image'], *margins, '--size', f'{EDGE}x16')
  assert found.shape == (EDGE, 16, 3)


def test_more_pixels_and_variations(draw, files):
  (found, said), = draw('--prompt', 'cat', '--image', files['small'], '--enlarge', 4)
  assert found.shape == (EDGE, EDGE, 3) and said['enlarge'] == '4'
  several = draw('--image', files['image'], '--variations', 3, '--strength', 0.5)
  assert len({image.tobytes() for image, _ in several}) == 3
  assert {said['prompt'] for _, said in several} == {''} and several[0][1]['strength'] == '0.5'


def test_a_pattern(draw):
  plain, tiled = (draw('--prompt', 'cat', '--tiling', axes)[0] for axes in ('none', 'both'))
  assert (plain[0] != tiled[0]).any() and tiled[1]['tiling'] == 'both' and 'tiling' not in plain[1]


@pytest.mark.parametrize(('arguments', 'said'), [
  ('--outpaint 8,0,0,0', '--outpaint needs a picture'),
  ('--outpaint 8,0 --image {image}', 'give LEFT,TOP,RIGHT,BOTTOM in pixels'),
  ('--outpaint 3,0,0,0 --image {image}', 'the size 32x35 cannot be halved'),
  ('--outpaint 16,0,16,0 --size 32 --image {image}', 'leaves nothing of 32x32 pixels'),
  ('--outpaint 4,0,0,0 --enlarge 4 --image {image}', 'leave one out'),
  ('--enlarge 4', '--enlarge needs a picture'),
  ('--enlarge 5 --size 32 --image {image}', '32x32 pixels are no 5 times as many'),
  ('--enlarge 4 --image {image} --mask {mask}', '--enlarge does not go with --mask'),
  ('--variations 2', '--variations needs a picture; give --image or --reference'),
  ('--feather 2 --image {image}', '--feather is of a mask'),
  ('--mask {mask}', '--mask is of a picture'),
  ('--resample 3 --image {image}', 'no part of a picture is held'),
  ('--refiner x --image {image} --mask {mask}', '--refiner goes on without the picture'),
  ('--tiling z', 'tiling is \'z\''),
])
def test_what_cannot_be_is_refused_before_weights_are_read(
  fails, finished, copy_of, files, arguments, said
):
  model = copy_of(finished) / 'model'
  for file in model.rglob('*.safetensors'):
    file.write_bytes(b'')
  given = [part.format(**files) for part in arguments.split()]
  assert said in fails('sample', '--model', model, '--prompt', 'cat', '--out', 'x', *given)
