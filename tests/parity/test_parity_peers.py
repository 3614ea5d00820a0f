"""benchmarks/peers.py at its smallest: both sides compute the same, and figures come out."""

import json

import pytest

pytest.importorskip('torch')
pytest.importorskip('diffusers')
from benchmarks import peers
from benchmarks.table import peer_rows

SMALL = ['--model', 'tiny', '--batch', '2', '--images', '2', '--pairs', '2', '--steps', '4',
         '--peers', 'eager_channels_last']


@pytest.mark.slow
def test_both_sides_give_the_same_and_are_timed_in_pairs(tmp_path, capsys):
  out = tmp_path / 'peers.json'
  peers.main([*SMALL, '--json', str(out)])
  found = json.loads(out.read_text())
  words = {'step': 'training step', 'sample': 'DDIM'}
  for what in words:
    one = found[what]['eager_channels_last']
    assert one['output_difference'] < 1e-5 and one[f'{what}_difference'] < 1e-4
    low, high = one['ratio']['quartiles']
    assert 0 < low <= one['ratio']['median'] <= high and one['theirs_seconds']['median'] > 0
    assert found['compile_seconds'][what] > 0
    (row,) = [row for row in peer_rows(found) if words[what] in row[0]]
    assert row[3] == 'eager channels last' and f'{one["ratio"]["median"]:.2f}' in row[5]
  assert found['flops']['step'] > 0 and found['versions']['torch'] and found['device']['kind']
  assert capsys.readouterr().out.count('median ratio') == 2


def test_other_weights_end_the_program():
  """What is timed must be the same work."""
  comparison = peers.Comparison(peers.arguments([*SMALL, '--only', 'step']))
  name = 'conv_out.bias'
  comparison.weights[name] = comparison.weights[name] + 0.5
  with pytest.raises(SystemExit, match='outputs of the U-Net differ by'):
    comparison.run()


def test_steps_that_diffusers_rounds_otherwise_are_refused(capsys):
  with pytest.raises(SystemExit):
    peers.arguments(['--steps', '3'])
  assert 'does not divide 1000' in capsys.readouterr().err
