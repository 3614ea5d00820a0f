"""The benchmark that compares how soon runs have learned."""

import json

import pytest

from benchmarks import time_to_loss
from benchmarks.table import loss_rows

LOSSES = [9.0, 4.0, 6.0, 2.0, 1.0, 1.0]


def _run(folder, seconds_a_step):
  folder.mkdir()
  lines = [{'kind': 'train', 'step': 10 * i, 'time': 5 + 10 * i * seconds_a_step, 'loss': loss}
           for i, loss in enumerate(LOSSES, 1)]
  lines.insert(2, {'kind': 'evaluation', 'step': 20, 'fd': 1.0})
  (folder / 'metrics.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))
  platform = {'platform': 'cpu', 'device': 'cpu', 'devices': 1}
  for name, values in {
    'status': {'goodput': {'compile': 3.0}}, 'config': {}, 'versions': platform,
  }.items():
    (folder / f'{name}.json').write_text(json.dumps(values))
  return folder


def test_times_at_which_losses_were_reached(tmp_path):
  slow, quick = _run(tmp_path / 'slow', 0.2), _run(tmp_path / 'quick', 0.1)
  out = tmp_path / 'out.json'
  time_to_loss.main([
    f'slow={slow}', f'quick={quick}', '--lines', '2', '--losses', '5', '1.5', '0.5', '--json',
    str(out),
  ])
  found = json.loads(out.read_text())
  # Means of two: 6.5, 5, 4, 1.5, 1.
  assert found['runs']['slow']['losses'] == {
    '5.0': {'step': 30, 'seconds': 11.0}, '1.5': {'step': 50, 'seconds': 15.0}, '0.5': None,
  }
  assert found['runs']['quick']['losses']['1.5'] == {'step': 50, 'seconds': 10.0}
  (_, _, *first), (_, _, *second) = loss_rows(found)
  assert first == ['11 s', '15 s', 'never', '3 s'] and second == ['8 s', '10 s', 'never', '3 s']


def test_a_folder_without_a_run_is_named(tmp_path):
  with pytest.raises(SystemExit, match=r'no run directory .*nowhere'):
    time_to_loss.main([f'a={tmp_path / "nowhere"}'])
