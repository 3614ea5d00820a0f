"""evaluate: what a model draws, over a sweep, for each checkpoint, by several processes."""

import csv
import json
import os
import shutil
import time

import numpy as np
import pytest
from PIL import Image

from diffusion_jax.cli.follow import followed, over
from diffusion_jax.pipelines.model import Diffusion
from diffusion_jax.run import TrainedRun
from tests import tiny


def _rows(out):
  with out.with_suffix('.csv').open() as file:
    return list(csv.DictReader(file))


@pytest.fixture(scope='module')
def drawn(command, finished, tmp_path_factory):
  """(scores, folder) of a run on seven captions of one's own, its pictures kept."""
  folder = tmp_path_factory.mktemp('drawn')
  names = ('red apple', 'cat face', 'sun', 'blue book', 'green heart', 'dog', 'moon')
  (folder / 'captions.txt').write_text('\n'.join(names) + '\n\n')
  out = folder / 'scores.json'
  arguments = ('--captions', folder / 'captions.txt', '--keep', 'png', '--batch', 2)
  metrics = ('--metrics', 'fd,clip_score,retrieval')
  assert command(
    'evaluate', 'model', '--workdir', finished, *arguments, *metrics, '--out', out
  ) == 0
  return json.loads(out.read_text()), folder


def test_captions_that_are_too_long_are_counted(command, finished, tmp_path, capsys):
  captions = tmp_path / 'captions.txt'
  captions.write_text(''.join(f'sun {number} {"and a cat " * 30}\nsun\n' for number in range(7)))
  arguments = ('--captions', captions, '--reference', tmp_path / 'nowhere')
  out = tmp_path / 'x.json'
  assert command('evaluate', 'model', '--workdir', finished, *arguments, '--out', out) == 2
  said = capsys.readouterr().out
  assert said.count('note: ') == 1
  assert "note: 7 texts so far, such as 'sun 0 and a cat" in said
  assert f'longer than the {tiny.LENGTH - 2} tokens that the model reads' in said


def test_a_model_draws_captions_of_one_s_own(drawn, command, finished, tmp_path):
  scores, folder = drawn
  assert set(scores) == {'generated', 'untrained', 'intervals', 'measured', 'warnings', 'settings'}
  assert scores['settings']['samples'] == 7 and 'at step 4' in scores['settings']['model']
  kept = sorted((folder / 'scores.images').iterdir())
  assert [path.name for path in kept] == [f'{i:06d}.png' for i in range(7)]
  # The pictures that `sample` draws of the same seed, number and prompt.
  prompts = [x for line in (folder / 'captions.txt').read_text().split('\n') if line
             for x in ('--prompt', line)]
  assert command('sample', '--workdir', finished, *prompts, '--out', tmp_path, '--batch', 2) == 0
  for i, path in enumerate(kept):
    (drawn_alone,) = tmp_path.glob(f'{i:04d}_*.png')
    found, wanted = (np.asarray(Image.open(p)).astype(int) for p in (path, drawn_alone))
    assert np.abs(found - wanted).max() <= 1
  html = (folder / 'scores.html').read_text()
  assert 'Best prompts' in html and 'green heart' in html and 'Nearest in the reference' in html


def test_what_is_drawn_is_not_drawn_again(drawn, command, finished, tmp_path, monkeypatch):
  from diffusion_jax.pipelines.model import Diffusion

  scores, folder = drawn
  run = shutil.copytree(folder, tmp_path / 'again')
  monkeypatch.setattr(Diffusion, 'sample', lambda *_, **__: 1 / 0)
  arguments = ('--captions', run / 'captions.txt', '--metrics', 'fd,clip_score,retrieval')
  out = run / 'scores.json'
  assert command('evaluate', 'model', '--workdir', finished, *arguments, '--out', out) == 0
  again = json.loads(out.read_text())
  for column in ('generated', 'untrained'):
    assert again[column] == pytest.approx(scores[column], rel=1e-6)


