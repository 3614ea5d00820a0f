"""Real processes stop drawing at the same batch, whatever their own clocks say."""

import os
import subprocess
import sys

import pytest

from tests import tiny

pytestmark = pytest.mark.slow
SCRIPT = """
import itertools, sys
import jax
index, port = int(sys.argv[1]), sys.argv[2]
jax.distributed.initialize(f'127.0.0.1:{port}', 2, index)
from diffusion_jax.evaluation.generated import Budget
clock = itertools.count(0, 1 + 5 * index)  # For the second, all takes six times as long.
budget = Budget(10.0, lambda: next(clock))
print(next(batch for batch in range(1, 100) if budget.over()))
"""


def test_all_stop_at_the_same_batch():
  port = str(tiny.free_port())
  processes = [
    subprocess.Popen(
      [sys.executable, '-c', SCRIPT, str(i), port], cwd=tiny.ROOT, text=True,
      stdout=subprocess.PIPE, stderr=subprocess.PIPE,
      env={**os.environ, 'PYTHONPATH': str(tiny.ROOT), 'XLA_FLAGS': ''},
    ) for i in range(2)
  ]
  try:
    results = [process.communicate(timeout=100) for process in processes]
  finally:
    for process in processes:
      process.kill()
  # Ten batches of a second by the first process's clock; two would be all by the other's.
  assert [out.split() for out, _ in results] == [['10'], ['10']], results
