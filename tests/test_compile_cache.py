"""Programs of one start of a command are read, not compiled, by the next."""

import jax
import pytest
from jax import monitoring
from jax.experimental.compilation_cache import compilation_cache

from diffusion_jax.benchmark.compile_time import HIT
from tests import tiny

KEYS = ('jax_compilation_cache_dir', 'jax_persistent_cache_min_compile_time_secs')


@pytest.fixture
def home(tmp_path, monkeypatch):
  """A home without anything, where JAX is told nothing of a cache."""
  before = {key: getattr(jax.config, key) for key in KEYS}
  monkeypatch.delenv('JAX_COMPILATION_CACHE_DIR')
  monkeypatch.setenv('HOME', str(tmp_path))
  yield tmp_path
  for key, value in before.items():
    jax.config.update(key, value)
  compilation_cache.reset_cache()


@pytest.mark.parametrize('name', ['draw', 'sample', 'train'])
def test_a_second_start_compiles_nothing(home, name, command, finished):
  toy = tiny.write_config(home / 'toy.py', tiny.toy_config())
  arguments = {
    'draw': ('--what', 'scores'),
    'sample': ('--workdir', finished, '--prompt', 'sun'),
    'train': ('--config', toy, '--quiet'),
  }[name]

  def start(number):
    events = []
    heard = lambda event, **more: events.append(event)
    compilation_cache.reset_cache()
    jax.clear_caches()
    out = '--workdir' if name == 'train' else '--out'
    monitoring.register_event_listener(heard)
    try:
      assert command(name, *arguments, out, home / str(number)) == 0
    finally:
      monitoring.unregister_event_listener(heard)
    return events

  start(1)
  programs = list((home / '.cache' / 'diffusion_jax' / 'compiled').glob('*-cache'))
  assert programs
  again = start(2)
  assert again.count(HIT) >= len(programs)
