"""Pages in a real browser: whom they can be read by, what moves, and that the live one follows."""

import json
import threading
from types import SimpleNamespace

import numpy as np
import pytest

from diffusion_jax.viz import serve
from diffusion_jax.viz.compare import comparison_page
from diffusion_jax.viz.evaluation import ClassRow, Pair, Prompt, Shown, write_evaluation_page
from diffusion_jax.viz.grids import make_grid, save_png
from diffusion_jax.viz.report import write_report
from diffusion_jax.viz.search import Hit, Result, write_search_page
from diffusion_jax.viz.serve import make_server

RNG = np.random.default_rng(0)
PICTURES = RNG.integers(0, 256, (16, 32, 32, 3), dtype=np.uint8)
LONG = 'man farmer medium-light skin tone with_a_word_that_is_longer_than_a_phone_is_wide' * 2


def add_lines(workdir, steps):
  with (workdir / 'metrics.jsonl').open('a') as file:
    for s in steps:
      by = [1.0 + 1 / s, 0.5 + 1 / s]
      file.write(json.dumps({
        'kind': 'train', 'step': s, 'time': s / 2, 'loss': 1 + 1 / s, 'gradient_norm': 100 / s,
        'images_per_second': 50.0, 'seconds_per_step': 0.5, 'loss_by_timestep': by, 'threads': 9,
        'learning_rate': 1e-3 / s,
      }) + '\n')


def add_grid(workdir, step):
  grid = make_grid(PICTURES[:4], 2, [f'{step}'] * 4, scale=4)
  save_png(grid, workdir / 'samples' / f'step_{step:08d}.png', {'captions': '["a fox", "a tree"]'})


def a_run(workdir, total=40):
  workdir.mkdir()
  values = {
    'config': {'task': 'diffusion', 'data': {'dataset': 'openmoji', 'size': 64}, LONG: [LONG],
               'settings': {'schedule': {'process': 'flow'}}},
    'status': {'state': 'training', 'step': 20, 'total_steps': total, 'seconds': 10.0,
               'message': LONG, 'goodput': {'step': 5.0, 'compile': 5.0}},
    'scores': {'generated': {'fd_clip': 3.0, 'clip_score': 30.0}, 'real': {'fd_clip': 1.0},
               'untrained': {'fd_clip': 99.0}, 'warnings': [LONG], 'settings': {'seed': 1}},
    'versions': {'jax': '1'},
  }
  for name, value in values.items():
    (workdir / f'{name}.json').write_text(json.dumps(value))
  (workdir / 'README.md').write_text('# Model (x)\n\n- Trained parameters: 12\n\n## Scores\n')
  add_lines(workdir, range(1, 21))
  for step in (10, 20):
    add_grid(workdir, step)
  return workdir


@pytest.fixture(scope='module')
def pages(tmp_path_factory):
  """The paths of a page of each kind."""
  folder = tmp_path_factory.mktemp('pages')
  first, second = a_run(folder / 'a'), a_run(folder / 'b', 80)
  found = {name: folder / f'{name}.html' for name in ('compare', 'scores', 'sweep', 'search')}
  found['report'] = write_report(first)
  found['compare'].write_text(comparison_page([first, second]))
  cloud = SimpleNamespace(
    reference=RNG.normal(size=(60, 2)), samples=RNG.normal(size=(40, 2)),
    reference_fraction=[0.2, 0.1], samples_fraction=[0.2, 0.1],
  )
  values = {'fd_clip': 3.0, 'clip_score': 30.0}
  write_evaluation_page(
    found['scores'], {'generated': values, 'real': values, 'warnings': [LONG],
                      'intervals': {'fd_clip': {'low': 1.0, 'high': 5.0}},
                      'settings': {'model': LONG, 'reference': 'x'},
                      'history': [{'step': s, **values} for s in (1, 2)]},
    clouds={'clip:embedding': cloud}, first=[Shown(p, i, LONG) for i, p in enumerate(PICTURES)],
    pairs=[Pair(p, p, 0.9, 'image 1') for p in PICTURES], best=[Prompt(PICTURES[0], LONG, 80.0)],
    classes=[ClassRow('body', 3, {'generated': 0.5, 'real': 1.0})],
  )
  swept = {f'guidance={g} steps={n}': {'combination': {'guidance': g, 'steps': n},
                                       'network_calls': 2 * n} for g in (1, 4) for n in (5, 10)}
  write_evaluation_page(found['sweep'], {
    **{name: {'fd_clip': float(i), 'clip_score': 30.0 + i} for i, name in enumerate(swept)},
    'real': values, 'sweep': swept,
  })
  write_search_page(found['search'], [
    Result(LONG, [Hit(LONG, 0.3, p) for p in PICTURES], PICTURES[0])
  ], ['16 pictures.'])
  return found


