"""The report of small run directories: what is in it, what must not be."""

import base64
import hashlib
import html
import html.parser
import io
import json
import re

import numpy as np
import pytest
from PIL import Image

from diffusion_jax.errors import UserError
from diffusion_jax.viz import report
from diffusion_jax.viz.grids import make_grid, save_png
from diffusion_jax.viz.page import SCRIPT
from diffusion_jax.viz.report import write_report
from diffusion_jax.viz.run_files import read_run


def _train(step, **values):
  return {'kind': 'train', 'step': step, 'time': step * 0.5, **values}


def _write(workdir, lines=(), tail='', **objects):
  workdir.mkdir(exist_ok=True)
  for name, value in objects.items():
    (workdir / f'{name}.json').write_text(json.dumps(value))
  if lines or tail:
    text = ''.join(json.dumps(line) + '\n' for line in lines)
    (workdir / 'metrics.jsonl').write_text(text + tail)
  return workdir


def _grid(workdir, step, size=32, **text):
  rng = np.random.default_rng(step)
  image = make_grid(rng.integers(0, 256, (2, size, size, 3), dtype=np.uint8), 2)
  save_png(image, workdir / 'samples' / f'step_{step:08d}.png', text)
  return image


def _page(workdir):
  return write_report(workdir).read_text(encoding='utf-8')


def _sections(page):
  """Ids, but for what every page begins with."""
  first, *rest = re.findall(r'<section id="([^"]*)"', page)
  assert first == 'about'
  return rest


def _text(page):
  return ' '.join(html.unescape(re.sub(r'<[^>]+>', ' ', page)).split())


def _images(page):
  sources = re.findall(r'src="data:image/png;base64,([^"]*)"', page)
  return [Image.open(io.BytesIO(base64.b64decode(source))) for source in sources]


def test_a_cache_that_is_being_filled_is_shown(tmp_path):
  message = 'encoding latents: 128 of 4,000 records (30.1 a second)'
  found = _text(_page(_write(tmp_path / 'run', status={'state': 'encoding', 'message': message})))
  assert message in found and 'encoding' in found.replace(message, '')


def test_the_first_screen_says_what_was_trained_on_what_and_how_far_it_is(tmp_path):
  card = ('# Text-to-image model (openmoji, 64 x 64 pixels)\n\nTrained.\n\n'
          '- Trained parameters: 1,967,504\n- Data: openmoji, 3,312 images\n\n## Scores\n')
  status = {'state': 'peer_lost', 'step': 300, 'total_steps': 1200, 'seconds': 150.0}
  lines = [_train(step, loss=1.0, seconds_per_step=0.5) for step in (100, 200, 300)]
  workdir = _write(tmp_path / 'run', lines, status=status, config={
    'task': 'diffusion', 'data': {'dataset': 'folder:x', 'size': 32}, 'loop': {'batch_size': 8},
  })
  bar = '25 % of 1,200 steps, about 7 min 30 s of training left'
  found = _text(re.search(r'<section id="about">.*?</section>', _page(workdir), re.DOTALL)[0])
  assert found.startswith(f'diffusion on folder:x, 32 pixels; batch 8 run peer lost {bar}')
  (workdir / 'README.md').write_text(card)
  page = _page(workdir)
  found = _text(re.search(r'<section id="about">.*?</section>', page, re.DOTALL)[0])
  assert found.startswith('Text-to-image model 1,967,504 trained parameters; on openmoji, 3,312 '
                          'images; batch 8 run · Model card peer lost')
  assert '<progress max="100" value="25.0"' in page and '<title>Text-to-image model' in page
  # It is not there, or the page of a card that is not ours is of the config again.
  (workdir / 'README.md').write_text('# Some\n' + 'x' * 2**21)
  assert '<h1>diffusion</h1>' in _page(workdir)
  _write(workdir, status=status | {'state': 'finished', 'step': 1200})
  assert '<progress' not in _page(workdir)


