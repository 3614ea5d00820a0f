"""Thousands of steps in one process, as its own metrics tell of them: nothing piles up."""

import itertools
import json
import os
import subprocess
import sys

import pytest

from tests import tiny
from tests.tiny import ROOT

STEPS, LOG, SAVE, SHOW = 2400, 25, 200, 800
MB = 2**20


@pytest.mark.slow
def test_memory_files_and_threads_stay_flat(tmp_path):
  """Saves, pictures and scores on the way; what is compared is the second half with the first."""
  run = tmp_path / 'run'
  config = tiny.write_config(tmp_path / 'recipe.py', tiny.toy_config(loop={
    'total_steps': STEPS, 'log_every_steps': LOG, 'checkpoint_every_steps': SAVE,
    'sample_every_steps': SHOW, 'evaluate_every_steps': SHOW, 'evaluate_samples': 64,
  }))
  done = subprocess.run(
    [sys.executable, '-m', 'diffusion_jax', 'train', '--config', config, '--workdir', str(run),
     '--quiet'],
    cwd=ROOT, capture_output=True, text=True, timeout=500,
    # One device, and an allocator with few pools: what is freed is used again at once.
    env={**os.environ, 'XLA_FLAGS': '', 'MALLOC_ARENA_MAX': '2'},
  )
  assert done.returncode == 0, done.stderr[-2000:]
  lines = [line for _, line in sorted(tiny.metrics(run).items())]
  assert [line['step'] for line in lines] == list(range(LOG, STEPS + 1, LOG))
  half = len(lines) // 2
  first, second = lines[:half], lines[half:]
  # What leaks grows from line to line. Pools of the allocator grow in a few jumps, and now and then
  # some buffers of a step are held a little longer.
  held = [line['host_memory'] for line in second]
  grown = [after - before > MB / 16 for before, after in itertools.pairwise(held)]
  assert sum(grown) < len(grown) / 4, held
  least = lambda part, name: min(line[name] for line in part)
  assert least(second, 'host_memory') - least(first, 'host_memory') < 128 * MB
  # Once all has been done that is done on the way, and early and late in what is left.
  begun, last = [line for line in first if line['step'] > SHOW], second[half // 2 :]
  # A save that is under way holds files open; threads that are idle for long end.
  assert least(last, 'open_files') <= least(begun, 'open_files')
  # While a save is under way twenty more write it, and pools of Orbax fill up slowly.
  assert least(last, 'threads') <= least(begun, 'threads') + 4
  assert [line['recompilations'] for line in lines] == [0] * len(lines)
  assert lines[-1]['loss'] < lines[0]['loss']
  status = json.loads((run / 'status.json').read_text())
  assert status['state'] == 'finished' and 'trouble' not in status
