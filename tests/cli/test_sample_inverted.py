"""sample --invert and --interpolate: what they write, and what is refused before any work."""

import numpy as np
import pytest
from PIL import Image

from tests import tiny


@pytest.fixture(scope='module')
def picture(tmp_path_factory):
  path = tmp_path_factory.mktemp('given') / 'a.png'
  pixels = np.random.default_rng(0).integers(0, 256, (tiny.SIZE, tiny.SIZE, 3), np.uint8)
  Image.fromarray(pixels).save(path)
  return path


def test_noise_and_the_picture_drawn_again(command, finished, picture, tmp_path, capsys):
  assert command(
    'sample', '--workdir', finished, '--prompt', 'red apple', '--image', picture, '--invert',
    '--steps', 4, '--out', tmp_path,
  ) == 0
  assert 'there and back: root mean square error' in capsys.readouterr().out
  noise = np.load(tmp_path / 'inverted.npy', allow_pickle=False)
  assert noise.shape == (1, 8, 8, 16) and noise.dtype == np.float32 and noise.std() > 0
  text = Image.open(tmp_path / '0000_red_apple.png').text
  assert (text['sampler'], text['steps'], text['guidance']) == ('ddim', '4', '1')
  assert text['image'] == str(picture) and text['invert'] == 'True' and 'strength' not in text


def test_a_strip_between_prompts_has_their_pictures_at_its_ends(command, finished, tmp_path):
  prompts = ('--prompt', 'red apple', '--prompt', 'cat face')
  common = ('sample', '--workdir', finished, *prompts, '--seed', 5)
  assert command(*common, '--out', tmp_path / 'two') == 0
  assert command(*common, '--interpolate', 3, '--out', tmp_path / 'strip') == 0
  read = lambda path: np.asarray(Image.open(path)).astype(int)
  two, strip = (sorted((tmp_path / name).glob('0*.png')) for name in ('two', 'strip'))
  assert len(strip) == 3
  for mine, theirs in ((strip[0], two[0]), (strip[-1], two[1])):
    assert np.abs(read(mine) - read(theirs)).max() <= 1
  assert np.abs(read(strip[1]) - read(strip[0])).max() > 1
  assert Image.open(strip[1]).text['interpolate'] == '3'


@pytest.mark.parametrize(('arguments', 'says'), [
  (('--to', 'b.png'), 'give --interpolate N, too'),
  (('--interpolate', 3, '--to', 'b.png'), 'give both --image and --to'),
  (('--interpolate', 3, '--image', 'a.png'), 'give both --image and --to'),
  (('--interpolate', 3), 'there are 1 prompts; give two to go between'),
  (('--interpolate', 1), '--interpolate'),
  (('--invert',), 'give --image FILE'),
  (('--invert', '--image', 'a.png', '--prompt', 'b'), 'there are 2 prompts; give one'),
  (('--invert', '--image', 'a.png', '--strength', 0.5), '--strength has no part'),
  (('--invert', '--image', 'a.png', '--refiner', 'x'), '--refiner has no part'),
  (('--inversion_calls', 3), 'leave it out'),
])
def test_options_that_mean_nothing_together(arguments, says, command, capsys, tmp_path):
  out = tmp_path / 'out'
  assert command('sample', '--prompt', 'a', *arguments, '--out', out) == 2
  assert says in capsys.readouterr().err and not out.exists()
