"""sample with pipelines of diffusers: pictures beside the prompt, and what others have trained."""

import numpy as np
import pytest
from PIL import Image

pytest.importorskip('diffusers')

from diffusion_jax.formats.adapter_names import layers
from diffusion_jax.formats.adapters import LoRAWeights, write_lora
from diffusion_jax.formats.textual_inversion import (
  FILES,
  TextualInversion,
  write_textual_inversion,
)
from diffusion_jax.pipelines.directory import read_model
from tests.parity import small_pipelines as small

RNG = np.random.default_rng(0)
FAST = ('--steps', 2, '--batch', 1)


@pytest.fixture(scope='module')
def files(once):
  """Folder of pipelines, pictures, a LoRA, a word and a ControlNet."""

  def make(folder):
    for name in ('sd1', 'sdxl', 'refiner', 'inpaint', 'upscale', 'depth', 'edit', 'variation'):
      small.make(name).save_pretrained(folder / name)
    small.make('controlled').controlnet.save_pretrained(folder / 'controlnet')
    for name in ('one', 'two'):
      pixels = RNG.integers(0, 256, (20, 24, 3), np.uint8)
      Image.fromarray(pixels).save(folder / f'{name}.png')
    unet = read_model(str(folder / 'sd1'))[0].denoiser
    name, (i, o) = next((n, s) for n, s in layers(unet.shapes).items() if n.endswith('to_q'))
    draw = lambda *shape: RNG.normal(size=shape).astype(np.float32)
    write_lora(folder / 'l.safetensors', {'unet': {name: LoRAWeights(draw(i, 2), draw(2, o), 2.0)}})
    word = TextualInversion('<h>', {'text_encoder': draw(2, small.WIDTH)})
    write_textual_inversion(folder / 'word' / FILES['text_encoder'], word)

  return once('published', make)


@pytest.fixture(scope='module')
def draw(files, command, tmp_path_factory):
  """draw(model, *arguments): the one picture drawn, whose arguments may name files by {name}."""

  def run(model, *arguments, prompt='cab'):
    out = tmp_path_factory.mktemp('drawn')
    told = [str(a).replace('FILES', str(files)) for a in arguments]
    assert command('sample', '--model', files / model, '--prompt', prompt, '--out', out,
                   *FAST, *told) == 0
    return Image.open(next(out.glob('0000_*.png')))

  return run


def differ(a, b):
  return np.abs(np.asarray(a).astype(int) - np.asarray(b)).max() > 3


def test_a_picture_an_adapter_and_a_word(draw):
  """The prompt fits only where the learned word is known."""
  image = lambda name, *more: draw(
    'sd1', '--clip_skip', 1, '--textual_inversion', 'FILES/word', '--image', f'FILES/{name}.png',
    *more, prompt='cab <h> <h> <h>',
  )
  lora = ('--lora', 'FILES/l.safetensors:2')
  found = image('one', *lora)
  assert found.size == (18, 14)  # Of 24 x 20 pixels.
  wanted = {'strength': '0.8', 'clip_skip': '1', 'steps_offset': '1', 'guidance': '7.5'}
  assert {name: found.text[name] for name in wanted} == wanted
  assert found.text['image'].endswith('one.png') and found.text['lora'].endswith(':2')
  assert differ(found, image('one')) and differ(found, image('two', *lora))


@pytest.mark.parametrize(('model', 'arguments'), [
  ('inpaint', ('--image', 'FILES/one.png', '--mask', 'FILES/one.png', '--controlnet',
               'FILES/controlnet', '--control', 'FILES/two.png', '--control_strength', 0.5)),
  ('upscale', ('--small', 'FILES/one.png', '--noise_level', 5)),
  ('depth', ('--depth', 'FILES/one.png')), ('variation', ('--reference', 'FILES/one.png')),
])
def test_what_a_model_is_shown(draw, model, arguments):
  """Without any of these it is refused, as below; what they do is in test_parity_pipelines.

  All are drawn in the aspect of the first picture, of 24 x 20 pixels, at about 16 x 16.
  """
  found = draw(model, *arguments)
  assert found.size == ((small.SIZE,) * 2 if model == 'variation' else (18, 14))
  for name, value in zip(arguments[::2], arguments[1::2], strict=True):
    assert found.text[name[2:]].endswith(str(value).removeprefix('FILES'))


def test_pixart_draws_at_a_size_of_its_training(draw, fails, tmp_path):
  """Any size is cut out of that, where it is not switched off."""
  small.make('pixart_256').save_pretrained(tmp_path / 'pixart')
  found = draw(tmp_path / 'pixart', '--size', '41x30')
  assert found.size == (30, 41) and found.text['binning'] == 'aspect'
  assert 'the nearest such size is 48x32' in fails(
    'sample', '--model', tmp_path / 'pixart', '--prompt', 'cab', '--out', tmp_path / 'out',
    '--size', '41x30', '--binning', 'none',
  )


