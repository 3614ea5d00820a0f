"""The page that draws, in a real browser: drawn, painted over, refused, and all of it from here."""

import io
import os
import re
import signal
import subprocess
import sys
import urllib.parse
from typing import ClassVar

import numpy as np
import pytest
from PIL import Image

from diffusion_jax import demo
from diffusion_jax.cli.demo import Limits
from diffusion_jax.config import typed
from diffusion_jax.errors import UserError
from diffusion_jax.pipelines.generator import OfOneSize
from diffusion_jax.pipelines.vae import VAESampleConfig
from diffusion_jax.session import Session
from tests import tiny
from tests.tiny import ROOT

SERVE = """
import sys
called = open(sys.argv[1], 'a', buffering=1)

def note(event, arguments):
  where = {'socket.connect': 1, 'socket.sendto': 1, 'socket.getaddrinfo': 0}.get(event)
  if where is not None:
    host = arguments[where][0] if isinstance(arguments[where], tuple) else arguments[where]
    print(host, file=called)

sys.addaudithook(note)
from diffusion_jax.__main__ import main
sys.exit(main(sys.argv[2:]))
"""
LOCAL = ('data:', 'blob:')
HERE = {'127.0.0.1', 'localhost', '::1', 'None'}


@pytest.fixture(scope='module')
def model(finished):
  return str(finished / 'model')


@pytest.fixture(scope='module')
def session(model):
  return Session.open(model)


@pytest.fixture(scope='module')
def served(model, small_data, tmp_path_factory):
  """(address, file with the hosts that the server has called) of the command demo."""
  pytest.importorskip('gradio')
  folder = tmp_path_factory.mktemp('demo')
  called, errors = folder / 'called', folder / 'errors'
  environment = tiny.environment(small_data, 1, GRADIO_TEMP_DIR=str(folder / 'gradio'))
  options = ('--model', model, '--most_edge', '64', '--most_steps', '9')
  with errors.open('w') as file:
    process = subprocess.Popen(
      [sys.executable, '-c', SERVE, str(called), 'demo', *options], cwd=ROOT, text=True,
      stdout=subprocess.PIPE, stderr=file, env=environment,
    )
  try:
    line = process.stdout.readline()
    assert line.startswith('the page is at http://127.0.0.1:'), errors.read_text()
    yield re.search(r'http://[\d.:]+', line)[0], called
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 0, errors.read_text()
  finally:
    process.kill()


@pytest.fixture
def page(browser, served):
  """The page in a tab of its own; every request of it must go to the server."""
  tab, asked = browser.new_page(viewport={'width': 1300, 'height': 1600}), []
  tab.set_default_timeout(60_000)
  tab.on('request', lambda request: asked.append(request.url))
  tab.goto(served[0])
  tab.get_by_label('Prompt', exact=True).wait_for()
  yield tab
  tab.close()
  hosts = {urllib.parse.urlsplit(url).netloc for url in asked if not url.startswith(LOCAL)}
  assert hosts == {served[0].removeprefix('http://')} and len(asked) > 5


def draw(page, **fields):
  """Fill in the fields by their labels, draw, and return what is said in the end."""
  for label, value in fields.items():
    page.get_by_label(label.replace('_', ' '), exact=True).first.fill(str(value))
  page.evaluate("document.querySelector('#said textarea').value = ''")
  page.get_by_role('button', name='Draw', exact=True).click()
  page.wait_for_function("""() => {
    const said = document.querySelector('#said textarea').value;
    const [, done, of] = said.match(/^(\\d+) of (\\d+) drawn/) || [];
    return said && !said.startsWith('drawing') && done === of;
  }""")
  return page.locator('#said textarea').input_value()


def downloaded(page):
  """The picture that the page offers, as it is written to a disk."""
  with page.expect_download() as found:
    page.locator('#download').click()
  image = Image.open(io.BytesIO(found.value.path().read_bytes()))
  return np.asarray(image), image.text


def test_a_prompt_a_sampler_and_the_history(page, session):
  assert draw(page, Prompt='red apple', Seed=3, number_input_for_Steps=2).startswith('1 of 1 drawn')
  first, metadata = downloaded(page)
  wanted, expected = next(session.sample('red apple', seed=3, steps=2))
  assert np.abs(first.astype(int) - wanted).max() <= 1  # Of another number of devices.
  assert metadata == expected
  page.get_by_label('Sampler').click()
  page.get_by_role('option', name='euler_ancestral', exact=True).click()
  assert draw(page, number_input_for_Pictures=2).startswith('2 of 2 drawn')
  second, metadata = downloaded(page)
  assert metadata['sampler'] == 'euler_ancestral' and (first != second).any()
  assert page.locator('#drawn img').count() == 2 and page.locator('#history img').count() == 3
  page.locator('#history img').nth(2).click()  # The oldest, last.
  page.wait_for_function("document.querySelector('#metadata').innerText.includes('ddim')")
  again, metadata = downloaded(page)
  assert np.array_equal(again, first) and metadata['sampler'] == 'ddim'


