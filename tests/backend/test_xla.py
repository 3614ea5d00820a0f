"""Options of XLA that this version does not know are left out.

Programs of one start of a command are read, not compiled, by the next.
"""

import jax
import jax.numpy as jnp
import pytest
from jax import monitoring
from jax.experimental.compilation_cache import compilation_cache

from benchmarks.timing import HIT
from diffusion_jax.backend import xla
from tests import tiny


@pytest.fixture
def forget():
  """Options are looked up anew, before and after."""
  xla._known.cache_clear()
  yield
  xla._known.cache_clear()


def test_known_options_are_used_and_unknown_ones_left_out(forget, monkeypatch):
  known = {'xla_cpu_prefer_vector_width': '256'}
  monkeypatch.setitem(xla.OPTIONS, 'cpu', ({'xla_cpu_no_such_option': '1'}, known))
  assert xla.options('cpu') == known and xla.options('tpu') is None
  add = xla.jit(lambda x: x + 1)
  assert add(1) == 2 and xla.jitted()(lambda x: x - 1)(1) == 0
  # A program within another has the options of that one.
  assert jax.jit(lambda x: 2 * add(x))(1) == 4 and xla.jit(add)(1) == 2


def test_a_separate_part_computes_the_same():
  part = lambda x, y: {'sum': x + y, 'same': y}
  out = jax.jit(lambda x: xla.separate(part)(jnp.sin(x), x))(2.0)
  assert out['sum'] == jnp.sin(2.0) + 2.0 and out['same'] == 2.0


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


@pytest.mark.parametrize('name', ['sample', 'train'])
def test_a_second_start_compiles_nothing(home, name, command, finished):
  toy = tiny.write_config(home / 'toy.py', tiny.toy_config())
  arguments = {
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
