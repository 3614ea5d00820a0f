"""What a start does before it trains: refused, killed, beside another, or on damaged files."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from safetensors.numpy import load_file

from diffusion_jax.errors import UserError
from diffusion_jax.runs.directory import RunDirectory
from diffusion_jax.runs.status import is_stalled
from diffusion_jax.train import loop
from diffusion_jax.viz.report import write_report
from tests import tiny
from tests.faults.ranks import Ranks

LOOP = {'total_steps': 12, 'checkpoint_every_steps': 4, 'sample_every_steps': 6,
        'evaluate_samples': 64}
WEIGHTS = 'model/diffusion_pytorch_model.safetensors'


def _status(run):
  return json.loads((run / 'status.json').read_text())


def _recipe(folder, **sections):
  sections['loop'] = LOOP | sections.get('loop', {})
  return tiny.write_config(folder / 'toy.py', tiny.toy_config(**sections))


@pytest.fixture(scope='module')
def toy(tmp_path_factory, command):
  """Workdir of a toy that has finished; its config is toy.py beside it."""
  folder = tmp_path_factory.mktemp('toy')
  run = folder / 'run'
  assert command('train', '--config', _recipe(folder), '--workdir', run, '--quiet') == 0
  return run


def _train(run, recipe, *more):
  return ('train', '--config', recipe, '--workdir', run, '--quiet', *more)


@pytest.mark.parametrize(('more', 'words'), [
  (['--config.loop.total_steps=5'], 'has made 12 steps, more than loop.total_steps 5'),
  (['--config.optimizer.learning_rate=0.5'], 'belongs to another config'),
  (['--config.loop.batch_sise=8'], 'batch_sise'),
])
@pytest.mark.parametrize('state', ['finished', 'interrupted'])
def test_a_refused_start_leaves_a_run_as_it_was(toy, copy_of, fails, more, words, state):
  run = copy_of(toy)
  if state != 'finished':
    told = _status(run) | {'state': state, 'retry': True}
    (run / 'status.json').write_text(json.dumps(told))
  before = tiny.snapshot(run)
  assert words in fails(*_train(run, toy.parent / 'toy.py', *more))
  assert tiny.snapshot(run) == before


def test_a_start_whose_checkpoints_are_all_damaged_is_refused_too(toy, copy_of, fails):
  run = copy_of(toy)
  for folder in (run / 'checkpoints').iterdir():
    if folder.is_dir():
      (folder / 'manifest.json').unlink()
  status = (run / 'status.json').read_bytes()
  with pytest.raises(AssertionError, match='all checkpoints are damaged'):  # It says more lines.
    fails(*_train(run, toy.parent / 'toy.py'))
  assert 'all checkpoints are damaged' in fails(*_train(run, toy.parent / 'toy.py'))
  assert (run / 'status.json').read_bytes() == status
  assert not list(run.glob('run.*.lock'))


def _seconds_until(what, seconds=60.0):
  end = time.monotonic() + seconds
  while not what():
    assert time.monotonic() < end
    time.sleep(0.002)


NO_JAX = '''
import sys, time
class Never:
  def find_spec(self, name, *rest):
    while name in ('jax', 'jaxlib'):
      time.sleep(1)
sys.meta_path.insert(0, Never())
'''


def test_a_start_that_is_killed_at_once_has_said_that_it_began(tmp_path):
  """It says so before it imports JAX, which takes the most of a start: here it never gets there."""
  run = tmp_path / 'run'
  (tmp_path / 'sitecustomize.py').write_text(NO_JAX)
  path = os.pathsep.join([str(tmp_path), os.environ.get('PYTHONPATH', '')]).rstrip(os.pathsep)
  process = tiny.start(
    [str(part) for part in _train(run, _recipe(tmp_path))],
    tiny.environment('', devices=1, PYTHONPATH=path),
  )
  try:
    _seconds_until((run / 'status.json').exists)
    status = _status(run)
  finally:
    process.kill()
  process.communicate()
  assert (status['state'], status['retry'], status['step']) == ('starting', True, 0)
  _seconds_until(lambda: _status(run)['state'] != 'starting', 10)
  after = _status(run)
  assert (after['state'], after['retry']) == ('killed', True)
  assert 'while starting' in after['message']


def test_ctrl_c_before_training_is_an_interruption_and_takes_nothing_from_a_finished_run(
  toy, copy_of, command, tmp_path, monkeypatch
):
  def interrupted(*arguments):
    raise KeyboardInterrupt

  monkeypatch.setattr(loop, 'initializer', interrupted)
  monkeypatch.setattr(loop, 'step_and_batch', interrupted)
  recipe, run = toy.parent / 'toy.py', copy_of(toy)
  assert command(*_train(run, recipe)) == 130
  assert _status(run) == _status(toy)
  assert command(*_train(tmp_path / 'new', recipe)) == 130
  assert _status(tmp_path / 'new')['state'] == 'interrupted'


CONTENTS = [
  b'', b'[]', b'[1, {"state": 5}]', b'null', b'NaN', b'7', b'"text"', b'\x00\xff\xfe', b'{"a": ',
  b'[' * 100_000, b'{"a": ' * 5000, b'{"step": 1' + b'0' * 5000 + b'}', None,
  b'{"state": [], "retry": "yes", "step": {}, "updated": "now", "goodput": [1], "seconds": null,'
  b' "samples": {}, "of": [], "jax": {"a": 1}, "generated": 5, "3": null}',
  b'{"state": {}, "retry": null, "step": -1, "updated": NaN, "goodput": {"step": "long"},'
  b' "samples": Infinity, "generated": {"fid": []}, "start": 5, "message": [1]}',
  b'{"updated": 1e308, "goodput": {"step": 1e999, "x": -1}, "step": 1.5, "total_steps": true}',
]
SHOWN = ('status.json', 'scores.json', 'versions.json', 'step.json', 'evaluation.json',
         'checkpoints/scores.json', 'run_card.json')
"""Of a toy, whose points have no data.json."""


def _damage(file, content):
  file.unlink(missing_ok=True)
  if content is None:
    file.mkdir()
    (file / 'inside').write_text('x')
  else:
    file.write_bytes(content)


@pytest.mark.parametrize('turn', [
  pytest.param(turn, marks=[pytest.mark.slow] if turn % 5 else []) for turn in range(len(CONTENTS))
])
def test_damaged_files_that_only_show_stop_no_start(toy, copy_of, command, capsys, turn):
  """All of them damaged at once, each in another way; over all turns each in every way."""
  run = copy_of(toy)
  for i, name in enumerate(SHOWN):
    _damage(run / name, CONTENTS[(turn + 2 * i) % len(CONTENTS)])
  assert command(*_train(run, toy.parent / 'toy.py')) == 0
  said = capsys.readouterr()
  assert 'Traceback' not in said.err + said.out
  assert _status(run)['state'] == 'finished' and _status(run)['step'] == 12
  assert isinstance(json.loads((run / 'scores.json').read_text())['generated'], dict)
  assert isinstance(json.loads((run / 'versions.json').read_text())['jax'], str)
  for i, name in enumerate(SHOWN):
    content = CONTENTS[(turn + 2 * i) % len(CONTENTS)]
    if content is None:
      aside = run / f'{name}.damaged'
      assert (aside / 'inside').read_text() == 'x' and f'moved to {aside.name}' in said.err


@pytest.mark.parametrize('name', ['status.json', 'scores.json', 'versions.json'])
def test_a_report_of_damaged_files_is_one_or_a_sentence(toy, copy_of, name):
  run = copy_of(toy)
  for content in CONTENTS:
    _damage(run / name, content)
    try:
      assert write_report(run).is_file()
    except UserError as error:
      assert name in str(error)
    shutil.rmtree(run / name, ignore_errors=True)


@pytest.mark.parametrize('content', [
  *CONTENTS[:13], b'{}', b'{"task": 5}', b'{"task": []}', b'{"task": "toy"}',
  b'{"task": "toy", "loop": []}',
  b'{"task": "toy", "loop": null, "data": 5, "settings": [], "x": NaN}',
])
def test_a_damaged_config_is_refused_by_name(toy, copy_of, fails, content):
  run = copy_of(toy)
  _damage(run / 'config.json', content)
  before = tiny.snapshot(run)
  for arguments in (
    _train(run, toy.parent / 'toy.py'),
    ('sample', '--workdir', run, '--prompt', 'x', '--out', run.parent / 'out'),
  ):
    message = fails(*arguments)
    assert 'config' in message, message
  assert tiny.snapshot(run) == before


@pytest.mark.parametrize('content', CONTENTS)
def test_a_damaged_status_is_no_word_for_who_follows(toy, copy_of, content):
  run = copy_of(toy)
  _damage(run / 'status.json', content)
  assert is_stalled(RunDirectory(run), 1e4) is False
  for path in (run, run / 'checkpoints'):
    os.utime(path, (1e9, 1e9))
  assert is_stalled(RunDirectory(run), 1e4) is True


def test_beside_a_run_others_read_and_no_other_trains(tmp_path, fails, command, capsys):
  """A real run: killed, it keeps nobody out; stopped, it leaves no lock."""
  run = tmp_path / 'run'
  changes = {'loop': {'total_steps': 1_000_000, 'log_every_steps': 10,
                      'checkpoint_every_steps': 500}}
  with Ranks(run, 1, **changes) as ranks:
    ranks.wait_for('training', step=20)
    recipe = str(run.with_suffix('.py'))
    message = fails(*_train(run, recipe))
    assert f'in use by process {ranks.processes[0].pid} on {os.uname().nodename}' in message
    assert command('report', '--workdir', run) == 0
    at = ranks.logged()
    _seconds_until(lambda: ranks.logged() > at + 20)
    assert _status(run)['pid'] == ranks.processes[0].pid
    assert len(list(run.glob('run.*.lock'))) == 1
    ranks.signal(0, signal.SIGKILL)
    ranks.processes[0].wait()
  with Ranks(run, 1, **changes) as ranks:
    ranks.wait_for('training')
    ranks.signal(0)
    assert ranks.codes() == [143]
  assert not list(run.glob('run.*.lock'))


@pytest.mark.slow
def test_a_second_run_of_two_processes_is_refused_on_both(tmp_path):
  run = tmp_path / 'run'
  changes = {'loop': {'total_steps': 1_000_000, 'checkpoint_every_steps': 100_000}}
  with Ranks(run, 2, **changes) as first:
    first.wait_for('training')
    with Ranks(run, 2, **changes) as second:
      for code, _, err in second.results():
        assert code == 2 and f'in use by process {first.processes[0].pid}' in err, err
    first.signal(1)
    assert first.codes() == [143, 143]


@pytest.mark.slow
def test_what_the_others_said_of_a_process_that_stands_still_stays(tmp_path):
  """Killed at last, it has a keeper too; but that a process was lost has been said."""
  run = tmp_path / 'run'
  changes = {'loop': {'total_steps': 1_000_000, 'log_every_steps': 10,
                      'checkpoint_every_steps': 50}}
  with Ranks(run, 2, **changes) as ranks:
    ranks.wait_for('training', step=20)
    ranks.signal(1, signal.SIGSTOP)
    assert ranks.processes[0].wait(60) == 75
    assert _status(run)['state'] == 'peer_lost'
    ranks.signal(1, signal.SIGKILL)
    ranks.processes[1].wait()
    time.sleep(1)
  status = _status(run)
  assert status['state'] == 'peer_lost' and 'process 1 of 2 is gone' in status['message']


_KEEPER = """
import sys
from diffusion_jax.runs.directory import RunDirectory
from diffusion_jax.runs.status import Status
status = Status(RunDirectory(sys.argv[1]), 1, 2)
status.start = sys.argv[2]
status('training', step=7)
print('told', flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize(('found', 'stays'), [
  ({'state': 'peer_lost', 'start': 'this', 'pid': 1}, True),
  ({'state': 'finished', 'start': 'this', 'pid': 1}, True),
  ({'state': 'training', 'start': 'this', 'pid': 1}, False),
  ({'state': 'training', 'start': 'later', 'pid': 1}, True),
  ([1], False), (None, False), ({'state': []}, False),
])
def test_a_keeper_takes_nothing_back(tmp_path, found, stays):
  """The process is killed after another, of this start or a later one, has written."""
  child = subprocess.Popen(
    [sys.executable, '-c', _KEEPER, str(tmp_path), 'this'], cwd=tiny.ROOT, text=True,
    stdin=subprocess.PIPE, stdout=subprocess.PIPE,
  )
  assert child.stdout.readline() == 'told\n'
  if found is not None:
    (tmp_path / 'status.json').write_text(json.dumps(found))
  child.kill()
  child.communicate()  # To the end of what its keeper, too, could write to.
  if stays:
    assert _status(tmp_path) == found
  else:
    assert (_status(tmp_path)['state'], _status(tmp_path)['step']) == ('killed', 7)


def test_an_error_in_the_loop_costs_no_step(toy, command, tmp_path, monkeypatch, capsys):
  """Saved where it came, so that the next start goes on as if nothing had been."""
  put, calls, run = loop.put_batch, [], tmp_path / 'run'

  def broken(*arguments):
    calls.append(None)
    if len(calls) == 7:
      raise RuntimeError('the moon is full')
    return put(*arguments)

  monkeypatch.setattr(loop, 'put_batch', broken)
  arguments = _train(run, toy.parent / 'toy.py')
  with pytest.raises(RuntimeError, match='the moon'):
    command(*arguments)
  status = _status(run)
  assert (status['state'], status['retry'], status['step']) == ('failed', False, 6)
  assert status['message'] == 'RuntimeError: the moon is full; step 6 was saved before'
  assert 'step 6 was saved before' in capsys.readouterr().err
  assert command(*arguments) == 0 and len(calls) == 13
  assert sorted(tiny.metrics(run)) == list(range(1, 13))
  found, wanted = load_file(run / WEIGHTS), load_file(toy / WEIGHTS)
  for name, value in wanted.items():
    np.testing.assert_array_equal(found[name], value)


def test_a_state_that_is_not_finite_is_never_saved(command, tmp_path, monkeypatch, capsys):
  put, calls, run = loop.put_batch, [], tmp_path / 'run'

  def broken(*arguments):
    calls.append(None)
    if len(calls) == 4:
      raise RuntimeError('the moon is full')
    return put(*arguments)

  monkeypatch.setattr(loop, 'put_batch', broken)
  recipe = _recipe(tmp_path, optimizer={'learning_rate': 1e39, 'warmup_steps': 0})
  with pytest.raises(RuntimeError, match='the moon'):
    command(*_train(run, recipe))
  assert 'the state has diverged' in _status(run)['message']
  assert not any(path.name.isdigit() for path in (run / 'checkpoints').glob('*'))