@pytest.fixture
def opened(browser):
  """opened(address, width, scheme): a page that has said no word of an error."""
  errors, contexts = [], []

  def open_page(address, width=1280, scheme='light'):
    contexts.append(browser.new_context(
      viewport={'width': width, 'height': 800}, color_scheme=scheme
    ))
    page = contexts[-1].new_page()
    page.on('pageerror', lambda error: errors.append(str(error)))
    page.on('console', lambda said: errors.append(said.text) if said.type == 'error' else None)
    page.goto(address)
    return page

  yield open_page
  for context in contexts:
    context.close()
  assert errors == []


@pytest.mark.parametrize(('name', 'width', 'scheme'), [
  ('report', 1280, 'light'), ('scores', 1280, 'light'),
  *((name, 390, 'dark') for name in ('report', 'compare', 'scores', 'sweep', 'search')),
])
def test_everyone_can_read_every_page(opened, pages, name, width, scheme):
  """By axe, of contrast, names and roles; and without scrolling sideways on a phone."""
  axe = pytest.importorskip('axe_playwright_python.sync_playwright').Axe()
  page = opened(pages[name].as_uri(), width, scheme)
  ground = page.evaluate('getComputedStyle(document.body).backgroundColor')
  assert (sum(map(int, ground[4:-1].split(','))) < 200) == (scheme == 'dark')
  page.evaluate('document.querySelectorAll("details").forEach((one) => { one.open = true; })')
  found = [(one['id'], one['nodes'][0]['html'][:200]) for one in
           axe.run(page).response['violations']]
  assert found == []
  assert page.evaluate('document.documentElement.scrollWidth') <= width
  assert page.locator('img:not([alt]), img[alt=""]').count() == 0
  assert page.locator('.charts figure:not(:has(figcaption))').count() == 0
  for chart in page.locator('.plot').all():
    assert len([text for text in chart.locator('.unit').all_inner_texts() if text.strip()]) == 2


def test_a_slider_turns_pictures_and_a_chart_says_its_values(opened, pages):
  page = opened(pages['report'].as_uri())
  shown = page.locator('.flip img.shown')
  assert shown.get_attribute('data-step') == '20' and shown.is_visible()
  # The pictures are on the first screen, and large.
  box = shown.bounding_box()
  assert box['y'] + box['height'] < 800 and box['width'] > 500
  slider = page.locator('.turn input')
  slider.focus()
  slider.press('ArrowLeft')
  assert shown.get_attribute('data-step') == '10' and shown.count() == 1
  assert page.locator('.turn output').inner_text() == 'step 10'
  assert slider.get_attribute('aria-valuetext') == 'step 10'
  frame = page.locator('#loss .frame')
  frame.hover(position={'x': 1, 'y': 20})
  assert page.locator('.tip').inner_text() == 'step 1\n2'
  frame.focus()
  frame.press('End')
  assert page.locator('.tip').inner_text() == 'step 20\n1.05'
  frame.press('ArrowLeft')
  assert frame.get_attribute('aria-valuetext').startswith('step 19, 1.053')
  page.locator('h1').hover()
  two = opened(pages['compare'].as_uri())
  two.locator('.turn input').press('Home')
  assert [one.get_attribute('data-step') for one in two.locator('img.shown').all()] == ['10', '10']
  swept = opened(pages['sweep'].as_uri())
  swept.locator('#sweep .frame').first.hover(position={'x': 2, 'y': 2})
  assert 'guidance 1' in swept.locator('.tip').inner_text()


def test_a_live_page_follows_its_run_and_stays_where_its_reader_is(
  opened, tmp_path, monkeypatch
):
  monkeypatch.setattr(serve, 'REST', 0)
  workdir = a_run(tmp_path / 'run')
  with make_server(workdir, 0) as server:
    thread = threading.Thread(target=server.serve_forever, kwargs={'poll_interval': 0.02})
    thread.start()
    try:
      page = opened(f'http://127.0.0.1:{server.server_port}/')
      page.get_by_text('Live: this page follows the run.').wait_for()
      page.locator('.turn input').press('Home')
      page.get_by_text('All settings').click()
      page.evaluate('window.same = true')
      add_lines(workdir, [21])
      add_grid(workdir, 21)
      status = json.loads((workdir / 'status.json').read_text())
      (workdir / 'status.json').write_text(json.dumps(status | {'step': 21, 'seconds': 11.0}))
      page.get_by_text('21 of 40').wait_for(timeout=15_000)
      page.locator('img[data-step="21"]').wait_for(state='attached', timeout=15_000)
      # Neither loaded anew, nor turned to another picture, nor closed.
      assert page.evaluate('window.same') and page.locator('progress').get_attribute('value')
      assert page.locator('.flip img.shown').get_attribute('data-step') == '10'
      assert page.locator('#config details').get_attribute('open') is not None
      assert page.locator('#loss .frame').get_attribute('aria-valuemax') == '20'
    finally:
      server.shutdown()
      thread.join()