def test_pictures_that_were_not_kept_are_made_once_more(drawn, command, finished, tmp_path):
  scores, folder = drawn
  run = shutil.copytree(folder, tmp_path / 'again')
  shutil.rmtree(run / 'scores.images')
  out, kept = run / 'scores.json', lambda: sorted(path.name for path in run.glob('*.images/*'))
  arguments = (
    'evaluate', 'model', '--workdir', finished, '--captions', run / 'captions.txt', '--out', out
  )
  metrics = ('--metrics', 'fd,clip_score,retrieval')
  assert command(*arguments, *metrics) == 0 and kept() == []
  assert command(*arguments, *metrics, '--keep', 'tar') == 0 and kept() == ['000000-000006.tar']
  assert json.loads(out.read_text())['generated'] == pytest.approx(scores['generated'], rel=1e-4)


def test_one_picture_has_figures_without_intervals(drawn, command, finished, tmp_path):
  out = tmp_path / 'one.json'
  arguments = ('--captions', drawn[1] / 'captions.txt', '--samples', 1, '--metrics', 'clip_score')
  assert command('evaluate', 'model', '--workdir', finished, *arguments, '--out', out) == 0
  scores = json.loads(out.read_text())
  assert scores['settings']['samples'] == 1 and scores['intervals'] == {}
  assert 'samples over the reference' in out.with_suffix('.html').read_text()


@pytest.fixture
def captions(drawn):
  return '--captions', drawn[1] / 'captions.txt', '--batch', 2


def test_a_sweep_has_a_column_for_each_combination(
  drawn, captions, command, finished, tmp_path, monkeypatch
):
  out, read = tmp_path / 'sweep.json', []
  weights = TrainedRun.weights
  monkeypatch.setattr(TrainedRun, 'weights', lambda *a: read.append(a[1:]) or weights(*a))
  swept = ('sweep', 'guidance=1,2', 'steps=2,3', '--keep', 'png')
  metrics = ('--metrics', 'fd,clip_score')
  assert command('evaluate', *swept, '--workdir', finished, *captions, *metrics, '--out', out) == 0
  scores = json.loads(out.read_text())
  names = [f'guidance={g} steps={n}' for g in (1, 2) for n in (2, 3)]
  assert list(scores['sweep']) == names and set(names) < set(scores)
  assert [scores['sweep'][name]['network_calls'] for name in names] == [2, 3, 4, 6]
  # The run's own settings are among them.
  own = scores['guidance=2 steps=2']
  assert own['fd_clip'] == pytest.approx(drawn[0]['generated']['fd_clip'], rel=1e-4)
  assert own['clip_score'] == pytest.approx(drawn[0]['generated']['clip_score'], rel=1e-4)
  assert len({scores[name]['fd_clip'] for name in names}) == 4
  assert read == [(4, None)]  # Once for all, though four columns want them.
  assert scores['settings']['best'] == min(names, key=lambda name: scores[name]['fd_clip'])
  rows = _rows(out)
  assert [(row['settings.guidance'], row['settings.steps']) for row in rows] == [
    ('1.0', '2'), ('1.0', '3'), ('2.0', '2'), ('2.0', '3')
  ]
  assert float(rows[2]['generated.fd_clip']) == own['fd_clip']
  html = out.with_suffix('.html').read_text()
  assert 'fd_clip against CLIP score' in html and 'fd_clip against network calls' in html
  kept = tmp_path / 'sweep.images' / 'generated guidance=2 steps=2'
  assert [path.name for path in sorted(kept.iterdir())] == [f'{i:06d}.png' for i in range(7)]
  found, wanted = (
    np.asarray(Image.open(folder / '000003.png')).astype(int)
    for folder in (kept, drawn[1] / 'scores.images')
  )
  assert np.abs(found - wanted).max() <= 1


def test_averages_of_other_lengths(finished, small_data):
  """They are sums of what the checkpoints hold, and say how far off they are."""
  with tiny.few_devices():
    run = TrainedRun(str(finished))
  own = run.config.loop.ema_halflife_images
  newest, averaged, plain = run.params(), run.params(4, own), run.params(4, 0)
  name = 'unet.conv_in.kernel' if 'unet.conv_in.kernel' in newest else next(iter(newest))
  np.testing.assert_array_equal(newest[name], averaged[name])
  assert np.abs(np.asarray(newest[name]) - np.asarray(plain[name])).max() > 0
  stored, combined = run.averages(4, 3.0)
  assert [tuple(s) for s in stored] == [(2, 0.0), (2, own), (4, 0.0), (4, own)]
  found = run.params(4, 3.0)
  wanted = sum(
    f * np.asarray(run.params(*snapshot)[name], np.float64)
    for f, snapshot in zip(combined.factors, stored, strict=True)
  )
  np.testing.assert_allclose(found[name], wanted, rtol=1e-4, atol=1e-6)
  assert combined.error < 0.01