@pytest.fixture(scope='module')
def full(tmp_path_factory):
  workdir = tmp_path_factory.mktemp('runs') / 'my_run'
  lines = [
    _train(step, loss=1 / step, loss_vlb=2 / step, grad_norm=1.0, learning_rate=1e-4,
           images_per_second=30.0 + step / 100, data_wait_fraction=0.01,
           loss_by_timestep=[1.0, None, 3.0])
    for step in (100, 200, 300)
  ]
  lines.append({'kind': 'evaluation', 'step': 300, 'fd_clip': 12.5})
  _write(
    workdir, lines, config={'task': 'text_to_image', 'train': {'batch_size': 48}},
    scores={
      'untrained': {'fd_clip': 99.5}, 'generated': {'fd_clip': 12.25, 'clip_score': 31.5},
      'real': {'fd_clip': 3.5}, 'settings': {'guidance': 4.5},
    },
    versions={'jax': '0.10.2'}, status={'state': 'finished'},
  )
  (workdir / 'README.md').write_text('# Card')
  for step in (100, 200, 300):
    _grid(workdir, step, captions=json.dumps(['a red fox', 'a tree']))
  return workdir


@pytest.fixture(scope='module')
def full_page(full):
  return _page(full)


def test_every_section_is_there_with_its_data(full_page):
  assert _sections(full_page) == [
    'samples', 'scores', 'loss', 'metrics', 'learning-rate', 'timesteps', 'speed',
    'config', 'versions',
  ]


def test_title_status_and_key_figures(full_page):
  page = full_page
  assert '<h1>text to image</h1>' in page and 'my_run' in page
  assert '<span class="pill good">finished</span>' in page
  figures = re.findall(r'<dt>(.*?)</dt><dd>(.*?)</dd>', page)
  assert figures == [
    ('Fréchet distance, CLIP features ↓', '12.25'), ('CLIP score ↑', '31.5'), ('Step', '300'),
    ('Loss', '0.003333'), ('Examples/s, median', '32'), ('Time', '2 min 30 s'),
    ('Fréchet distance, CLIP features ↓', '12.5'),
  ]
  assert '<dd class="muted">real test data 3.5\nuntrained model 99.5</dd>' in page
  assert 'href="README.md"' in page


def test_scores_are_a_table_of_metrics_by_model(full_page):
  table = re.search(r'<table class="numbers">.*?</table>', full_page, re.DOTALL)[0]
  rows = [re.findall(r'<t[hd](?: [^>]*)?>(.*?)</t[hd]>', row) for row in table.split('</tr>')[:-1]]
  assert rows[0] == ['', 'this model', 'real test data', 'untrained model']
  assert rows[1] == ['Fréchet distance, CLIP features ↓', '12.25', '3.5', '99.5']
  assert rows[2] == ['CLIP score ↑', '31.5', '–', '–']
  assert 'How they were measured guidance 4.5' in _text(full_page)


def test_each_metric_has_its_chart(full_page):
  titles = re.findall(r'<figcaption>([^<]*)</figcaption><div class="plot"', full_page)
  assert titles == [
    'Loss', 'Loss, variational bound', 'Grad norm', 'Learning rate',
    'Loss over t / T', 'Examples per second ↑', 'Fraction of the time spent waiting for data ↓',
  ]
  # A single value is no chart.
  assert '<dd>12.5</dd><dd class="muted">at step 300</dd>' in full_page


def test_the_newest_grid_is_whole_and_earlier_ones_follow(full, full_page):
  page = full_page
  *earlier, newest = _images(page)
  with Image.open(full / 'samples' / 'step_00000300.png') as original:
    np.testing.assert_array_equal(np.asarray(newest), np.asarray(original))
  assert len(earlier) == 2
  frames = re.findall(r'<img data-step="(\d+)"[^>]* alt="([^"]*)"( class=shown)?>', page)
  assert frames == [(step, f'Step {step}: a red fox, a tree', shown) for step, shown in (
    ('100', ''), ('200', ''), ('300', ' class=shown')
  )]
  assert '<li>a red fox</li>' in page


def test_nothing_is_loaded_from_outside(full_page):
  page = full_page
  loaded = []

  class Parser(html.parser.HTMLParser):
    def handle_starttag(self, tag, attributes):
      assert tag not in ('link', 'iframe', 'object', 'embed')
      loaded.extend(
        value for name, value in attributes if name in ('src', 'href', 'xlink:href', 'srcset')
      )

  Parser().feed(page)
  assert loaded and all(
    value.startswith(('#', 'data:')) or value == 'README.md' for value in loaded
  )
  # One program, the package's own, which the page names by its hash and which may ask nobody.
  script = re.findall(r'<script>(.*?)</script>', page, re.DOTALL)
  assert script == [SCRIPT] and page.count('<script') == 1 and 'connect-src' not in page
  digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
  assert f"script-src 'sha256-{digest}'" in page and "default-src 'none'" in page
  assert not re.search(r'https?:|@import|url\((?!#)', page)
  ids = re.findall(r'\bid="([^"]*)"', page)
  assert len(ids) == len(set(ids))


