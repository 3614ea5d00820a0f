"""Eight simulated devices, one compile cache for all processes, and tiny parts that tests share."""

# ruff: noqa: E402
import os
import sys
import tempfile

# Before JAX is imported, and inherited by subprocesses and by the workers of pytest-xdist.
OWN_CACHE = 'DIFFUSION_JAX_TEST_CACHE' not in os.environ
if OWN_CACHE:
  os.environ['DIFFUSION_JAX_TEST_CACHE'] = tempfile.mkdtemp(prefix='diffusion_jax_tests_')
os.environ['JAX_COMPILATION_CACHE_DIR'] = os.environ['DIFFUSION_JAX_TEST_CACHE']
os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0'
os.environ['JAX_PLATFORMS'] = 'cpu'
# Read when a process starts: by workers and subprocesses, not by this one.
os.environ.setdefault('GLIBC_TUNABLES', 'glibc.malloc.hugetlb=1')
# Two workers on two cores: threads of BLAS that wait for each other there burn forty times the time
# of the work itself.
os.environ.setdefault('OPENBLAS_NUM_THREADS', '1')
os.environ.setdefault('OMP_NUM_THREADS', '1')
# Where in the sources each operation comes from is looked up for nobody.
os.environ['JAX_TRACEBACK_IN_LOCATIONS_LIMIT'] = '0'
# Else each of many subprocesses would compile the sources of the package again, for a second.
os.environ.pop('PYTHONDONTWRITEBYTECODE', None)
sys.dont_write_bytecode = False
# Compiling takes most of the time of tests with tiny networks: quickly, then, rather than well.
# The fusion emitters alone make it 2.5 times as long for the gradient of a tiny U-Net.
QUICK = (
  '--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true '
  '--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1'
)
os.environ['XLA_FLAGS'] = f'{QUICK} --xla_force_host_platform_device_count=8'

import contextlib
import dataclasses
import fcntl
import gc
import shutil
import signal
import threading
from pathlib import Path

import jax
import numpy as np
import pytest
from jax._src.interpreters import mlir

from tests import tiny

# Tracing makes objects by the hundred thousand and keeps them; looking through them for garbage
# after every 700 takes a tenth of its time.
gc.set_threshold(50_000, 20, 50)

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # As in the background of a shell script.
  signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_unconfigure(config):
  if OWN_CACHE:
    shutil.rmtree(os.environ['DIFFUSION_JAX_TEST_CACHE'], ignore_errors=True)


def pytest_collection_finish(session):
  """What was imported stays to the end: no later look for garbage goes through it again."""
  gc.collect()
  gc.freeze()


class Dialects(threading.local):
  """A context of MLIR that is made once for many programs of a thread.

  JAX makes one for each, which takes a quarter of the time of a tiny program. Constants stay in it,
  so that it is not kept for long.
  """

  left = 0

  def __init__(self, make):
    self.make = make

  def __call__(self):
    if not self.left:
      self.context, self.left = self.make(), 200
    self.left -= 1
    return self.context


if hasattr(mlir, 'make_ir_context'):  # Within JAX, where it may change.
  mlir.make_ir_context = Dialects(mlir.make_ir_context)


MOST_MEMORY = 4 * 2**30
"""Bytes of a worker beyond which it forgets its compiled programs: two workers, and the processes
that tests start, share a small machine."""


@pytest.fixture(autouse=True, scope='module')
def bounded_memory():
  yield
  pages = int(Path('/proc/self/statm').read_text().split()[1]) if sys.platform == 'linux' else 0
  if pages * os.sysconf('SC_PAGE_SIZE') > MOST_MEMORY:
    jax.clear_caches()
    gc.collect()


@pytest.fixture(scope='session')
def once(tmp_path_factory):
  """once(name, make): the folder that make(folder) filled, made by one worker for all of them."""
  base = tmp_path_factory.getbasetemp()
  shared = base.parent if 'PYTEST_XDIST_WORKER' in os.environ else base

  def run(name, make):
    folder, done = shared / name, shared / f'{name}.done'
    with (shared / f'{name}.lock').open('w') as lock:
      fcntl.flock(lock, fcntl.LOCK_EX)
      if not done.exists():
        folder.mkdir(exist_ok=True)
        make(folder)
        done.touch()
    return folder

  return run


@pytest.fixture(scope='session')
def small_data(once):
  """Root of a data set of a few hundred OpenMoji at 32 px; $DIFFUSION_JAX_DATA points to it."""

  root = str(once('small_data', lambda folder: tiny.prepare_emoji(folder, tiny.SIZE)))
  os.environ['DIFFUSION_JAX_DATA'] = root
  return root


@pytest.fixture(scope='session')
def sources(small_data):
  """(train, test) of the small data set."""
  from diffusion_jax.data.sources.tfds import open_source

  return tuple(
    open_source('openmoji', split, size=tiny.SIZE, data_dir=small_data)
    for split in ('train', 'test')
  )


