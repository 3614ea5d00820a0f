"""The time that a program takes to compile at the first start, and at the second.

Seconds of repeated work, and what they mean for a device.
"""

import contextlib
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax import monitoring
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import Mesh

from benchmarks.peaks import Peak, peak_of
from diffusion_jax.planning.flops import Flops
from diffusion_jax.train.health import resources

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


def quartiles(seconds: Sequence[float]) -> dict[str, float]:
  """Median and quartiles of times."""
  low, median, high = np.percentile(seconds, (25, 50, 75))
  return {
    'median': round(float(median), 6), 'lower_quartile': round(float(low), 6),
    'upper_quartile': round(float(high), 6),
  }


def repeat(work: Callable[[], Any], warmup: int, count: int) -> tuple[float, list[float]]:
  """(seconds of the first run, seconds of `count` runs after `warmup`); `work` returns arrays."""
  seconds = []
  for _ in range(max(warmup, 1) + count):
    start = time.perf_counter()
    jax.block_until_ready(work())
    seconds.append(time.perf_counter() - start)
  return seconds[0], seconds[-count:]


def utilisation(flops: Flops, seconds: float, mesh: Mesh, dtype: str) -> dict[str, Any]:
  """FLOPs of work on the whole mesh that takes so long, and the share of its devices' peak.

  `uncounted_operations` names what the count could not see into, so that the share is a lower
  bound.
  """
  peak: Peak = peak_of(mesh.devices.flat[0], dtype)
  reached = flops.total / seconds
  found = {
    'flops': flops.total, 'flops_per_second': round(reached),
    'peak_flops_per_second': round(peak.flops * mesh.size), 'peak_source': peak.source,
    'mfu': round(reached / (peak.flops * mesh.size), 4),
  }
  return found | ({'uncounted_operations': sorted(flops.unseen)} if flops.unseen else {})


def peak_memory() -> dict[str, int]:
  """Bytes: of the fullest device where devices tell, and of this process on the host."""
  found = resources()
  names = {'device_memory_peak': 'device_peak_bytes', 'host_memory_peak': 'host_peak_bytes'}
  return {new: int(found[old]) for old, new in names.items() if old in found}


def cpu_cores() -> int:
  """That this process may use."""
  if hasattr(os, 'sched_getaffinity'):
    return len(os.sched_getaffinity(0))
  return os.cpu_count() or 1


def load_average() -> float:
  """The load of the last minute; other programs on the machine make times longer."""
  return round(os.getloadavg()[0], 2) if hasattr(os, 'getloadavg') else 0.0
