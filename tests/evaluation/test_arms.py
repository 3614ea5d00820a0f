"""Paired comparisons: planted differences recovered, coverage of intervals, what is refused."""

import json

import numpy as np
import pytest
from scipy import signal

from diffusion_jax.__main__ import main
from diffusion_jax.cli.compare import arms_of
from diffusion_jax.errors import UserError
from diffusion_jax.evaluation.paired import over_seeds, over_steps

STEPS = np.arange(10, 1010, 10)
CLIP = 'clip/a/bicubic'


def _run(workdir, seed, shift=0.0, rate=0.1, features=CLIP, data=None, **config):
  """A run whose loss and score are the seed's own noise, common to all arms, plus a shift."""
  workdir.mkdir(parents=True)
  write = lambda name, value: (workdir / f'{name}.json').write_text(json.dumps(value))
  write('config', {'task': 'diffusion', 'data': {'dataset': 'openmoji', 'size': 64},
                   'optimizer': {'learning_rate': rate}, 'loop': {'seed': seed}, **config})
  write('data', {'training': {'pictures': 'p', 'captions': 'c'}, **(data or {})})
  write('scores', {'generated': {'fd_clip': 1.0},
                   'settings': {'samples': 64, 'features': features}})
  common, own = np.random.default_rng(seed), np.random.default_rng([seed, round(rate * 1000)])
  loss = 100 / STEPS + common.normal(0, 5, len(STEPS)) + own.normal(0, 0.01, len(STEPS)) + shift
  lines = [{'kind': 'train', 'step': int(s), 'time': 2.0 * s, 'loss': float(v)}
           for s, v in zip(STEPS, loss, strict=True)]
  for step in (500, 1000):
    score = 200 / step + common.normal(0, 3) + own.normal(0, 0.01) + shift
    lines.append({'kind': 'evaluation', 'step': step, 'fd_clip': score, 'samples': 64})
  (workdir / 'metrics.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))
  return str(workdir)


def test_planted_differences_are_recovered_through_noise_that_runs_share(tmp_path, capsys):
  """The noise of a step is 25 times the difference; that of a seed's score 15 times."""
  runs = [_run(tmp_path / f'{arm}{seed}', seed, shift, rate)
          for arm, shift, rate in (('a', 0.0, 0.1), ('b', 0.2, 0.2)) for seed in (0, 1, 2)]
  assert main(['compare', *runs, '--workdir', str(tmp_path)]) == 0
  found = json.loads((tmp_path / 'comparison.json').read_text())
  assert list(found['arms']) == ['optimizer.learning_rate=0.1', 'optimizer.learning_rate=0.2']
  assert found['seeds'] == [0, 1, 2] and not found['notes']
  by = {(one['metric'], one['interval']['method'].split()[-1]): one['interval']
        for one in found['differences']}
  for key in (('loss', 'seeds'), ('loss', 'steps'), ('fd_clip', 'seeds')):
    low, high = by[key]['low'], by[key]['high']
    assert low < 0.2 < high and 0.1 < low and high < 0.3, key
  assert {one['step'] for one in found['curves'] if one['metric'] == 'fd_clip'} == {500, 1000}
  assert 'Fréchet distance, CLIP features ↓, step 1,000' in capsys.readouterr().out
  page = (tmp_path / 'comparison.html').read_text()
  assert page.count('data-plot') >= 3 and 'paired t over seeds' in page


def test_the_time_to_a_value_is_a_ratio_of_steps(tmp_path):
  """An evaluation reaches it at once or late; a loss when the mean of five lines does."""
  runs = []
  for arm, rate, steps in (('a', 0.1, (400, 600)), ('b', 0.2, (200, 300))):
    for seed, reached in enumerate(steps):
      runs.append(_run(tmp_path / f'{arm}{seed}', seed, rate=rate))
      lines = [{'kind': 'train', 'step': s, 'time': 2.0 * s, 'loss': 1.0 + (s < reached)}
               for s in range(100, 1100, 100)]
      lines += [{'kind': 'evaluation', 'step': s, 'fd_clip': 1.0 if s < reached else 0.2}
                for s in range(100, 1100, 100)]
      (tmp_path / f'{arm}{seed}' / 'metrics.jsonl').write_text(
        '\n'.join(map(json.dumps, lines)) + '\n'
      )
  until = ['--until', 'fd_clip=0.3', '--until', 'loss=1', '--until', 'fd_clip=0.1']
  assert main(['compare', *runs, *until]) == 0
  first, second, _, slow, never, none = json.loads(
    (tmp_path / 'a0' / 'comparison.json').read_text()
  )['reached']
  assert first['steps'] == {'0': 400, '1': 600} and first['seconds']['1'] == 1200
  assert second['ratio']['estimate'] == pytest.approx(0.5) and slow['steps'] == {'0': 600, '1': 700}
  assert never['steps'] == {'0': None, '1': None} and none['ratio'] is None
  page = (tmp_path / 'a0' / 'comparison.html').read_text()
  assert 'never, never' in page and '400, 600' in page


def test_intervals_hold_the_truth_as_often_as_they_say():
  rng, tries = np.random.default_rng(0), 1500
  holds = lambda interval: interval.low < 0.3 < interval.high
  seeds = [holds(over_seeds(rng.normal(0.3, 1, 3))) for _ in range(tries)]
  # Neighbours are correlated, as losses of a run are.
  noise = signal.lfilter([1], [1, -0.6], rng.normal(0, 1, (tries, 220)))[:, 20:] + 0.3
  steps = [holds(over_steps(series)) for series in noise]
  assert 0.935 < np.mean(seeds) < 0.965 and 0.92 < np.mean(steps) < 0.965
  assert np.mean([holds(over_seeds(series)) for series in noise]) < 0.75  # As if they were not.
  assert np.isnan(over_seeds([1.0]).low) and np.isnan(over_steps([1.0] * 19).low)


@pytest.mark.parametrize(('other', 'why'), [
  ({'data': {'training': {'pictures': 'p', 'captions': 'other'}}}, 'captions of the training'),
  ({'features': 'clip/b/bicubic'}, 'the features were others'),
  ({'rate': 0.1}, 'runs of one config and one seed, 0'),
])
def test_runs_that_cannot_be_compared_are_refused(tmp_path, other, why, capsys):
  first = _run(tmp_path / 'a', 0)
  second = _run(tmp_path / 'b', 0, **{'rate': 0.2, **other})
  assert main(['compare', first, second]) == 2
  assert why in capsys.readouterr().err and not (tmp_path / 'a' / 'comparison.json').exists()


def test_seeds_and_losses_that_do_not_meet_are_said(tmp_path, capsys):
  first, second = _run(tmp_path / 'a', 0), _run(tmp_path / 'b', 1, rate=0.2)
  assert main(['compare', first, second]) == 2
  assert 'no loop.seed in common' in capsys.readouterr().err
  third = _run(tmp_path / 'c', 0, rate=0.3, settings={'objective': {'prediction': 'v_prediction'}})
  assert main(['compare', first, third]) == 0
  said = capsys.readouterr().out
  assert 'its loss is another one' in said and 'there is one seed' in said and 'Loss,' not in said
  assert main(['compare', first, third, '--until', 'kid=1']) == 2
  assert 'kid' in capsys.readouterr().err


def test_arms_of_several_keys_are_all_combinations():
  arms = arms_of(['config.optimizer.groups=(),((".*bias", 0.5),)', 'config.a=1,2'])
  assert [tuple(arm.values()) for arm in arms] == [
    ('()', '1'), ('()', '2'), ('((".*bias", 0.5),)', '1'), ('((".*bias", 0.5),)', '2')
  ]
  for wrong in (['config.a=1'], ['config.a=1,1'], ['a=1,2'], ['config.loop.seed=1,2'],
                ['config.a=1,2', 'config.a=3,4']):
    with pytest.raises(UserError, match='--arms'):
      arms_of(wrong)
