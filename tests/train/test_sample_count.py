"""Evaluations within a time budget: all of a run are of one number of samples."""

import json

import pytest

from diffusion_jax.io.run_directory import RunDirectory
from diffusion_jax.train.config import LoopConfig
from diffusion_jax.train.sample_count import SampleCount
from diffusion_jax.train.tasks.diffusion import DiffusionTask
from tests import tiny


def test_the_first_evaluation_chooses_and_later_starts_know(tmp_path):
  directory = RunDirectory(tmp_path)
  open_count = lambda **more: SampleCount(
    directory, LoopConfig(evaluate_samples=256, **{'evaluate_seconds': 30.0, **more})
  )
  count = open_count()
  assert (count.wanted, count.seconds) == (256, 27.0)
  assert 'allow 96 of 256 samples' in count.took(96)
  assert (count.wanted, count.seconds) == (96, 30.0)
  assert count.took(96) == ''
  said = count.took(64)
  assert 'had time for 64 samples only, in place of 96' in said and 'not compared' in said
  assert count.wanted == 96
  again = open_count()
  assert (again.wanted, again.seconds) == (96, 30.0) and again.took(96) == ''
  # Another budget or number is another choice.
  assert open_count(evaluate_seconds=60.0).wanted == 256
  (tmp_path / 'evaluation.json').write_text('{"samples": ')
  assert open_count().wanted == 256
  unlimited = open_count(evaluate_seconds=0.0)
  assert (unlimited.wanted, unlimited.seconds) == (256, 0.0)


def test_all_that_was_wanted_needs_no_word(tmp_path):
  count = SampleCount(RunDirectory(tmp_path), LoopConfig(evaluate_seconds=30.0))
  assert count.took(256) == '' and count.wanted == 256
  assert json.loads((tmp_path / 'evaluation.json').read_text())['samples'] == 256


@pytest.mark.slow
def test_a_run_scores_within_its_budget_and_keeps_the_best(
  command, parts, small_data, tmp_path, monkeypatch, capsys
):
  """A budget of no time: 16 samples in two batches."""
  monkeypatch.setattr(DiffusionTask, 'draw_batch', 8)
  values = tiny.diffusion_config(
    parts, {'evaluation': {'metrics': ['fd', 'clip_score']}}, optimizer={'learning_rate': 0.1},
    loop={'total_steps': 3, 'evaluate_every_steps': 1, 'checkpoint_every_steps': 1,
          'evaluate_samples': 20, 'evaluate_seconds': 1e-6, 'keep_checkpoints': 1,
          'keep_best': 'clip_score', 'keep_best_is': 'highest'},
  )
  config = tiny.write_config(tmp_path / 'recipe.py', values)
  arguments = ('train', '--config', config, '--workdir', tmp_path / 'run', '--quiet')
  assert command(*arguments) == 0
  assert capsys.readouterr().err.count('allow 16 of 20 samples') == 1
  scores = tiny.metrics(tmp_path / 'run', 'evaluation')
  assert sorted(scores) == [1, 2, 3]
  assert all(line['samples'] == 16 for line in scores.values())
  best = max(scores, key=lambda step: (scores[step]['clip_score'], step))
  folders = (tmp_path / 'run' / 'checkpoints').iterdir()
  assert {int(path.name) for path in folders if path.is_dir()} == {best, 3}
  final = json.loads((tmp_path / 'run' / 'scores.json').read_text())
  assert final['settings']['samples'] == 16
  assert set(final['generated']) == set(final['untrained']) == {'fd_clip', 'clip_score'}
