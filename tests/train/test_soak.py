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
  done = subprocess.run(
    [sys.executable, '-m', 'diffusion_jax', 'train', '--config', 'configs/toy/edm.py',
     '--workdir', str(run), '--quiet', f'--config.loop.total_steps={STEPS}',
     f'--config.loop.log_every_steps={LOG}', f'--config.loop.checkpoint_every_steps={SAVE}',
     f'--config.loop.sample_every_steps={SHOW}', f'--config.loop.evaluate_every_steps={SHOW}',
     '--config.loop.evaluate_samples=64', '--config.settings.sample.steps=2'],
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
  least = lambda part: min(line['host_memory'] for line in part)
  assert least(second) - least(first) < 128 * MB
  # The last line before each save: a save holds files open for a while.
  most = lambda part, name: max(line[name] for line in part if (line['step'] + LOG) % SAVE == 0)
  assert most(second, 'open_files') <= most(first, 'open_files')
  assert most(second, 'threads') <= most(first, 'threads') + 4  # Pools of Orbax fill up slowly.
  assert [line['recompilations'] for line in lines] == [0] * len(lines)
  assert lines[-1]['loss'] < lines[0]['loss']
  status = json.loads((run / 'status.json').read_text())
  assert status['state'] == 'finished' and 'trouble' not in status
