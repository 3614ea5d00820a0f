"""benchmarks/peers.py at its smallest: both sides compute the same, and figures come out."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file

pytest.importorskip('torch')
pytest.importorskip('diffusers')
from benchmarks import peers
from benchmarks.peer_comparison import Comparison
from benchmarks.peer_process import Process
from benchmarks.table import peer_rows
from tests import tiny

PEER = 'eager_channels_last'
SMALL = ['--model', 'tiny', '--batch', '2', '--images', '2', '--pairs', '2', '--steps', '4',
         '--peers', PEER]
QUICKEST = ['--only', 'sample', '--steps', '1']
"""Compiled in half the time of a gradient."""


@pytest.mark.slow
def test_both_sides_give_the_same_and_are_timed_in_pairs(tmp_path, capsys):
  out = tmp_path / 'peers.json'
  peers.main([*SMALL, '--json', str(out)])
  found = json.loads(out.read_text())
  words = {'step': 'training step', 'sample': 'DDIM'}
  for what in words:
    one = found[what][PEER]
    assert one['output_difference'] < 1e-5 and one[f'{what}_difference'] < 1e-4
    low, high = one['ratio']['quartiles']
    assert 0 < low <= one['ratio']['median'] <= high and one['theirs_seconds']['median'] > 0
    taken = found['compiling'][what]
    assert taken['from_cache'] and 0 < taken['cached_seconds'] < taken['cold_seconds']
    assert all(1e8 < one[f'{name}_peak_resident_bytes'] < 1e11 for name in ('ours', 'theirs'))
    (row,) = [row for row in peer_rows(found) if words[what] in row[0]]
    assert row[3] == 'eager channels last' and f'{one["ratio"]["median"]:.2f}' in row[5]
  assert found['flops']['step'] > 0 and found['versions']['torch'] and found['device']['kind']
  assert capsys.readouterr().out.count('median ratio') == 2


def test_other_weights_and_a_killed_side_end_the_program(tmp_path):
  """What is timed must be the same work; the other side is ended, too."""
  args = peers.arguments([*SMALL, *QUICKEST])
  with Process('ours', 'diffusion_jax') as ours:
    comparison = Comparison(args, 'sample', ours, str(tmp_path))
    with killing('theirs'), pytest.raises(SystemExit, match=(
      f'^The process of diffusers {PEER} was ended by SIGKILL.$'
    )):
      comparison.beside(PEER)
    assert set(sides(os.getpid())) == {'ours'}
    weights = load_file(comparison.weights)
    save_file({**weights, 'conv_out.bias': weights['conv_out.bias'] + 0.5}, comparison.weights)
    with pytest.raises(SystemExit, match='outputs of the U-Net differ by'):
      comparison.beside(PEER)
    assert set(sides(os.getpid())) == {'ours'}


def test_a_side_that_cannot_work_ends_the_command_with_its_message(monkeypatch):
  monkeypatch.setenv('JAX_PLATFORMS', 'abacus')
  with pytest.raises(SystemExit, match=r'^diffusion_jax failed: .*abacus'):
    peers.main(SMALL)
  assert not sides(os.getpid())


def test_a_process_ends_with_its_block():
  with Process('theirs', PEER) as process:
    assert sides(os.getpid()) == {'theirs': process.id}
    # Others have classes that the parent would have to import.
    assert {type(value) for value in process.ask('load')['versions'].values()} == {str}
  assert not sides(os.getpid())


def sides(command: int) -> dict[str, int]:
  """{side: id} of the processes that a command has started."""
  found = {}
  for folder in Path('/proc').glob('[0-9]*'):
    try:
      parent = (folder / 'stat').read_text().rpartition(')')[2].split()[1]
      words = (folder / 'cmdline').read_text().split('\0')
    except (FileNotFoundError, ProcessLookupError):
      continue  # It has ended meanwhile.
    if int(parent) == command and 'benchmarks.peer_process' in words:
      found[words[words.index('benchmarks.peer_process') + 1]] = int(folder.name)
  return found


def alive(process: int) -> bool:
  """Whether it runs; nobody may have asked yet how it ended."""
  try:
    return Path(f'/proc/{process}/stat').read_text().rpartition(')')[2].split()[0] != 'Z'
  except (FileNotFoundError, ProcessLookupError):
    return False


@contextlib.contextmanager
def killing(side: str):
  """Within, a side of this process is killed as soon as there is one."""
  def run():
    within(300, lambda: side in sides(os.getpid()))
    os.kill(sides(os.getpid())[side], signal.SIGKILL)

  thread = threading.Thread(target=run)
  thread.start()
  yield
  thread.join()


def within(seconds: float, holds) -> None:
  """Waits until it holds."""
  end = time.monotonic() + seconds
  while not holds():
    assert time.monotonic() < end
    time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.skipif(not Path('/proc/self').is_dir(), reason='finds processes in /proc')
@pytest.mark.parametrize(('killed', 'number', 'beside', 'code', 'message'), [
  ('ours', signal.SIGKILL, 1, 1, 'The process of diffusion_jax was ended by SIGKILL.\n'),
  ('command', signal.SIGKILL, 2, -signal.SIGKILL, ''),
  ('command', signal.SIGTERM, 1, 128 + signal.SIGTERM, ''),
], ids=['ours', 'command', 'command stopped'])
def test_all_processes_end_with_any_of_them(killed, number, beside, code, message, tmp_path):
  """As soon as there are so many beside the command: the second has to wait for the first."""
  command = subprocess.Popen(
    [sys.executable, '-m', 'benchmarks.peers', *SMALL, *QUICKEST, '--pairs', '1000000'],
    cwd=tiny.ROOT, env=tiny.environment('', 1, TMPDIR=str(tmp_path)), text=True,
    stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
  )
  with command:
    try:
      within(300, lambda: len(sides(command.pid)) == beside)
      every = {'command': command.pid, **sides(command.pid)}
      os.kill(every[killed], number)
      _, said = command.communicate(timeout=300)
    finally:
      command.kill()
  assert (command.returncode, said) == (code, message)
  within(60, lambda: not any(map(alive, every.values())))
  # The weights lie there; only a killed command cannot delete them.
  left = list(tmp_path.glob('peers_*'))
  assert len(left) == (code == -signal.SIGKILL)


def test_steps_that_diffusers_rounds_otherwise_are_refused(capsys):
  with pytest.raises(SystemExit):
    peers.arguments(['--steps', '3'])
  assert 'does not divide 1000' in capsys.readouterr().err