@pytest.fixture(scope='session')
def parts(once, sources):
  """{'autoencoder': DIR, 'clip': DIR}: frozen parts with random weights and a real tokenizer."""

  def make(folder):
    from diffusion_jax.formats.networks import save_params
    from diffusion_jax.models.autoencoder import AutoencoderKL
    from diffusion_jax.models.network import Network
    from diffusion_jax.models.text.clip import CLIP
    from diffusion_jax.models.text.tokenizer import save_tokenizer, train_tokenizer

    captions = [caption for record in sources[0] for caption in record['captions']]
    tokenizer = train_tokenizer(captions, tiny.CLIP.text_config.vocab_size, tiny.LENGTH)
    assert len(tokenizer) == tiny.CLIP.text_config.vocab_size
    for name, module, config in (
      ('autoencoder', AutoencoderKL, tiny.AUTOENCODER), ('clip', CLIP, tiny.CLIP)
    ):
      params = jax.jit(Network.of(module, config).initialize)(jax.random.key(7))
      save_params(folder / name, config, jax.tree.map(np.asarray, params))
    save_tokenizer(tokenizer, folder / 'clip')

  folder = once('parts', make)
  return {name: str(folder / name) for name in ('autoencoder', 'clip')}


@pytest.fixture(scope='session')
def t5(once, sources):
  """The directory of a T5 with random weights, and a vocabulary of the captions."""

  def make(folder):
    from diffusion_jax.formats.networks import save_params
    from diffusion_jax.models.network import Network
    from diffusion_jax.models.text.t5 import T5EncoderModel
    from diffusion_jax.models.text.tokenizer import save_tokenizer, train_unigram

    captions = [caption for record in sources[0] for caption in record['captions']]
    tokenizer = train_unigram(captions, 420)
    config = dataclasses.replace(tiny.T5, vocab_size=len(tokenizer))
    params = jax.jit(Network.of(T5EncoderModel, config).initialize)(jax.random.key(8))
    save_params(folder, config, jax.tree.map(np.asarray, params))
    save_tokenizer(tokenizer, folder)

  return str(once('t5', make))


@pytest.fixture(scope='session')
def command():
  """command(*arguments, devices=1): one command in this process; its exit code.

  A random key that is used twice ends it.
  """

  def run(*arguments, devices=1):
    from diffusion_jax.__main__ import main

    with tiny.few_devices(devices), jax.debug_key_reuse(True):
      return main([str(argument) for argument in arguments])

  return run


@pytest.fixture(scope='session')
def trained(once, parts, command):
  """trained(task): workdir of a run of four steps that has finished, scored on the way."""

  def run(task):
    loop = {'sample_every_steps': 2, 'evaluate_every_steps': 2}
    values = {
      'autoencoder': tiny.autoencoder_config, 'clip': tiny.clip_config,
      'diffusion': lambda loop: tiny.diffusion_config(
        parts, loop={**loop, 'evaluate_seconds': 600.0}
      ),
    }[task](loop=loop)

    def make(folder):
      config = tiny.write_config(folder / 'recipe.py', values)
      run = folder / 'run'
      assert command('train', '--config', config, '--workdir', run, '--quiet') == 0

    return once(f'trained_{task}', make) / 'run'

  return run


@pytest.fixture(scope='session')
def finished(trained):
  """Workdir of a finished diffusion run; its config is recipe.py beside it."""
  return trained('diffusion')


@pytest.fixture
def copy_of(tmp_path):
  """copy_of(workdir): a copy that a test may damage."""

  def copy(workdir: Path) -> Path:
    return Path(shutil.copytree(workdir, tmp_path / 'copy'))

  return copy


@pytest.fixture
def fails(capsys):
  """fails(*arguments): asserts exit code 2 and one sentence on stderr, which it returns."""

  def run(*arguments):
    from diffusion_jax.__main__ import main

    capsys.readouterr()
    code = None
    with contextlib.suppress(SystemExit):
      code = main([str(argument) for argument in arguments])
    err = capsys.readouterr().err
    assert code == 2, err
    # A progress bar wipes its line and leaves no trace on a terminal.
    lines = [line.rpartition('\r')[2] for line in err.split('\n') if line.strip()]
    assert len(lines) == 1 and lines[0].startswith('diffusion_jax '), err
    assert 'Traceback' not in err
    return lines[0]

  return run


@pytest.fixture(scope='module')
def browser():
  """A headless Chromium, the system's or Playwright's own."""
  sync_api = pytest.importorskip('playwright.sync_api')
  path = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))),
              None)
  with sync_api.sync_playwright() as playwright:
    if path is None and not os.path.exists(playwright.chromium.executable_path):
      pytest.skip('there is no Chromium here: install chromium, or playwright install chromium')
    opened = playwright.chromium.launch(executable_path=path, args=['--no-sandbox'])
    yield opened
    opened.close()