@pytest.mark.parametrize('samples', [0, -1, 8])
def test_captions_that_are_not_there_are_not_drawn(drawn, fails, finished, tmp_path, samples):
  arguments = ('--captions', drawn[1] / 'captions.txt', '--samples', samples)
  out = tmp_path / 'out.json'
  message = fails('evaluate', 'model', '--workdir', finished, *arguments, '--out', out)
  assert 'has 7 captions; choose 1 to 7' in message and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(('arguments', 'named'), [
  (['model', '--follow'], '--follow needs the run that it follows'),
  (['sweep', 'steps=2,3', '--steps', '3'], '--steps does nothing beside a sweep of steps'),
  (['sweep', 'seed=2'], 'with a NAME of guidance'),
  (['likelihood', '--follow'], 'there is no option --follow'),
  (['model', '--ema_halflife_images', '9'], '--ema_halflife_images needs --workdir'),
  (['model', '--workdir', 'RUN', '--ema_halflife_images', '-1'], 'give a number of images'),
  (['sweep', 'sampler=ddim,euler9', '--workdir', 'RUN', '--samples', '16'], 'euler9'),
  (['model', '--workdir', 'RUN/none', '--follow'], 'config.json'),
])
def test_what_cannot_be_swept_or_followed(fails, finished, tmp_path, arguments, named):
  given = [text.replace('RUN', str(finished)) for text in arguments]
  assert named in fails('evaluate', *given, '--out', tmp_path / 'out.json')
  assert list(tmp_path.iterdir()) == []


def test_follow_scores_each_checkpoint_once(
  drawn, captions, command, fails, finished, tmp_path, monkeypatch
):
  out = tmp_path / 'followed.json'
  arguments = ('evaluate', 'model', '--workdir', finished, '--follow', *captions, '--out', out)
  assert command(*arguments, '--metrics', 'fd,clip_score') == 0
  scores = json.loads(out.read_text())
  assert [line['step'] for line in scores['history']] == [2, 4]
  last = scores['history'][1]
  assert last['fd_clip'] == pytest.approx(drawn[0]['generated']['fd_clip'], rel=1e-4)
  assert last['fd_clip'] == scores['generated']['fd_clip'] != scores['history'][0]['fd_clip']
  assert [row['settings.step'] for row in _rows(out)] == ['2', '4']
  assert 'fd_clip of each checkpoint' in out.with_suffix('.html').read_text()
  left = {path.name for path in (tmp_path / 'followed.parts').iterdir()}
  assert left == {'reference', 'untrained'}
  monkeypatch.setattr(Diffusion, 'sample', lambda *_, **__: 1 / 0)
  assert command(*arguments, '--metrics', 'fd,clip_score') == 0
  assert json.loads(out.read_text()) == scores and len(_rows(out)) == 2
  assert 'is of another evaluation (metrics was' in fails(*arguments, '--metrics', 'fd')
  other = ('--metrics', 'fd,clip_score', '--ema_halflife_images', 0)
  assert 'another evaluation (ema_halflife_images was None, now 0.0)' in fails(*arguments, *other)


def test_checkpoints_of_one_history_are_of_one_run_and_its_captions():
  def known(run, *captions):
    return followed(run, None, captions)

  found = known('runs/a', 'cat', 'dog')
  assert found == known('./runs/a', 'cat', 'dog') and found['captions'] == 2
  assert found != known('runs/b', 'cat', 'dog') and found != known('runs/a', 'cat', 'cow')


@pytest.mark.parametrize('status', [None, '{', '{}'])
def test_a_run_without_a_word_is_over_once_it_has_long_written_nothing(tmp_path, status):
  (tmp_path / 'checkpoints').mkdir()
  if status is not None:
    (tmp_path / 'status.json').write_text(status)
  assert not over(str(tmp_path))
  for path in (tmp_path / 'checkpoints', tmp_path):
    os.utime(path, (1e9, 1e9))
  assert over(str(tmp_path))


