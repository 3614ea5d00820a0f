"""Reading of metrics.jsonl: all of it while it is short, in bounded memory however long it is."""

import itertools
import json
import subprocess
import sys

import numpy as np
import pytest

from diffusion_jax.viz import run_files
from diffusion_jax.viz.report import write_report
from diffusion_jax.viz.run_files import MetricsFile, read_lines, read_run
from tests.tiny import ROOT


def write(path, lines, mode='w'):
  with path.open(mode) as file:
    file.writelines(json.dumps(line) + '\n' for line in lines)
  return path


def train(step, **values):
  return {'kind': 'train', 'step': step, 'time': float(step), **values}


def read(path):
  file = MetricsFile(path)
  file.update()
  return file


@pytest.fixture
def long(tmp_path):
  """(path, losses) of 9,000 lines, ten steps apart, with one spike and one value missing."""
  losses = np.random.default_rng(0).normal(1, 0.1, 9000)
  losses[4321] = 1e6
  lines = [train(10 * i, loss=float(loss), by=[1.0, None]) for i, loss in enumerate(losses)]
  lines[1234]['loss'] = None
  return write(tmp_path / 'metrics.jsonl', lines), losses


def test_short_runs_are_kept_as_they_are(tmp_path):
  lines = [train(7 * i, loss=i / 3, note='x') for i in range(2000)]
  metrics = read(write(tmp_path / 'm', lines)).train
  assert metrics.lines == lines
  curve = metrics.curve('loss')
  assert curve.points == curve.means == [(7 * i, i / 3) for i in range(2000)]
  assert (curve.missing, curve.first, curve.last) == (0, 0.0, 1999 / 3)


def test_long_runs_keep_the_mean_and_the_extremes_of_each_stretch(long):
  path, losses = long
  metrics = read(path).train
  curve = metrics.curve('loss')
  # 90,000 steps: widths double until 2,000 stretches are enough, so to 64.
  stretch = 10 * np.arange(9000) // 64
  kept = np.arange(9000) != 1234
  groups = [losses[(stretch == s) & kept] for s in range(stretch[-1] + 1)]
  np.testing.assert_allclose([v for _, v in curve.means], [g.mean() for g in groups], rtol=1e-12)
  wanted = {v for g in groups for v in (g.min(), g.max())}
  assert {v for _, v in curve.points} == wanted | {None}
  assert (43210, 1e6) in curve.points and (12340, None) in curve.points
  assert [step for step, _ in curve.points] == sorted(step for step, _ in curve.points)
  assert (curve.missing, curve.first, curve.last) == (1, losses[0], losses[-1])
  assert len(metrics.lines) == len(groups) and metrics.lines[-1]['by'] == [1.0, None]
  assert len(list(read_lines(path))) == 9000


def test_reading_on_gives_what_reading_at_once_gives(long, tmp_path):
  path, _ = long
  text, growing = path.read_bytes(), tmp_path / 'growing'
  file = MetricsFile(growing)
  rng = np.random.default_rng(1)
  cuts = [0, *sorted(rng.integers(0, len(text), 60).tolist()), len(text)]
  growing.touch()
  for start, end in itertools.pairwise(cuts):
    with growing.open('ab') as out:  # Most pieces end within a line.
      out.write(text[start:end])
    file.update()
  once = read(path)
  assert file.unreadable == once.unreadable == 0
  assert file.train.lines == once.train.lines
  assert file.train.curve('loss') == once.train.curve('loss')
  assert file.latest == once.latest


def test_a_report_after_a_report_reads_only_what_is_new(tmp_path):
  path = write(tmp_path / 'metrics.jsonl', [train(i, loss=1.0) for i in range(1, 100)])
  file = MetricsFile(path)
  write_report(tmp_path, file)
  size = path.stat().st_size
  with path.open('r+b') as out:
    out.write(b'#' * (size - 1))  # Nobody reads this again.
  write(path, [train(100, loss=2.0)], 'a')
  page = write_report(tmp_path, file).read_text()
  assert '<dt>Step</dt><dd>100</dd>' in page and 'could not be read' not in page
  assert len(file.train.lines) == 100
  path.unlink()  # Another run's file in its place.
  write(path, [train(5, loss=3.0)])
  write_report(tmp_path, file)
  assert [line['step'] for line in file.train.lines] == [5]