def test_text_of_the_run_is_escaped_everywhere(tmp_path):
  evil = '<script>alert("x")</script>'
  workdir = _write(
    tmp_path / '<b>run', [_train(1, **{evil: 1.0, f'loss{evil}': 1.0, f'learning_rate{evil}': 1})],
    config={'task': evil, 'group' + evil: {evil: evil}}, versions={evil: evil},
    scores={evil: {evil: 1.0, 'word': evil}, 'settings': {evil: evil}},
    status={'state': evil, 'message': evil},
  )
  _grid(workdir, 1, captions=json.dumps([evil]), prompt=evil)
  page = _page(workdir)
  assert page.count('<script') == 1 and '<b>' not in page
  assert html.escape(evil) in page
  assert page.count('&lt;script&gt;') >= 15


def test_the_last_line_of_a_step_wins(tmp_path):
  lines = [_train(s, loss=9.0) for s in (100, 200, 300)]
  lines += [_train(200, loss=2.0), {'kind': 'evaluation', 'step': 200, 'loss': 5.0}]
  workdir = _write(tmp_path, lines)
  metrics = read_run(workdir).metrics
  steps = [(line['step'], line['loss']) for line in metrics.train.lines]
  assert steps == [(100, 9), (200, 2), (300, 9)]
  assert [line['loss'] for line in metrics.evaluation.lines] == [5.0]
  # The run is where its last line says, not at the largest step ever reached.
  assert '<dt>Step</dt><dd>200</dd>' in _page(workdir)


@pytest.mark.parametrize('tail', ['{"kind": "train", "st', '{"kind": "train"', '42\n', '\0\0\n'])
def test_torn_lines_are_left_out_and_counted(tmp_path, tail):
  workdir = _write(tmp_path, [_train(100, loss=1.0)], tail)
  assert [line['step'] for line in read_run(workdir).metrics.train.lines] == [100]
  assert '1 line of metrics.jsonl could not be read' in _text(_page(workdir))


def test_a_line_torn_inside_a_letter_is_left_out(tmp_path):
  workdir = _write(tmp_path, [_train(100, loss=1.0)])
  with open(workdir / 'metrics.jsonl', 'ab') as file:
    file.write('{"kind": "é'.encode()[:-1])
  assert len(read_run(workdir).metrics.train.lines) == 1


def test_values_that_are_not_finite_do_not_stop_the_report(tmp_path):
  lines = [_train(1, loss=float('nan'), images_per_second=None), _train(2, loss=float('inf'))]
  page = _page(_write(tmp_path, lines))
  assert '2 values missing or not finite' in _text(page)
  assert _sections(page) == ['loss']


@pytest.mark.parametrize(
  'parts, sections',
  [
    ({'config': {'task': 'clip'}}, ['config']),
    ({'config': {'a': 1}, 'versions': {'jax': '1'}}, ['config', 'versions']),
    ({'scores': {'test': {'psnr': 27.5}}}, ['scores']),
    ({'config': {'a': 1}, 'scores': {'settings': {'n': 1}}}, ['config']),
    ({'lines': [_train(1, learning_rate=0.1)]}, ['learning-rate']),
    ({'lines': [_train(1, images_per_second=3)]}, ['speed']),
    ({'lines': [_train(1, loss_by_timestep=[1.0, None])]}, ['timesteps']),
    ({'lines': [{'kind': 'evaluation', 'step': 1, 'psnr': 20.0}]}, ['metrics']),
  ],
)
def test_sections_come_only_with_their_data(tmp_path, parts, sections):
  assert _sections(_page(_write(tmp_path, **parts))) == sections


def test_scores_of_other_tasks_keep_their_names(tmp_path):
  text = _text(_page(_write(tmp_path, scores={'test': {'psnr': 27.5, 'usage': 0.25}})))
  assert 'this model PSNR, dB ↑ 27.5 Usage 0.25' in text