def test_weights_of_one_name_are_told_apart(finished, copy_of, small_data):
  """Steps, averages, and what another run under the same path has saved."""
  folder = copy_of(finished)
  with tiny.few_devices():
    run = TrainedRun(str(folder))
  prints = lambda: [run.fingerprint(*given) for given in ((4,), (4, 0), (2,), (4, 3.0))]
  before, settings = prints(), run.settings_fingerprint
  assert before[0] == before[1] and len({*before}) == 3
  manifest = folder / 'checkpoints' / '2' / 'manifest.json'
  manifest.write_text('0' + manifest.read_text())
  assert [a != b for a, b in zip(before, prints(), strict=True)] == [False, False, True, True]
  values = json.loads((folder / 'config.json').read_text())
  values['loop']['total_steps'] += 1
  (folder / 'config.json').write_text(json.dumps(values))
  assert run.settings_fingerprint == settings
  values['settings']['denoiser']['block_out_channels'] = [16]
  (folder / 'config.json').write_text(json.dumps(values))
  assert run.settings_fingerprint != settings


@pytest.mark.slow
def test_follow_beside_a_run_that_goes_on(parts, captions, command, small_data, tmp_path):
  """Checkpoints that training has deleted meanwhile are passed over; the last one is scored."""
  values = tiny.diffusion_config(
    parts, loop={'total_steps': 12, 'keep_checkpoints': 1, 'evaluate_samples': 0}
  )
  config, run = tiny.write_config(tmp_path / 'recipe.py', values), tmp_path / 'run'
  training = tiny.start(
    ['train', '--config', config, '--workdir', str(run), '--quiet'],
    tiny.environment(small_data, 1),
  )
  try:
    while not (run / 'config.json').is_file() and training.poll() is None:
      time.sleep(0.2)
    out = tmp_path / 'followed.json'
    given = ('--workdir', run, '--follow', *captions, '--metrics', 'fd', '--out', out)
    assert command('evaluate', 'model', *given) == 0
    assert training.wait(timeout=60) == 0
  finally:
    training.kill()
    training.communicate()
  steps = [line['step'] for line in json.loads(out.read_text())['history']]
  assert steps[-1] == 12 and steps == sorted(set(steps)) and set(steps) <= set(range(2, 13, 2))


@pytest.mark.slow
def test_two_processes_killed_and_started_again(command, finished, small_data, tmp_path):
  """No picture is missing or drawn twice: the figures are those of one process left alone."""
  captions = tmp_path / 'captions.txt'
  captions.write_text('\n'.join(f'a picture of {i}' for i in range(130)))
  arguments = (
    'evaluate', 'sweep', 'ema_halflife_images=20,0', '--workdir', finished, '--captions', captions,
    '--metrics', 'fd,clip_score',
  )
  alone, out = tmp_path / 'alone.json', tmp_path / 'killed.json'
  pieces = tmp_path / 'killed.parts' / 'generated ema_halflife_images=0'
  processes = tiny.beside_each_other(2, small_data, (*arguments, '--out', out))
  deadline = time.monotonic() + 300
  while not list(pieces.glob('0*.npz')) and time.monotonic() < deadline:
    time.sleep(0.01)
  for process in processes:
    process.kill()
  said = [process.communicate(timeout=60) for process in processes]
  done = {path: path.stat().st_mtime_ns for path in pieces.glob('0*.npz')}
  assert done and not out.exists(), said
  tiny.together(2, small_data, (*arguments, '--out', out))
  assert all(path.stat().st_mtime_ns == when for path, when in done.items())
  names = ['000000.npz', '000001.npz', '000002.npz', 'plan.json']
  assert sorted(path.name for path in pieces.iterdir()) == names
  assert command(*arguments, '--out', alone) == 0
  found, wanted = (json.loads(path.read_text()) for path in (out, alone))
  own, plain = found['sweep']
  for column in (own, plain):
    assert found[column] == pytest.approx(wanted[column], rel=1e-3)
  assert found[own]['fd_clip'] != found[plain]['fd_clip']
