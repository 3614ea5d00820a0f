"""Helpers of a notebook, in a shell of IPython whose outputs are kept."""

import io
import json
import sys

import numpy as np
import pytest
from IPython.core.displaypub import CapturingDisplayPublisher
from IPython.core.interactiveshell import InteractiveShell
from PIL import Image

from diffusion_jax import notebook
from diffusion_jax.errors import UserError
from diffusion_jax.parallel import startup
from diffusion_jax.session import Session
from diffusion_jax.viz.grids import make_grid
from tests import tiny


@pytest.fixture
def outputs(monkeypatch):
  """outputs(): what was displayed so far, in order: the data by type, and whether it is an update.
  """
  shell = InteractiveShell.instance()
  monkeypatch.setattr(shell, 'display_pub', CapturingDisplayPublisher())
  yield lambda: shell.display_pub.outputs
  InteractiveShell.clear_instance()


def _pixels(output):
  found = output['data']['image/png']
  return np.asarray(Image.open(io.BytesIO(found)).convert('RGB'))


@pytest.fixture(scope='module')
def session(finished):
  return Session.open(workdir=str(finished))


@pytest.mark.parametrize('form', ['uint8', 'float', 'pillow', 'file', 'one', 'list'])
def test_pictures_of_any_kind_are_one_grid_with_captions(outputs, tmp_path, form):
  images = np.random.default_rng(0).integers(0, 256, (3, 8, 16, 3), dtype=np.uint8)
  Image.fromarray(images[0]).save(tmp_path / 'x.png')
  given = {
    'uint8': images, 'float': images / np.float32(127.5) - 1, 'one': images[0],
    'pillow': [Image.fromarray(image) for image in images], 'file': tmp_path / 'x.png',
    'list': [images[0], tmp_path / 'x.png', Image.fromarray(images[2])],
  }[form]
  count = 1 if form in ('file', 'one') else 3
  images = images[[0, 0, 2]] if form == 'list' else images[:count]
  captions = ['a', 'b', 'c'][:count]
  notebook.show(given, captions)
  output, = outputs()
  columns = 1 if count == 1 else 2
  wanted = make_grid(images, columns, captions, 16)  # 8 pixels become 128.
  assert np.array_equal(_pixels(output), np.asarray(wanted))


def test_pictures_of_several_sizes_are_framed_and_what_is_none_is_said(outputs):
  small, large = np.zeros((8, 8, 3), np.uint8), np.zeros((200, 160, 3), np.uint8)
  notebook.show([small, large], columns=2, scale=1)
  assert _pixels(outputs()[0]).shape == (200 + 8, 2 * 160 + 12, 3)
  for wrong, said in (
    ([], 'no pictures'), (np.zeros((4, 4)), r'shape \[4\]'), ([np.zeros((4, 4, 3), int)], 'int64'),
  ):
    with pytest.raises(UserError, match=said):
      notebook.show(wrong)


def test_curves_grow_while_a_run_is_watched(outputs, tmp_path):
  metrics = tmp_path / 'metrics.jsonl'
  shown = Image.new('RGB', (8, 8), 'red')

  def running():
    """Write one line more each time, and samples with the second."""
    running.asked += 1
    line = {'kind': 'train', 'step': running.asked, 'loss': 1 / running.asked, 'time': 1.0}
    with metrics.open('a') as file:
      file.write(json.dumps(line) + '\n')
    if running.asked == 2:
      (tmp_path / 'samples').mkdir()
      shown.save(tmp_path / 'samples' / 'step_00000002.png')
    return running.asked < 3

  running.asked = 0
  notebook.watch(tmp_path, ('loss', 'fd_clip'), running=running, seconds=0)
  ids = [output['transient']['display_id'] for output in outputs()]
  updates = [o for o in outputs() if o['update']]
  charts = [o for o in updates if o['transient']['display_id'] == ids[0]]
  assert len(set(ids)) == 2 and len(charts) == 3 and len(updates) == 4
  assert len({_pixels(output).tobytes() for output in charts}) == 3
  grid, = (o for o in updates if o not in charts)
  assert np.array_equal(_pixels(grid), np.asarray(shown))
  last = np.asarray(notebook.curves(tmp_path, ('loss', 'fd_clip')).convert('RGB'))
  assert np.array_equal(last, _pixels(charts[-1]))


def test_a_training_that_fails_says_why(outputs, tmp_path):
  with pytest.raises(UserError, match=r"ended with code 2: .*no config 'toy/edmm'; did you mean"):
    notebook.train('toy/edmm', tmp_path, 'loop.total_steps=3', seconds=0.1)