def test_config_is_a_table_with_dotted_groups(tmp_path):
  config = {'a': {'b': {'c': None}, 'd': [1, 2]}, 'on': True, 'link': 'https://example.org'}
  text = _text(_page(_write(tmp_path, config=config)))
  assert 'on true link https://example.org a d 1, 2 a.b c none' in text


def test_the_page_stays_below_its_limit_by_shrinking_images(tmp_path, monkeypatch):
  monkeypatch.setattr(report, 'MAX_BYTES', 300_000)
  for step in range(1, 51):
    _grid(tmp_path, step, size=128)
  _write(tmp_path, [_train(1, loss=1.0)])
  path = write_report(tmp_path)
  images = _images(path.read_text())
  assert 100_000 < path.stat().st_size < 300_000
  assert len(images) == 40
  assert images[-1].width > 1.5 * images[0].width
  assert '40 of 50 steps' in _text(path.read_text())


def test_a_damaged_grid_gives_way_to_the_one_before(tmp_path):
  _grid(tmp_path, 1)
  _grid(tmp_path, 2)
  path = tmp_path / 'samples' / 'step_00000002.png'
  path.write_bytes(path.read_bytes()[:100])
  (tmp_path / 'samples' / 'other.png').write_bytes(b'')
  page = _page(tmp_path)
  assert 'alt="Step 1"' in page and len(_images(page)) == 1


def test_writing_again_replaces_the_page_and_leaves_nothing_else(tmp_path):
  workdir = _write(tmp_path, [_train(1, loss=1.0)])
  assert _page(workdir) == _page(workdir)
  assert sorted(path.name for path in workdir.iterdir()) == ['metrics.jsonl', 'report.html']


def test_a_missing_or_empty_directory_is_named(tmp_path):
  with pytest.raises(UserError, match=r'absent.*workdir'):
    write_report(tmp_path / 'absent')
  (tmp_path / 'bare').mkdir()
  with pytest.raises(UserError, match=r'bare holds no run'):
    write_report(tmp_path / 'bare')
  assert not list((tmp_path / 'bare').iterdir())


@pytest.mark.parametrize('text', ['{"a": ', '[1]'])
def test_a_damaged_json_file_is_named(tmp_path, text):
  (tmp_path / 'config.json').write_text(text)
  with pytest.raises(UserError, match=r'config\.json'):
    write_report(tmp_path)


def test_the_schedule_is_that_of_the_config(tmp_path):
  values = {'beta_schedule': 'flow', 'num_train_timesteps': 50}
  page = _page(_write(tmp_path / 'a', config={'task': 'diffusion', 'settings': {
    'schedule': values,
  }}))
  section = re.search(r'<section id="schedule">.*?</section>', page, re.DOTALL)[0]
  assert 'Flow. A noised image' in section and 'at t of 50 steps' in section
  assert 'The last step is pure noise.' in section
  lines = [re.search(rf'class="{look}" d="([^"]*)"', section)[1] for look in ('s0', 's1 dashed')]
  alpha, sigma = (np.array(re.findall(r'[ML](\S+) ([\d.]+)', d), float) for d in lines)
  # From t = 1/50 both are straight, alpha down to 0 and sigma up to 1; SVG's y points down.
  assert len(alpha) == len(sigma) == 50
  np.testing.assert_allclose(np.diff(alpha[:, 1]), -np.diff(sigma[:, 1]), atol=0.21)
  assert (np.diff(alpha[:, 1]) > 0).all()


def test_a_continuous_schedule_is_drawn_by_its_name(tmp_path):
  config = {'task': 'diffusion', 'settings': {'schedule': {'process': 'flow'}}}
  section = re.search(r'<section id="schedule">.*', _page(_write(tmp_path, config=config)))[0]
  page = (tmp_path / 'report.html').read_text()
  assert section and 'Flow. A noised image' in page and 'σ times noise.' in page
  assert 'The last step is pure noise.' in page


@pytest.mark.parametrize('settings', [
  None, 7, {}, {'schedule': 'flow'}, {'schedule': {'beta_schedule': 'of a later version'}},
  {'schedule': {'gone': 1}},
])
def test_runs_without_a_known_schedule_have_a_page_without_it(tmp_path, settings):
  config = {'task': 'diffusion', 'settings': settings}
  assert _sections(_page(_write(tmp_path / 'a', config=config))) == ['config']


