"""sample: the pictures depend on seed, prompt and model, and on nothing else."""

import os

import numpy as np
import pytest
from PIL import Image

from diffusion_jax.cli import sample
from diffusion_jax.cli.main import make_parser
from diffusion_jax.pipelines import inputs
from tests import tiny

PROMPTS = ('red apple', 'cat face', 'sun')


@pytest.fixture(scope='module')
def draw(command, finished, tmp_path_factory):
  """draw(*arguments): name -> picture, of PROMPTS unless others are given."""

  def run(*arguments, source=('--workdir', finished), prompts=PROMPTS, devices=1):
    out = tmp_path_factory.mktemp('pictures')
    prompt = [x for prompt in prompts for x in ('--prompt', prompt)]
    assert command('sample', *source, *prompt, '--out', out, *arguments, devices=devices) == 0
    return {path.name: Image.open(path) for path in out.iterdir()}

  return run


@pytest.fixture(scope='module')
def pictures(draw):
  return draw('--seed', 3)


def _pixels(pictures):
  return {name: np.asarray(image) for name, image in pictures.items() if name != 'grid.png'}


def _differ(a, b):
  return [name for name in a if (a[name] != b[name]).any()]


def test_one_picture_a_prompt_and_a_grid(pictures):
  assert sorted(pictures) == ['0000_red_apple.png', '0001_cat_face.png', '0002_sun.png', 'grid.png']
  assert pictures['0002_sun.png'].size == (tiny.SIZE, tiny.SIZE)
  assert pictures['grid.png'].width >= 2 * 192
  assert len({image.tobytes() for image in _pixels(pictures).values()}) == 3


def test_prompt_and_settings_are_in_the_file(pictures, finished):
  text = pictures['0001_cat_face.png'].text
  wanted = {
    'prompt': 'cat face', 'index': '1', 'negative': '', 'sampler': 'ddim', 'steps': '2',
    'guidance': '2', 'seed': '3', 'model': str(finished),
  }
  assert {name: text[name] for name in wanted} == wanted
  assert text['software'].startswith('diffusion_jax ')
  assert pictures['grid.png'].text['prompts'] == '\n'.join(PROMPTS)


@pytest.mark.parametrize(('batch', 'devices'), [(1, 1), (3, 1), (8, 1), (1, 8)])
def test_batch_size_and_devices_do_not_change_a_picture(draw, pictures, batch, devices):
  """Not to the bit: XLA sums in another order at another size. One level of 255 at most."""
  found, wanted = _pixels(draw('--seed', 3, '--batch', batch, devices=devices)), _pixels(pictures)
  assert found.keys() == wanted.keys()
  for name, image in wanted.items():
    assert np.abs(found[name].astype(int) - image).max() <= 1, name


@pytest.mark.slow
def test_what_the_help_says_of_batch_holds_for_the_model_of_the_package(draw, capsys):
  """Now and then a value by one level of 255."""
  prompts = ('red apple', 'cat face', 'blue car', '', 'green heart')
  found, wanted = (
    _pixels(draw('--seed', 0, '--batch', batch, source=(), prompts=prompts)) for batch in (2, 5)
  )
  apart = np.stack([np.abs(found[name].astype(int) - image) for name, image in wanted.items()])
  assert apart.max() <= 1 and (apart > 0).mean() < 1e-3
  with pytest.raises(SystemExit):
    make_parser().parse_args(['sample', '--help'])
  said = ' '.join(capsys.readouterr().out.split())
  assert 'another number rounds otherwise' in said and 'whatever the batch' not in said


def test_the_same_seed_gives_the_same_picture_and_another_does_not(draw, pictures):
  wanted = _pixels(pictures)
  assert not _differ(wanted, _pixels(draw('--seed', 3)))
  assert len(_differ(wanted, _pixels(draw('--seed', 4)))) == 3


def test_a_negative_prompt_and_guidance_count(draw, pictures):
  wanted = _pixels(pictures)
  assert len(_differ(wanted, _pixels(draw('--seed', 3, '--negative', 'blue flag')))) == 3
  assert len(_differ(wanted, _pixels(draw('--seed', 3, '--guidance', 9)))) == 3


def test_settings_of_guidance_count_and_are_in_the_file(draw, pictures):
  found = draw('--seed', 3, '--guidance_rescale', 0.7, '--guidance_interval', 0.2, 'inf',
               '--threshold', 'static', '--threshold_limit', 1)
  assert len(_differ(_pixels(pictures), _pixels(found))) == 3
  wanted = {'guidance_rescale': '0.7', 'guidance_interval': '0.2 inf', 'threshold': 'static',
            'threshold_limit': '1', 'spacing': 'trailing'}
  text = found['0002_sun.png'].text
  assert {name: text[name] for name in wanted} == wanted


def test_guidance_away_from_others_counts_and_is_in_the_file(draw, pictures, finished):
  model = finished / 'model'
  found = draw('--seed', 3, '--perturbed_attention', 3, '--worse', model, '--autoguidance', 2)
  assert len(_differ(_pixels(pictures), _pixels(found))) == 3
  wanted = {'perturbed_attention': '3', 'perturbed_part': 'mid_block', 'autoguidance': '2',
            'worse': str(model)}
  text = found['0002_sun.png'].text
  assert {name: text[name] for name in wanted} == wanted


