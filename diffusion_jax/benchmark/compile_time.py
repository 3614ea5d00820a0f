"""How long a program takes to compile at the first start, and at the second."""

import contextlib
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax import monitoring
from jax.experimental.compilation_cache import compilation_cache

HIT = '/jax/compilation_cache/cache_hits'
SETTINGS = {
  'jax_compilation_cache_dir': '', 'jax_persistent_cache_min_compile_time_secs': 0.0,
  'jax_persistent_cache_min_entry_size_bytes': 0, 'jax_enable_compilation_cache': True,
}


@contextlib.contextmanager
def empty_cache() -> Iterator[None]:
  """Within, JAX's persistent cache is an empty folder, and everything goes into it."""
  before = {name: getattr(jax.config, name) for name in SETTINGS}
  with tempfile.TemporaryDirectory() as folder:
    try:
      for name, value in {**SETTINGS, 'jax_compilation_cache_dir': folder}.items():
        jax.config.update(name, value)
      compilation_cache.reset_cache()
      yield
    finally:
      for name, value in before.items():
        jax.config.update(name, value)
      compilation_cache.reset_cache()


def compile_twice(compile_all: Callable[[], Any]) -> tuple[Any, dict[str, Any]]:
  """(what compile_all returns, seconds of its first and of its second start).

  `compile_all` traces, lowers and compiles. The second time nothing is left of the first but the
  persistent cache, as in a new process; `from_cache` says whether the cache had it.
  """
  hits = []
  heard = lambda event, **more: hits.append(event) if event == HIT else None
  with empty_cache():
    jax.clear_caches()
    first, cold = _timed(compile_all)
    jax.clear_caches()
    monitoring.register_event_listener(heard)
    try:
      _, cached = _timed(compile_all)
    finally:
      monitoring.unregister_event_listener(heard)
  return first, {
    'cold_seconds': round(cold, 2), 'cached_seconds': round(cached, 2), 'from_cache': bool(hits),
  }


def _timed(function: Callable[[], Any]) -> tuple[Any, float]:
  start = time.perf_counter()
  result = function()
  return result, time.perf_counter() - start