def test_a_resume_drops_what_follows_in_long_runs_and_replaces_steps_in_short_ones(tmp_path):
  lines = [train(i, loss=1.0) for i in range(100_000)]
  lines += [train(i, loss=2.0) for i in range(50_000, 60_000)]
  found = read(write(tmp_path / 'm', lines)).train.lines
  assert found[-1]['step'] < 60_000 and found[-1]['loss'] == 2.0
  assert {line['loss'] for line in found if line['step'] < 49_900} == {1.0}


@pytest.mark.parametrize('text', [
  b'{"kind": "train", "step": -1}', b'{"kind": "train", "step": 1e300}', b'[' * 10**5,
  b'{"kind": "train", "step": NaN}', b'{"kind": "train", "step": Infinity}', b'\xff\xfe',
  b'{"kind": "train", "step": 1.5}', b'{"kind": "train", "step": true}', b'{"step": 1}', b'null',
  b'{"kind": "train", "step": ' + b'9' * 5000 + b'}', b'{"kind": ["train"], "step": 1}',
  b'{"kind": "train", "step": 1, "x": "' + b'y' * 10**6 + b'"}',
], ids=range(13))
def test_damaged_lines_are_counted_and_the_rest_is_read(tmp_path, text):
  path = write(tmp_path / 'metrics.jsonl', [train(1, loss=1.0)])
  path.write_bytes(path.read_bytes() + text + b'\n' + path.read_bytes().replace(b'1', b'2'))
  metrics = read_run(tmp_path).metrics
  assert [line['step'] for line in metrics.train.lines] == [1, 2] and metrics.unreadable == 1
  assert '1 line of metrics.jsonl could not be read' in write_report(tmp_path).read_text()


def test_values_that_cannot_be_drawn_do_no_harm(tmp_path):
  huge = int('9' * 4000)
  lines = [train(i, loss=[1.0, huge, -huge, 1e300, True, None, 'x', {'a': []}][i % 8])
           for i in range(16_000)]
  write(tmp_path / 'metrics.jsonl', lines)
  curve = read_run(tmp_path).metrics.train.curve('loss')
  assert {v for _, v in curve.means} == {1.0} and curve.missing == 5 * 2000
  assert 'values missing or not finite' in write_report(tmp_path).read_text()


def test_names_are_bounded_and_that_is_said(tmp_path, monkeypatch):
  monkeypatch.setattr(run_files, 'MOST_METRICS', 6)
  write(tmp_path / 'metrics.jsonl', [train(i, **{f'm{i}': 1.0, 'k' * 300: 1.0}) for i in range(9)])
  run = read_run(tmp_path)
  assert run.metrics.train.names == ['m0', 'm1', 'm2']
  assert 'Of the metrics only the first' in write_report(tmp_path).read_text()


def test_memory_does_not_grow_with_the_file(tmp_path):
  path = tmp_path / 'metrics.jsonl'
  values = {f'metric_{i}': i / 7 for i in range(20)} | {'by': [0.5] * 10}
  with path.open('w') as file:  # 60 MB, and what a stranger might add to 10 MB more.
    for i in range(90_000):
      file.write(json.dumps(train(i, **values)) + '\n')
    for i in range(100):
      file.write(json.dumps(train(90_000 + i, **{'x': [0] * 30_000})) + '\n')
  program = (
    'import sys, resource, pathlib; from diffusion_jax.viz.run_files import MetricsFile\n'
    'peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n'
    'before = peak(); file = MetricsFile(pathlib.Path(sys.argv[1])); file.update()\n'
    'print(len(file.train.lines), (peak() - before) // 1024)'
  )
  done = subprocess.run([sys.executable, '-c', program, str(path)], cwd=ROOT, text=True,
                        capture_output=True, timeout=120, check=True)
  lines, megabytes = map(int, done.stdout.split())
  assert 1000 < lines <= 2000 and megabytes < 60