def test_a_brush_says_what_is_painted(page, tmp_path):
  colors = np.random.default_rng(0).integers(0, 256, (tiny.SIZE, tiny.SIZE, 3), dtype=np.uint8)
  Image.fromarray(colors).save(tmp_path / 'own.png')
  page.get_by_role('button', name='Start from a picture').click()
  page.locator('#editor canvas').first.wait_for()  # A file that comes before it is lost.
  page.locator('#editor input[type=file]').first.set_input_files(tmp_path / 'own.png')
  page.get_by_role('button', name='Zoom in').wait_for()
  for _ in range(5):  # The editor's buttons are there a moment before its picture.
    assert draw(page, Prompt='sun').startswith('1 of 1')
    whole, metadata = downloaded(page)
    if 'image' in metadata:
      break
  assert metadata['image'] == 'uploaded' and 'mask' not in metadata
  assert metadata['strength'] == '0.8' and (whole != colors).mean() > 0.9
  box = page.locator('#editor canvas').first.bounding_box()
  across, down = box['x'] + box['width'] / 2, box['y'] + box['height'] / 2
  page.mouse.move(across - 20, down)
  page.mouse.down()
  page.mouse.move(across + 20, down, steps=8)
  page.mouse.up()
  assert draw(page).startswith('1 of 1')
  part, metadata = downloaded(page)
  changed = (part != colors).any(axis=-1)
  half = slice(tiny.SIZE // 2 - 1, tiny.SIZE // 2 + 1)
  assert changed[half, half].any() and changed.mean() < 0.1  # A stroke through the middle.
  assert metadata['mask'] == 'painted' and 'strength' not in metadata


def test_a_bad_input_is_one_sentence_and_the_page_goes_on(page):
  size = 'Height_x_width_in_pixels'
  said = draw(page, Prompt='sun', **{size: '30x33'})
  assert 'the size 30x33' in said and said.endswith('the nearest such size is 32x32.')
  assert draw(page, **{size: 'wide'}).startswith("size is 'wide'; give height x width in pixels")
  assert 'an edge of 64 pixels is the most' in draw(page, **{size: '96'})
  assert 'seed is empty; give a whole number' in draw(page, **{size: '', 'Seed': ''})
  assert 'tokens' in draw(page, Prompt='sun ' * 100, Seed=0)
  assert draw(page, Prompt='<b>*a*').startswith('1 of 1')
  assert downloaded(page)[1]['prompt'] == '<b>*a*'


def test_nothing_was_asked_of_another_machine(served):
  """Of all that the tests above have done."""
  assert set(served[1].read_text().split()) <= HERE


@pytest.mark.parametrize(('asked', 'said'), [
  ({'steps': 10}, 'steps is 10; give a number from 1 to 9'), ({'count': 3}, 'pictures is 3'),
  ({'prompt': 'x' * 2001}, '2,001 letters'), ({'steps': 1.5}, 'steps is 1.5; give a whole'),
  ({'sampler': 'eule'}, "sampler is 'eule'; did you mean euler"), ({'seed': -1}, 'seed is -1'),
  ({'size': '4096'}, 'the size is 4096x4096'), ({'guidance': None}, 'guidance is None'),
])
def test_limits_hold_whoever_asks(session, asked, said):
  desk = demo.Desk(session, Limits(most_pictures=2, most_steps=9))
  whole = {'prompt': 'sun', 'negative': '', 'seed': 0, 'count': 1, 'size': '', 'steps': 1}
  with pytest.raises(UserError, match=said):
    next(desk.draw(whole | asked))


class Plain(OfOneSize):
  """A model that draws one color, of no prompt and at one size."""

  networks: ClassVar = {}
  trained_size = (8, 16)

  def check_config(self, config):
    typed(type(config), vars(config), '')

  def rows(self, prompts, *_, **__):
    return {}

  def sample(self, weights, prompts, config, **how):
    for _ in prompts:
      yield np.full((1, *self.trained_size, 3), config.temperature - 1, np.float32)


def test_a_model_of_another_kind_has_the_fields_that_mean_something_to_it(session, monkeypatch):
  gradio = pytest.importorskip('gradio')
  fields = lambda session: set(demo._fields(gradio, session, Limits())[0])
  plain = Session(Plain(), {}, VAESampleConfig(), 'plain', session.mesh)
  with gradio.Blocks():
    assert fields(plain) == {'prompt', 'temperature', 'seed', 'count'}
    own = {'prompt', 'negative', 'sampler', 'steps', 'guidance', 'seed', 'count', 'size'}
    assert fields(session) == own | {'editor', 'strength'}
    monkeypatch.setattr(Session, 'needs', ['control', 'image'])
    assert fields(session) == own | {'editor', 'strength', 'control'}
  asked = {'prompt': 'any', 'seed': 0, 'count': 2, 'temperature': 2.0}
  drawn = list(demo.Desk(plain, Limits()).draw(asked))
  assert [metadata['index'] for _, metadata in drawn] == ['0', '1']
  image = np.asarray(Image.open(drawn[0][0]))
  assert image.shape == (8, 16, 3) and (image == 255).all()
  with pytest.raises(UserError, match='temperature'):
    next(demo.Desk(plain, Limits()).draw(asked | {'temperature': -1.0}))


def test_files_are_kept_for_a_while(monkeypatch):
  monkeypatch.setattr(demo, 'KEPT', 2)
  pictures = demo.Pictures()
  paths = [pictures.add(Image.new('RGB', (2, 2)), 'a/b', {}) for _ in range(3)]
  assert [os.path.exists(path) for path in paths] == [False, True, True]
  assert sorted(map(str, pictures.folder.iterdir())) == paths[1:]


def test_without_gradio_one_sentence_says_what_to_install(fails, monkeypatch):
  monkeypatch.setitem(sys.modules, 'gradio', None)
  assert "pip install 'diffusion_jax[demo]'" in fails('demo')