def test_a_refiner_takes_the_last_steps(draw):
  """Of the model's latents; both are told the sizes."""
  told = ('--original_size', '64x48', '--crop', 3, 5, '--aesthetic_score', 3)
  draws = [
    draw('sdxl', '--steps', 10, '--refiner', 'FILES/refiner', *more)
    for more in ((), told, ('--denoising_end', 0.85))
  ]
  assert differ(*draws[:2]) and differ(draws[0], draw('sdxl', '--steps', 10))
  wanted = {'original_size': '64x48', 'crop': '3 5', 'aesthetic_score': '3', 'denoising_end': '0.8'}
  assert {name: draws[1].text[name] for name in wanted} == wanted
  assert draws[1].text['refiner'].endswith('refiner') and draws[2].text['denoising_end'] == '0.85'
  # Both begin no step between.
  np.testing.assert_array_equal(draws[2], draws[0])


def test_masks_of_any_shape_and_transparency_paint_the_same(draw, files, fails, tmp_path, capsys):
  photo = np.full((64, 96, 3), 40, np.uint8)
  photo[16:32, 40:56] = (255, 0, 0)
  white = Image.fromarray((photo[..., 0] > 200).astype(np.uint8) * 255)
  clear = Image.new('RGBA', white.size, 'white')
  clear.putalpha(white)
  masks = {'same': white, 'square': white.resize((64, 64)), 'clear': clear,
           'black': Image.new('L', (9, 6)), 'white': Image.new('L', (9, 6), 255)}
  for name, picture in {'photo': Image.fromarray(photo), **masks}.items():
    picture.save(tmp_path / f'{name}.png')
  given = lambda name: ('--image', tmp_path / 'photo.png', '--mask', tmp_path / f'{name}.png')
  found = {name: np.asarray(draw('inpaint', *given(name))) for name in masks if name != 'black'}
  np.testing.assert_array_equal(found['square'], found['same'])
  np.testing.assert_array_equal(found['clear'], found['same'])
  assert differ(found['white'], found['same'])
  whole = np.asarray(draw('inpaint', *given('same'), '--size', '64x96'))
  kept = photo[..., 0] <= 200
  np.testing.assert_array_equal(whole[kept], photo[kept])
  assert (whole[~kept] != photo[~kept]).any()
  said = capsys.readouterr().out
  assert 'square.png is 64 x 64 pixels' in said and 'white.png paints everything' in said
  assert 'black.png paints nothing' in fails(
    'sample', '--model', files / 'inpaint', '--prompt', 'cab', '--out', tmp_path / 'out',
    *given('black')
  )


@pytest.mark.parametrize('model', ['sd1', 'sdxl'])
def test_an_empty_prompt_draws_without_condition(draw, model):
  """Guidance by nothing changes nothing, and is left out."""
  found = np.asarray(draw(model, prompt=''))
  np.testing.assert_array_equal(found, draw(model, '--guidance', 1, prompt='  '))
  assert (found != draw(model, '--guidance', 1)).any()


@pytest.mark.parametrize(('model', 'arguments', 'words'), [
  ('sd1', ('--mask', 'one.png'), '--mask is of a picture; give --image, too.'),
  ('sd1', ('--control', 'one.png'), 'takes no control'),
  ('sd1', ('--image_guidance', 2), 'edits no picture'),
  ('sd1', ('--clip_skip', 2), 'the encoder has 2 layers'),
  ('inpaint', ('--image', 'one.png'), 'needs masks beside the prompts; give --mask'),
  ('edit', (), 'needs images beside the prompts; give --image'),
  ('upscale', (), 'give --small'), ('depth', ('--image', 'one.png'), 'give --depth'),
  ('variation', (), 'give --reference'), ('sd1', ('--reference', 'one.png'), 'varies no picture'),
  ('variation', ('--reference', 'one.png', '--textual_inversion', 'word'), 'reads no words'),
  ('sd1', ('--controlnet', 'controlnet'), 'give --control'),
  ('sd1', ('--crop', 1, 2), 'crop is (1, 2), but the model is not conditioned on it'),
  ('sdxl', ('--aesthetic_score', 5), 'aesthetic_score is 5.0, but the model is not'),
  ('sdxl', ('--original_size', 'large'), "original_size is 'large'; give height x width"),
  ('sdxl', ('--refiner', 'variation'), 'reads no prompts; leave it out'),
])
def test_what_does_not_fit_is_refused(fails, files, tmp_path, model, arguments, words):
  given = [files / a if (files / str(a)).exists() else a for a in arguments]
  assert words in fails('sample', '--model', files / model, '--prompt', 'cab', '--out',
                        tmp_path / 'out', *FAST, *given)