def test_a_picture_to_start_from(draw, pictures, tmp_path):
  Image.new('RGB', (40, 40), 'red').save(tmp_path / 'red.png')
  Image.new('RGB', (40, 40), 'blue').save(tmp_path / 'blue.png')
  start = lambda colour, *more: draw('--seed', 3, '--image', tmp_path / f'{colour}.png', *more)
  red, blue = start('red', '--strength', 0.5), start('blue', '--strength', 0.5)
  assert len(_differ(_pixels(red), _pixels(blue))) == 3
  assert len(_differ(_pixels(red), _pixels(pictures))) == 3
  text = red['0000_red_apple.png'].text
  assert text['image'] == str(tmp_path / 'red.png') and text['strength'] == '0.5'


def test_any_size_is_drawn(draw, fails, finished):
  """Of a model that was trained on squares."""
  oblong = draw('--size', f'{tiny.SIZE}x{2 * tiny.SIZE}')
  assert {image.size for name, image in oblong.items() if name != 'grid.png'} == {
    (2 * tiny.SIZE, tiny.SIZE)
  }
  refused = lambda size: fails(
    'sample', '--workdir', finished, '--prompt', 'cat', '--out', 'x', '--size', size
  )
  message = refused('30x33')
  assert 'the size 30x33' in message and 'multiples of 4; the nearest such size is 32x32' in message
  for size in ('0', 'x4', '4x', '-4', '4x4x4', 'wide', '9000'):
    assert 'give height x width in pixels, such as 96x64' in refused(size)


def test_a_size_is_refused_before_any_weights_are_read(fails, finished, copy_of):
  model = copy_of(finished) / 'model'
  for file in model.rglob('*.safetensors'):
    file.write_bytes(b'')
  refused = lambda *size: fails('sample', '--model', model, '--prompt', 'cat', '--out', 'x', *size)
  assert 'the nearest such size is 32x32' in refused('--size', '30x33')
  assert 'the nearest such size' not in refused('--size', '32x32')


def test_without_a_size_the_aspect_is_the_picture_s(draw, tmp_path):
  """About as large as the images of training, 32 x 32; a square where that is asked for."""
  Image.new('RGB', (90, 40), 'red').save(tmp_path / 'wide.png')
  start = ('--image', tmp_path / 'wide.png')
  assert draw(*start, prompts=['sun'])['0000_sun.png'].size == (48, 20)
  assert draw(*start, '--size', 32, prompts=['sun'])['0000_sun.png'].size == (32, 32)


def test_prompts_from_a_file(draw, pictures, tmp_path):
  file = tmp_path / 'prompts.txt'
  file.write_text('\n'.join([PROMPTS[0], '', *PROMPTS[1:], '']))
  found = draw('--seed', 3, '--prompts', file, prompts=())
  assert not _differ(_pixels(pictures), _pixels(found))


def test_an_empty_prompt_draws_without_condition(draw, finished):
  """As guidance by nothing does, whatever its scale, of a run and of the model that it wrote."""
  for source in (('--workdir', finished), ('--model', finished / 'model')):
    free = _pixels(draw('--seed', 3, '--guidance', 1, source=source, prompts=('', ' \t', 'sun')))
    drawn = draw('--seed', 3, source=source, prompts=('', ' \t', 'sun'))
    found = _pixels(drawn)
    assert sorted(found) == ['0000_.png', '0001_.png', '0002_sun.png']
    for name in ('0000_.png', '0001_.png'):
      assert np.abs(found[name].astype(int) - free[name]).max() <= 1
    assert _differ(found, free) == ['0002_sun.png']
    assert drawn['0000_.png'].text['prompt'] == ''


def test_prompts_of_any_characters(draw):
  prompts = ('\x00\x07\x1b[2J', 'é/猫\n', '../..', '\ufffe\u202e', 'con')
  found = draw(prompts=prompts)
  assert len(found) == len(prompts) + 1
  for name, image in found.items():
    if name != 'grid.png':
      assert image.text['prompt'] == prompts[int(name[:4])]


def test_a_folder_whose_name_is_no_text(command, finished, tmp_path, capsys):
  out = os.fsencode(tmp_path) + b'/caf\xe9'
  assert command('sample', '--workdir', finished, '--prompt', 'sun', '--out', os.fsdecode(out)) == 0
  assert len(os.listdir(out)) == 2 and r'caf\udce9' in capsys.readouterr().out


def test_what_cannot_be_written_is_a_sentence(fails, finished):
  line = fails('sample', '--workdir', finished, '--prompt', 'sun', '--out', '/proc/nowhere')
  assert '--out /proc/nowhere cannot be written to' in line


def test_the_exported_model_draws_the_same(draw, pictures, finished):
  found = draw('--seed', 3, source=('--model', finished / 'model'))
  assert not _differ(_pixels(pictures), _pixels(found))


def test_the_help_names_the_strength_that_is_used():
  assert sample.STRENGTH == inputs.STRENGTH


def test_a_single_file_is_told_how_it_becomes_a_directory(fails, tmp_path):
  (tmp_path / 'x.safetensors').write_bytes(b'')
  line = fails('sample', '--model', tmp_path / 'x.safetensors', '--prompt', 'a', '--out', tmp_path)
  assert 'holds no tokenizer' in line and 'convert --from' in line
