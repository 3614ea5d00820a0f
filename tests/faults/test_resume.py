"""Real signals: what was interrupted goes on as if nothing had happened, to the bit."""

import json
import os
import signal
import time

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from diffusion_jax.train import loop
from tests import tiny

STEPS = 24
SAME = ('loss', 'gradient_norm', 'learning_rate', 'loss_by_timestep')


@pytest.fixture(scope='module')
def recipe(tmp_path_factory, parts):
  """Diffusion on cached latents: every step draws captions, timesteps, noise and dropout."""
  values = tiny.diffusion_config(
    parts, loop={'total_steps': STEPS, 'checkpoint_every_steps': 1000, 'evaluate_samples': 0}
  )
  return tiny.write_config(tmp_path_factory.mktemp('resume') / 'recipe.py', values)


@pytest.fixture(scope='module')
def uninterrupted(recipe, tmp_path_factory, command):
  run = tmp_path_factory.mktemp('whole') / 'run'
  assert command('train', '--config', recipe, '--workdir', run, '--quiet') == 0
  assert sorted(tiny.metrics(run)) == list(range(1, STEPS + 1))
  return run


def _same_weights(run, other):
  path = 'model/unet/diffusion_pytorch_model.safetensors'
  found, wanted = load_file(run / path), load_file(other / path)
  assert found.keys() == wanted.keys()
  for name, value in wanted.items():
    np.testing.assert_array_equal(found[name], value, err_msg=name)


def _interrupt(process, run, number, after):
  """Send the signal once step `after` is logged; return (exit code, stdout, stderr)."""
  file, end = run / 'metrics.jsonl', time.time() + 300
  while not file.exists() or len(file.read_text().splitlines()) < after:
    assert process.poll() is None and time.time() < end, process.communicate()
    time.sleep(0.01)
  process.send_signal(number)
  out, err = process.communicate(timeout=300)
  return process.returncode, out, err


@pytest.mark.slow
def test_stopped_and_started_again_is_uninterrupted(recipe, uninterrupted, small_data, tmp_path):
  run, env = tmp_path / 'run', tiny.environment(small_data, devices=1)
  # Sums within a convolution's gradient are split over the threads of XLA, of which this process
  # has one for each of its simulated devices.
  env['NPROC'] = str(jax.local_device_count())
  arguments = ['train', '--config', recipe, '--workdir', str(run)]
  number = signal.SIGINT  # SIGTERM, in tests/faults/test_ranks.py.
  code, out, err = _interrupt(tiny.start(arguments, env), run, number, after=3)
  assert code == 128 + number, err
  assert 'to go on, run again: python -m diffusion_jax train --config' in out
  status = json.loads((run / 'status.json').read_text())
  stopped = status['step']
  assert status['state'] == 'interrupted' and 3 <= stopped < STEPS
  assert number.name in status['message'] and f'saved step {stopped} of {STEPS}' in out
  assert not (run / 'model').exists()
  process = tiny.start(arguments, env)
  out, err = process.communicate(timeout=300)
  assert process.returncode == 0, err
  assert f'going on from step {stopped}' in out
  found, wanted = tiny.metrics(run), tiny.metrics(uninterrupted)
  assert found.keys() == wanted.keys()
  for step, line in wanted.items():
    assert {k: found[step][k] for k in SAME} == {k: line[k] for k in SAME}, step
  _same_weights(run, uninterrupted)


def test_a_stop_between_two_log_lines_loses_no_part_of_the_mean(
  recipe, uninterrupted, command, tmp_path, monkeypatch, capsys
):
  """A signal during step 8, with a line every 3 steps: the line at 9 is of 7, 8 and 9."""
  run, calls, put = tmp_path / 'run', [], loop.put_batch

  def put_and_stop(*arguments):
    calls.append(arguments)
    if len(calls) == 8:
      os.kill(os.getpid(), signal.SIGTERM)
    return put(*arguments)

  monkeypatch.setattr(loop, 'put_batch', put_and_stop)
  arguments = ('train', '--config', recipe, '--workdir', run, '--config.loop.log_every_steps=3',
               '--quiet')
  assert command(*arguments) == 143
  assert sorted(tiny.metrics(run)) == [3, 6]
  assert (run / 'checkpoints' / '8').is_dir()
  assert command(*arguments) == 0
  assert len(calls) == STEPS
  lines, single = tiny.metrics(run), tiny.metrics(uninterrupted)
  assert sorted(lines) == list(range(3, STEPS + 1, 3))
  for step, line in lines.items():
    for name in ('loss', 'gradient_norm'):
      wanted = np.mean([single[i][name] for i in range(step - 2, step + 1)])
      assert line[name] == pytest.approx(wanted, rel=1e-5), step
  _same_weights(run, uninterrupted)


def test_a_finished_run_trains_no_further_step(command, finished, copy_of, monkeypatch):
  run = copy_of(finished)
  before = tiny.metrics(run), tiny.snapshot(run / 'checkpoints'), tiny.snapshot(run / 'model')

  def no_step(*arguments):
    raise AssertionError('a step was made')

  monkeypatch.setattr(loop, 'put_batch', no_step)
  recipe = finished.parent / 'recipe.py'
  assert command('train', '--config', recipe, '--workdir', run, '--quiet') == 0
  assert tiny.metrics(run) == before[0]
  assert tiny.snapshot(run / 'checkpoints') == before[1]
  after = tiny.snapshot(run / 'model')
  assert {name for name in after if after[name] != before[2][name]} <= {'README.md'}


@pytest.mark.parametrize('log_every', [1, 5])
def test_divergence_stops_and_no_broken_state_is_saved(
  command, tmp_path, small_data, capsys, log_every
):
  values = tiny.clip_config(
    optimizer={'learning_rate': 1e30, 'warmup_steps': 0}, safety={'max_skipped_in_a_row': 3},
    loop={'total_steps': 12, 'checkpoint_every_steps': 1, 'log_every_steps': log_every},
  )
  config, run = tiny.write_config(tmp_path / 'recipe.py', values), tmp_path / 'run'
  assert command('train', '--config', config, '--workdir', run, '--quiet') == 1
  message = capsys.readouterr().err.strip().splitlines()[-1]
  # Step 1 makes the parameters huge; steps 2, 3 and 4 are skipped, and the last ends the run.
  assert '3 steps in a row up to step 4 had a loss' in message
  assert 'the last checkpoint, from before, is of step 3' in message
  status = json.loads((run / 'status.json').read_text())
  assert (status['state'], status['retry']) == ('diverged', False)
  assert status['message'].endswith(message.partition(': ')[2])
  lines = tiny.metrics(run)
  assert lines[max(lines)]['skipped_fraction'] == {1: 1.0, 5: 3 / 4}[log_every]
  assert not (run / 'model').exists()