def test_a_command_runs_here_and_a_failure_ends_the_cell(capsys, monkeypatch):
  notebook.command('configs')
  assert 'quickstart' in capsys.readouterr().out
  with pytest.raises(UserError, match='command sample ended with code 2'):
    notebook.command('sample', '--prompt', 'sun', '--model', 'nowhere', '--out', 'x')
  assert 'nowhere' in capsys.readouterr().err
  # On the host of a TPU, which would be asked for other processes, after JAX is in use.
  monkeypatch.setenv('JAX_PLATFORMS', 'tpu')
  for name in ('TPU_SKIP_MDS_QUERY', *startup.EXPLICIT):
    monkeypatch.delenv(name, raising=False)
  assert startup.find_cluster().processes != 1
  for name in startup.EXPLICIT:
    monkeypatch.setenv(name, '')
  notebook.command('configs')
  assert startup.find_cluster().processes == 1


def test_a_page_is_shown_in_a_frame_that_it_cannot_leave(outputs, tmp_path):
  (tmp_path / 'a.html').write_text('<p class="x">one & two</p>')
  notebook.page(tmp_path / 'a.html', height=300)
  data = outputs()[0]['data']
  assert 'srcdoc="&lt;p class=&quot;x&quot;&gt;one &amp; two&lt;/p&gt;"' in data['text/html']
  assert 'height="300"' in data['text/html'] and 'a.html' in data['text/plain']


def test_a_session_draws_as_the_command_does(command, finished, session, tmp_path):
  Image.new('RGB', (40, 20), 'red').save(tmp_path / 'red.png')
  Image.new('L', (8, 4), 255).crop((-4, 0, 8, 4)).save(tmp_path / 'mask.png')
  given = {'image': str(tmp_path / 'red.png'), 'mask': str(tmp_path / 'mask.png')}
  options = [x for name, value in given.items() for x in (f'--{name}', value)]
  assert command(
    'sample', '--workdir', finished, '--prompt', 'sun', '--prompt', 'sun', '--seed', 3,
    '--negative', 'cat', '--guidance', 3, '--batch', 1, '--out', tmp_path / 'out', *options,
  ) == 0
  drawn = list(session.sample(['sun'] * 2, seed=3, negative='cat', guidance=3.0, **given))
  assert session.size(**given) == drawn[0][0].shape[:2]
  for index, (image, metadata) in enumerate(drawn):
    file = Image.open(tmp_path / 'out' / f'000{index}_sun.png')
    assert metadata == file.text
    assert np.abs(np.asarray(file).astype(int) - image).max() <= 1  # Of another number of devices.
  with pytest.raises(UserError, match='the size 30x33 cannot be halved'):
    next(session.sample('sun', size='30x33'))
  with pytest.raises(UserError, match='--strength needs a picture'):
    next(session.sample('sun', strength=0.5))


def test_a_box_draws_its_prompt_or_says_what_is_wrong(outputs, session, monkeypatch, capsys):
  import ipywidgets

  boxes = []
  monkeypatch.setattr(ipywidgets, 'VBox', lambda parts: boxes.append(parts) or ipywidgets.Text())
  draw = notebook.text_box(session, steps=1)
  prompt, seed, button, _ = boxes[0]
  prompt.value, seed.value = 'sun', 5
  button.click()
  draw('sun', seed=5)
  clicked, called = [_pixels(output) for output in outputs() if 'image/png' in output['data']]
  assert np.array_equal(clicked, called)
  assert clicked.shape[1] == tiny.SIZE * 4 + 8
  prompt.value = 'sun ' * 100
  button.click()
  assert 'tokens' in capsys.readouterr().out
  monkeypatch.setitem(sys.modules, 'ipywidgets', None)
  draw = notebook.text_box(session, steps=1)
  assert 'no ipywidgets' in capsys.readouterr().out
  draw('sun', seed=5)
  assert np.array_equal(_pixels(outputs()[-1]), called)


def test_without_ipython_one_sentence_says_what_to_install(monkeypatch, tmp_path):
  monkeypatch.setitem(sys.modules, 'IPython.display', None)
  for call in (
    lambda: notebook.show(np.zeros((1, 4, 4, 3), np.uint8)), notebook.text_box,
    lambda: notebook.watch(tmp_path, running=lambda: False),
    lambda: notebook.train('toy/edm', tmp_path / 'run'),
  ):
    with pytest.raises(UserError, match=r"pip install 'diffusion_jax\[notebook\]'"):
      call()
  assert not (tmp_path / 'run').exists()