def _shown(page):
  return dict(re.findall(r'<dt>(.*?)</dt><dd>(.*?)</dd>', page))


def test_how_far_a_run_is_comes_from_one_moment(tmp_path):
  """The last line of metrics is of step 240; the run has gone on since."""
  status = {'state': 'finished', 'step': 250, 'total_steps': 250, 'seconds': 798.0, 'pid': 7,
            'message': 'said once'}
  lines = [_train(240, loss=2.0, images_per_second=3.0) | {'time': 420.0}]
  page = _page(_write(tmp_path, lines, status=status))
  assert _shown(page) == {
    'Step': '250 of 250', 'Loss at step 240': '2', 'Examples/s, median': '3', 'Time': '13 min 18 s',
    'Loss': '2', 'Examples per second ↑': '3',  # Of a single line: figures where charts would be.
  }
  header = _text(re.search(r'<header>.*?</header>', page, re.DOTALL)[0])
  assert header.endswith('finished said once')
  assert '240' not in header and '798' not in page and '7 min' not in page


def test_a_status_that_is_older_than_the_metrics_gives_way(tmp_path):
  status = {'state': 'killed', 'step': 100, 'total_steps': 900, 'seconds': 50.0}
  page = _page(_write(tmp_path, [_train(300, loss=2.0)], status=status))
  assert _shown(page) == {'Step': '300 of 900', 'Loss': '2', 'Time': '2 min 30 s'}


def test_only_what_is_scored_stands_out(tmp_path):
  scores = {'commonest': {'accuracy': 0.5}, 'untrained': {'accuracy': 0.75},
            'test': {'accuracy': 0.25}}
  page = _page(_write(tmp_path, scores=scores))
  table = re.search(r'<table class="numbers">.*?</table>', page, re.DOTALL)[0]
  assert re.findall(r'<td([^>]*)>(.+?)</td>', table) == [
    (' class="own"', '0.25'), ('', '0.75'), ('', '0.5')
  ]
  heads = re.findall(r'<th scope="col">(.*?)</th>', table)
  assert heads == ['this model', 'untrained model', 'always the commonest class']
  assert 'nth-child(2) { font-weight' not in page
  _write(tmp_path / 'b', scores={'untrained': {'fid': 3.0}})
  assert 'class="own"' not in _page(tmp_path / 'b')


@pytest.mark.parametrize(('task', 'metric', 'title'), [
  ('classifier', 'accuracy', 'Fraction of images given their own class ↑'),
  ('clip', 'retrieval_r1_of_128', 'Own caption ranked first of 128 ↑'),
  ('clip', 'retrieval_r5_of_379', 'Own caption among the first 5 of 379 ↑'),
  ('diffusion', 'fd_dinov2', 'Fréchet distance, DINOv2 features ↓'),
  ('diffusion', 'fd_clip_infinity', 'Fréchet distance, CLIP features, for infinitely many ↓'),
  ('diffusion', 'kid_classifier_std',
   "Kernel distance, the classifier's features, deviation over subsets"),
])
def test_a_curve_is_titled_by_what_its_task_measures(tmp_path, task, metric, title):
  lines = [_train(1, **{metric: 0.5}), _train(2, **{metric: 0.6})]
  page = _page(_write(tmp_path, lines, config={'task': task}))
  assert f'<figcaption>{html.escape(title)}</figcaption><div class="plot">' in page


def test_scores_say_what_they_are_of(tmp_path):
  page = _page(_write(tmp_path, scores={
    'generated': {'fid': 3.0}, 'measured': ['On <these>.', 'And those.'],
    'warnings': ['It is near chance.'], 'settings': {'step': 40, 'seed': 1},
  }))
  section = _text(re.search(r'<section id="scores">.*?</section>', page, re.DOTALL)[0])
  assert section.startswith('Scores On <these>. And those.')
  assert 'What to beware of It is near chance.' in section and 'step 40' in section
  assert '<details open><summary>What to beware of' in page


def test_a_grid_says_what_it_shows(tmp_path):
  _grid(tmp_path, 3, about='Test images with <answers>.', captions='["right: a"]')
  text = _text(_page(tmp_path))
  assert 'Pictures Test images with <answers>. About these pictures' in text
  assert text.count('Test images with') == 1
