"""Memory that a step frees is there for the next one, and nothing else changes."""

import os
import signal
import subprocess
import sys
import time

import pytest

from diffusion_jax.backend import host_memory
from tests.tiny import ROOT


def environment(**more):
  """This one, as a person has it who has set nothing of this."""
  left = {k: v for k, v in os.environ.items() if k not in ('GLIBC_TUNABLES', host_memory.SWITCH)}
  return left | {'JAX_PLATFORMS': 'cpu'} | more


CLEARED = """
import resource, sys
from diffusion_jax.backend.host_memory import keep_freed_memory
if sys.argv[1:]:
  keep_freed_memory()
import jax, jax.numpy as jnp
run, x = jax.jit(lambda x: (jnp.sin(x) @ x.T[:, :8]).sum()), jnp.ones((6000, 5000))
seen = [resource.getrusage(resource.RUSAGE_SELF).ru_minflt]
for _ in range(10):
  run(x + 1).block_until_ready()
  seen.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
print(min(b - a for a, b in zip(seen, seen[1:])))
"""


def test_freed_memory_is_not_cleared_again():
  def pages(*args):
    said = subprocess.run(
      [sys.executable, '-c', CLEARED, *args], capture_output=True, text=True, check=True,
      timeout=120, env=environment(),
    )
    return int(said.stdout)

  # x + 1 alone has 29,297 pages of 4 KiB, more than the arena of a thread holds. Some runs go by
  # until there is a place for everything.
  assert pages('kept') < 1000 and pages() > 29_000


@pytest.mark.parametrize(('asked', 'chip'), [('cpu', False), ('cuda', True), ('tpu,cpu', True)])
def test_the_host_of_a_chip_is_left_alone(asked, chip, monkeypatch):
  monkeypatch.setenv('JAX_PLATFORMS', asked)
  assert host_memory._has_chip() == chip


ASK = """
import os, sys
from pathlib import Path
from diffusion_jax.backend import host_memory
host_memory.TRANSPARENT = Path(os.environ['TRANSPARENT'])
with open('starts', 'a') as file:
  file.write(f'{os.getpid()} {sys.argv[1:]}\\n')
host_memory.ask_for_huge_pages()
print(os.environ.get('GLIBC_TUNABLES'))
"""


@pytest.mark.skipif(sys.platform != 'linux', reason='pages are the kernel\'s')
@pytest.mark.parametrize(('pages', 'more', 'tunables'), [
  ('always [madvise] never', {}, 'glibc.malloc.hugetlb=1'),
  ('always [madvise] never', {'GLIBC_TUNABLES': 'glibc.malloc.check=0'},
   'glibc.malloc.check=0:glibc.malloc.hugetlb=1'),
  ('always [madvise] never', {'GLIBC_TUNABLES': 'glibc.malloc.hugetlb=0'}, None),
  ('always [madvise] never', {'DIFFUSION_JAX_HUGE_PAGES': '0'}, None),
  ('[always] madvise never', {}, None),
  ('always madvise [never]', {}, None),
  (None, {}, None),
])
def test_a_program_starts_again_once_where_huge_pages_are_to_be_asked_for(
  pages, more, tunables, tmp_path
):
  if pages is not None:
    (tmp_path / 'enabled').write_text(pages + '\n')
  said = subprocess.run(
    [sys.executable, '-c', ASK, 'one', 'two words'], capture_output=True, text=True, check=True,
    timeout=60, cwd=tmp_path, env=environment(
      TRANSPARENT=str(tmp_path / 'enabled'), PYTHONPATH=str(ROOT), **more
    ),
  )
  starts = (tmp_path / 'starts').read_text().splitlines()
  # The same process, with the same arguments.
  assert len(set(starts)) == 1 and starts[0].endswith("['one', 'two words']")
  assert len(starts) == (1 if tunables is None else 2)
  assert said.stdout.strip() == (tunables or str(more.get('GLIBC_TUNABLES')))


@pytest.mark.skipif(
  not host_memory.TRANSPARENT.exists() or '[madvise]' not in host_memory.TRANSPARENT.read_text(),
  reason='this kernel gives huge pages to all, or to nobody',
)
def test_commands_run_with_huge_pages():
  program = (
    'import os, runpy, sys\n'
    'sys.argv = ["diffusion_jax", "--version"]\n'
    'try: runpy.run_module("diffusion_jax", run_name="__main__")\n'
    'finally: print(os.environ["GLIBC_TUNABLES"])\n'
  )
  said = subprocess.run([sys.executable, '-c', program], capture_output=True, text=True,
                        check=True, timeout=60, cwd=ROOT, env=environment())
  assert said.stdout.splitlines()[-1] == 'glibc.malloc.hugetlb=1'


@pytest.mark.parametrize('package', ['numpy', 'jax', 'argparse'])
def test_ctrl_c_during_imports_is_one_sentence(package, tmp_path):
  # The import waits, as one from a slow disk does, and prints what is raised in it, as C may.
  (tmp_path / 'sitecustomize.py').write_text(f"""
import importlib.abc, sys, time, traceback

class Slow(importlib.abc.MetaPathFinder):
  def find_spec(self, name, path=None, target=None):
    if name == {package!r}:
      open({str(tmp_path / 'importing')!r}, 'w').close()
      try:
        time.sleep(60)
      except BaseException as error:
        traceback.print_exc()
        raise ImportError('it did not start') from error

sys.meta_path.insert(0, Slow())
""")
  process = subprocess.Popen(
    [sys.executable, '-m', 'diffusion_jax', 'sample', '--prompt', 'cat', '--out', 'out'],
    cwd=tmp_path, env=environment(PYTHONPATH=f'{tmp_path}{os.pathsep}{ROOT}'), text=True,
    stderr=subprocess.PIPE,
  )
  deadline = time.monotonic() + 60
  while not (tmp_path / 'importing').exists() and time.monotonic() < deadline:
    time.sleep(0.02)
  process.send_signal(signal.SIGINT)
  assert process.communicate(timeout=60)[1] == 'diffusion_jax: interrupted\n'
  assert process.returncode == 130
