"""Real processes tell each other to stop, that they give up, and notice who falls silent."""

import os
import re
import subprocess
import sys

import pytest

from tests import tiny

COUNT = 3


def _run(what):
  """[(exit code, output)] of three processes; stopped ones are killed at the end."""
  port = tiny.free_port()
  env = {**os.environ, 'PYTHONPATH': str(tiny.ROOT), 'XLA_FLAGS': '', 'JAX_PLATFORMS': 'cpu'}
  script = str(tiny.ROOT / 'tests' / 'faults' / 'peer.py')
  processes = [
    subprocess.Popen(
      [sys.executable, script, str(i), str(COUNT), str(port), what], env=env, text=True,
      stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    ) for i in range(COUNT)
  ]
  found = {}
  try:
    for i in (0, 2, 1):  # Number 1 is the one that is stopped.
      if what == 'silent' and i == 1:
        processes[1].kill()
      out, err = processes[i].communicate(timeout=60)
      found[i] = (processes[i].returncode, out, err)
  finally:
    for process in processes:
      process.kill()
  return [found[i] for i in range(COUNT)]


@pytest.mark.slow
def test_all_stop_at_the_same_poll():
  found = _run('stop')
  assert [code for code, _, _ in found] == [0, 0, 0], found
  steps = {int(re.fullmatch(r'stopped at (\d+)\n', out)[1]) for _, out, _ in found}
  assert len(steps) == 1 and steps.pop() < 1999


@pytest.mark.slow
@pytest.mark.parametrize(('what', 'others', 'wanted'), [
  ('leave', (0, 1), "gone 2 'failed' process 2 of 3 is gone; it said: failed"),
  ('silent', (0, 2), "gone 1 '' process 1 of 3 is gone; it has been silent for 2 s"),
])
def test_who_is_gone_is_known_to_the_others(what, others, wanted):
  found = _run(what)
  for i in others:
    code, out, err = found[i]
    assert code == 75 and out.strip() == wanted, (i, code, out, err)
