"""One run at a time in a workdir: real processes that live, die, stand still, come at once."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from tests import tiny

LEASE = 1.2


class Holder:
  """A process of lock_holder.py."""

  def __init__(self, folder, host='-', boot='-'):
    self.process = subprocess.Popen(
      [sys.executable, str(tiny.ROOT / 'tests/faults/lock_holder.py'), str(folder), host, boot,
       str(LEASE)],
      env={**os.environ, 'PYTHONPATH': str(tiny.ROOT)}, stdin=subprocess.PIPE,
      stdout=subprocess.PIPE, text=True,
    )

  def line(self) -> str:
    """The next thing it tells."""
    return self.process.stdout.readline().strip()

  def outcome(self) -> str:
    """Return what became of the lock, past what it said while it waited."""
    while (line := self.line()).startswith('said: '):
      pass
    return line

  def kill(self, reap: bool = True) -> None:
    self.process.kill()
    if reap:
      self.process.wait()

  def end(self) -> str:
    """Let it go on to its end; return what it told until then."""
    return self.process.communicate(timeout=30)[0]


@pytest.fixture
def start(tmp_path):
  """start(host, boot): a Holder on the folder tmp_path / 'run'."""
  (tmp_path / 'run').mkdir()
  started = []

  def run(*of):
    started.append(Holder(tmp_path / 'run', *of))
    return started[-1]

  yield run
  for holder in started:
    holder.kill()


def _locks(tmp_path):
  return sorted(path.name for path in (tmp_path / 'run').glob('run.*.lock'))


def test_the_second_is_refused_by_name_until_the_first_is_done(start, tmp_path):
  first, second = start(), start()
  taken = [holder for holder in (first, second) if holder.outcome() == 'taken']
  assert len(taken) == 1
  third = start()
  refusal = third.outcome()
  assert f'is in use by process {taken[0].process.pid} on {os.uname().nodename}' in refusal
  assert 'choose another workdir' in refusal and 'run.1.lock' in refusal
  taken[0].end()
  assert _locks(tmp_path) == []
  assert start().outcome() == 'taken'


@pytest.mark.parametrize('reap', [True, False], ids=['gone', 'zombie'])
def test_a_killed_process_keeps_nobody_out(start, tmp_path, reap):
  first = start()
  assert first.outcome() == 'taken'
  first.kill(reap)
  if not reap:
    os.waitid(os.P_PID, first.process.pid, os.WEXITED | os.WNOWAIT)
  began = time.monotonic()
  second = start()
  assert second.line() == 'taken'  # Without a word, so without waiting.
  assert time.monotonic() - began < LEASE and _locks(tmp_path) == ['run.2.lock']


def test_of_many_who_find_a_dead_lock_exactly_one_takes_it(start):
  for _ in range(3):
    outcomes = []
    holders = [start() for _ in range(5)]
    outcomes = [holder.outcome() for holder in holders]
    assert outcomes.count('taken') == 1, outcomes
    assert sum('is in use by process' in text for text in outcomes) == 4, outcomes
    holders[outcomes.index('taken')].kill()


def test_who_looked_before_another_came_looks_again(start, tmp_path):
  """It stands still between looking at dead locks and taking their place."""
  first = start()
  assert first.outcome() == 'taken'
  first.kill()
  (tmp_path / 'run' / 'run.1.lock').rename(tmp_path / 'run' / 'run.2.lock')
  (tmp_path / 'run' / 'run.1.lock').write_bytes(b'')
  slow = start()
  assert slow.line().startswith('said: ')  # It watches the one that says nothing.
  slow.process.send_signal(signal.SIGSTOP)
  (tmp_path / 'run' / 'run.1.lock').unlink()
  quick = start()
  assert quick.outcome() == 'taken' and _locks(tmp_path) == ['run.3.lock']
  slow.process.send_signal(signal.SIGCONT)
  assert f'in use by process {quick.process.pid} on' in slow.outcome()
  assert _locks(tmp_path) == ['run.3.lock']


def test_another_process_of_the_same_number_is_not_the_holder(start, tmp_path):
  first = start()
  assert first.outcome() == 'taken'
  first.kill()
  lock = tmp_path / 'run' / 'run.1.lock'
  values = json.loads(lock.read_text())
  assert values['started'].isdigit()
  lock.write_text(json.dumps(values | {'pid': os.getpid()}))  # It lives, but began at another time.
  assert start().line() == 'taken'


def test_a_machine_that_was_started_anew(start, tmp_path):
  first = start('-', 'another boot')
  assert first.outcome() == 'taken'
  first.kill()
  os.utime(tmp_path / 'run' / 'run.1.lock', (1e9, 1e9))  # Before this machine was started.
  assert start().line() == 'taken'


def test_a_live_holder_on_another_machine_is_seen_by_its_heartbeat(start):
  first = start('elsewhere', 'its boot')
  assert first.outcome() == 'taken'
  began = time.monotonic()
  second = start()
  assert second.line().startswith('said: ') and 'on elsewhere' in second.outcome()
  assert time.monotonic() - began < LEASE + 2


def test_clocks_that_differ_keep_nobody_out_and_let_nobody_in(start, tmp_path):
  """The holder's file says that it was touched long ago, or will be, whatever the time is."""
  for moment in (1e9, 4e9):
    first = start('elsewhere', 'its boot')
    assert first.outcome() == 'taken'
    lock, = (tmp_path / 'run').glob('run.*.lock')
    os.utime(lock, (moment, moment))
    assert 'is in use by' in start().outcome()
    first.kill()
    os.utime(lock, (moment, moment))
    last = start()
    assert last.outcome() == 'taken'
    last.end()


