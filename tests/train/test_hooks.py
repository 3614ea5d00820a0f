"""Evaluations within a time budget: all of a run are of one number of samples."""

import dataclasses
import json
import sys
import time
import types

from diffusion_jax.config import LoopConfig
from diffusion_jax.data.splits import APART
from diffusion_jax.evaluation.evaluator import EVALUATE
from diffusion_jax.evaluation.generated import Budget
from diffusion_jax.runs.directory import RunDirectory
from diffusion_jax.runs.metrics import MetricsWriter
from diffusion_jax.train.health import BestEffort
from diffusion_jax.train.hooks import Hooks, SampleCount
from tests import tiny


def test_the_first_evaluation_chooses_and_later_starts_know(tmp_path):
  directory = RunDirectory(tmp_path)
  open_count = lambda **more: SampleCount(
    directory, LoopConfig(evaluate_samples=256, **{'evaluate_seconds': 30.0, **more}),
    directory.write_json,
  )
  count = open_count()
  assert (count.wanted, count.seconds) == (256, 27.0)
  assert 'allow 96 of 256 samples' in count.record(96)
  assert (count.wanted, count.seconds) == (96, 30.0)
  assert count.record(96) == ''
  said = count.record(64)
  assert 'had time for 64 samples only, in place of 96' in said and 'not compared' in said
  assert count.wanted == 96
  again = open_count()
  assert (again.wanted, again.seconds) == (96, 30.0) and again.record(96) == ''
  # Another budget or number is another choice.
  assert open_count(evaluate_seconds=60.0).wanted == 256
  (tmp_path / 'evaluation.json').write_text('{"samples": ')
  assert open_count().wanted == 256
  unlimited = open_count(evaluate_seconds=0.0)
  assert (unlimited.wanted, unlimited.seconds) == (256, 0.0)


def test_all_that_was_wanted_needs_no_word(tmp_path):
  directory = RunDirectory(tmp_path)
  count = SampleCount(directory, LoopConfig(evaluate_seconds=30.0), directory.write_json)
  assert count.record(256) == '' and count.wanted == 256
  assert json.loads((tmp_path / 'evaluation.json').read_text())['samples'] == 256


@dataclasses.dataclass
class Slow:
  """An evaluator whose samples take a while: batches of 8."""

  samples: int = 0
  seconds: float = 0.0
  when = EVALUATE

  def run(self, model, params, key):
    budget, drawn = Budget(self.seconds), 0
    while drawn < self.samples:
      time.sleep(0.01)
      drawn += 8
      if budget.over():
        break
    yield 'generated.fid', 100.0 - drawn
    yield 'settings', {'samples': drawn}


def test_scores_of_fewer_samples_than_before_are_not_compared(tmp_path, capsys):
  loop = LoopConfig(evaluate_samples=64, evaluate_seconds=1e-6)
  training = types.SimpleNamespace(
    directory=RunDirectory(tmp_path), loop=loop, evaluators=[Slow()], mesh=None,
    task=types.SimpleNamespace(model=None, weights=lambda params, frozen: params),
    measured=APART, provenance=(),
  )
  state = types.SimpleNamespace(eval_params={})
  writer = MetricsWriter(training.directory, True)
  say = lambda text: print(text, file=sys.stderr)
  hooks = Hooks(training, writer, {}, BestEffort(say))
  scores, figures = hooks.evaluate(state, 10)
  assert figures == {'fid': 84.0, 'samples': 16} and 'samples' not in scores['generated']
  assert 'allow 16 of 64 samples' in capsys.readouterr().err
  assert hooks.evaluate(state, 20)[1] == figures
  # A run that has chosen more, on a machine that was faster.
  (tmp_path / 'evaluation.json').write_text('{"samples": 48, "of": 64, "seconds": 1e-06}')
  slower = Hooks(training, writer, {}, BestEffort(say))
  assert slower.evaluate(state, 30)[1] == {}
  assert 'had time for 16 samples only, in place of 48' in capsys.readouterr().err
  writer.close()
  lines = tiny.metrics(tmp_path, 'evaluation')
  assert {step: line['samples'] for step, line in lines.items()} == {10: 16, 20: 16, 30: 16}


def test_a_run_with_a_budget(finished):
  """Time for all: two evaluations on the way and the last one are of as many samples."""
  lines = tiny.metrics(finished, 'evaluation')
  assert {step: line['samples'] for step, line in lines.items()} == {2: 16, 4: 16}
  assert json.loads((finished / 'evaluation.json').read_text()) == {
    'samples': 16, 'of': 16, 'seconds': 600.0
  }
  kept = json.loads((finished / 'checkpoints' / 'scores.json').read_text())
  assert kept['4']['samples'] == 16 and kept['4']['clip_score'] == lines[4]['clip_score']
