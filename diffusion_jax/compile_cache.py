"""JAX's persistent compilation cache, so that a second start does not compile again."""

import os
from pathlib import Path

import jax


def enable_compile_cache() -> None:
  """Uses $JAX_COMPILATION_CACHE_DIR, else ~/.cache/diffusion_jax/compiled."""
  if not os.environ.get('JAX_COMPILATION_CACHE_DIR'):
    folder = Path.home() / '.cache' / 'diffusion_jax' / 'compiled'
    jax.config.update('jax_compilation_cache_dir', str(folder))
  if not os.environ.get('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'):
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 1.0)