def test_who_stood_still_on_another_machine_is_replaced_and_learns_it(start, tmp_path):
  first = start('elsewhere', 'its boot')
  assert first.outcome() == 'taken'
  first.process.send_signal(signal.SIGSTOP)
  began = time.monotonic()
  second = start()
  assert second.outcome() == 'taken'
  assert LEASE * 0.9 < time.monotonic() - began < LEASE + 5
  first.process.send_signal(signal.SIGCONT)
  told = first.line()
  assert told.startswith('lost: ') and f'process {second.process.pid} on' in told
  first.end()
  assert _locks(tmp_path) == ['run.2.lock']  # It leaves the other's alone.


def test_a_lock_that_somebody_deletes_is_made_again(start, tmp_path):
  first = start()
  assert first.outcome() == 'taken'
  (tmp_path / 'run' / 'run.1.lock').unlink()
  end = time.monotonic() + 10
  while not _locks(tmp_path) and time.monotonic() < end:
    time.sleep(0.02)
  assert 'is in use by' in start().outcome()


@pytest.mark.parametrize('content', [b'', b'\x00\xff', b'[1]', b'null', b'{"pid": "1"}',
                                     b'{"pid": 1e999, "boot": ""}', b'{"pid": -1, "boot": 5}'])
def test_a_lock_that_says_nothing_is_watched(start, tmp_path, content):
  (tmp_path / 'run' / 'run.1.lock').write_bytes(content)
  holder = start()
  assert holder.line().startswith('said: ')
  assert holder.outcome() == 'taken'


def test_what_only_has_the_name_of_a_lock_is_no_lock(start, tmp_path):
  (tmp_path / 'run' / 'run.1.lock').mkdir()
  os.mkfifo(tmp_path / 'run' / 'run.2.lock')
  (tmp_path / 'run' / 'run.3.lock').symlink_to('nowhere')
  assert start().line() == 'taken'


def test_on_a_full_disk_there_is_one_holder_too(start, tmp_path, small_disk):
  disk = small_disk('size=64k')
  (tmp_path / 'run').rmdir()
  (tmp_path / 'run').symlink_to(disk)
  with (disk / 'ballast').open('wb', buffering=0) as file, contextlib.suppress(OSError):
    while True:
      file.write(bytes(4096))
  first = start()
  assert first.outcome() == 'taken' and (disk / 'run.1.lock').read_bytes() == b''
  assert 'a process that is not named' in start().outcome()
  (disk / 'ballast').unlink()
  end = time.monotonic() + 10
  while not (disk / 'run.1.lock').read_bytes() and time.monotonic() < end:
    time.sleep(0.02)
  assert f'process {first.process.pid} on' in start().outcome()
