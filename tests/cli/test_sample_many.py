"""sample with thousands of prompts: they go to disk as they are drawn, and memory stays."""

import os
import signal
import subprocess
import sys
import time

import pytest
from PIL import Image

from tests import tiny

CHILD = """
import itertools, resource, sys
import jax
from diffusion_jax.__main__ import main
from diffusion_jax.parallel.mesh import MeshConfig, make_mesh
from diffusion_jax.run import TrainedRun

def peak():
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024

run, out = sys.argv[1:]
peaks = []
for count in (64, 2000):
  prompts = f'{out}/{count}.txt'
  with open(prompts, 'w') as file:
    file.writelines(f'cat {number}\\n' for number in range(count))
  assert main(['sample', '--workdir', run, '--prompts', prompts, '--out', f'{out}/{count}']) == 0
  peaks.append(peak())
run = TrainedRun(run)
model, weights, sample = run.model, run.weights(), run.sample
mesh = make_mesh(MeshConfig())
batches = model.generate(
  model.on_mesh(weights, mesh), ['cat'] * 100_000, sample, seed=0, mesh=mesh, batch_size=16
)
assert len(list(itertools.islice(batches, 2))) == 2
print(*peaks, peak())
"""


@pytest.fixture
def environment(small_data):
  return tiny.environment(small_data, 1)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_pictures(finished, environment, tmp_path):
  """A grid of all 2,000 takes 90 MB beyond what loading took, noise for 100,000 at once 1.6 GB."""
  done = subprocess.run(
    [sys.executable, '-c', CHILD, finished, tmp_path], env=environment, cwd=tiny.ROOT, text=True,
    capture_output=True, check=False,
  )
  assert done.returncode == 0, done.stderr
  few, many, endless = map(int, done.stdout.splitlines()[-1].split())
  assert many - few < 50 and endless - many < 100
  assert 'grid.png shows the first 256 and leaves out 1,744' in done.stdout
  names = sorted(os.listdir(tmp_path / '2000'))
  assert len(names) == 2001 and names[-2] == '1999_cat_1999.png'
  with Image.open(tmp_path / '2000' / 'grid.png') as grid:
    assert grid.text['prompts'].splitlines() == [f'cat {number}' for number in range(256)]
    assert grid.width * grid.height < 2**26


def test_a_kill_in_the_middle_leaves_whole_pictures(finished, environment, tmp_path):
  prompts, out = tmp_path / 'prompts.txt', tmp_path / 'out'
  prompts.write_text('red apple\n' * 10_000)
  child = tiny.start(
    ['sample', '--workdir', str(finished), '--prompts', str(prompts), '--out', str(out)],
    environment,
  )
  try:
    until = time.monotonic() + 120
    while len(list(out.glob('*.png'))) < 40 and time.monotonic() < until:
      assert child.poll() is None, child.communicate()
      time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
  finally:
    child.kill()
    _, err = child.communicate()
  found = sorted(out.glob('*.png'))
  assert 40 <= len(found) < 10_000 and 'drawing' in err
  for number, path in enumerate(found):
    assert path.name == f'{number:04d}_red_apple.png'
    with Image.open(path) as image:
      image.load()
      assert image.text['prompt'] == 'red apple'
