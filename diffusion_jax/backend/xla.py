"""JAX's persistent compilation cache, so that a second start does not compile again.

What XLA has to be told on one platform and not on another, with what it gains.
"""

import functools
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from jax import lax
from jax.experimental.xla_metadata import set_xla_metadata


def enable_compile_cache() -> None:
  """Uses $JAX_COMPILATION_CACHE_DIR, else ~/.cache/diffusion_jax/compiled."""
  if not os.environ.get('JAX_COMPILATION_CACHE_DIR'):
    folder = Path.home() / '.cache' / 'diffusion_jax' / 'compiled'
    jax.config.update('jax_compilation_cache_dir', str(folder))
  if not os.environ.get('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'):
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 1.0)


OPTIONS: dict[str, tuple[dict[str, str], ...]] = {
  'cpu': (
    # XLA's own kernels in place of YNNPACK's, where these are the default (jaxlib 0.10): Inception
    # 205 -> 131 ms an image; gradients of convolutions run at twice to three times the speed.
    {'xla_cpu_experimental_ynn_fusion_type': ''},
    # Exponentials and the like at the full width of AVX-512, where there is such: attention takes
    # 0.8 of the time.
    {'xla_cpu_prefer_vector_width': '512'},
    # This pass removes the barriers that keep what is to be computed again from being merged with
    # what was computed before, and with them all savings of rematerialisation.
    {'xla_disable_hlo_passes': 'cse_barrier_expander'},
  ),
}
"""Compiler options by platform. They come and go with versions of XLA, so those of each entry are
tried before they are used."""


def options() -> dict[str, str] | None:
  """Compiler options for programs of the default platform that run often, or are large."""
  return _known(jax.default_backend())


@functools.cache
def _known(platform: str) -> dict[str, str] | None:
  known: dict[str, str] = {}
  for some in OPTIONS.get(platform, ()):
    try:
      jax.jit(lambda: 0, compiler_options=some).lower().compile()
    except jax.errors.JaxRuntimeError:
      continue
    known.update(some)
  return known or None


def jit(function: Callable, **how) -> Callable:
  """jax.jit with `options`, or without them within another program; `how` is for jax.jit."""
  alone, within = jax.jit(function, compiler_options=options(), **how), jax.jit(function, **how)

  @functools.wraps(function)
  def call(*args):
    traced = any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(args))
    return (within if traced else alone)(*args)

  call.lower, call.trace = alone.lower, alone.trace
  return call


def jitted(**how) -> Callable[[Callable], Callable]:
  """`jit` as a decorator of what is defined before the platform is known."""
  def decorate(function: Callable) -> Callable:
    made = functools.cache(lambda: jit(function, **how))
    return functools.wraps(function)(lambda *args: made()(*args))

  return decorate


def settled(tree: Any) -> Any:
  """The tree, whose arrays are computed before whatever depends on them.

  XLA for CPUs makes one kernel for each result and computes within it, again, what other kernels
  compute as well; what it reads for that can then not be overwritten in place. On other platforms
  one kernel makes several results, which this would take apart.
  """
  return lax.optimization_barrier(tree) if jax.default_backend() == 'cpu' else tree


def apart(function: Callable) -> Callable:
  """The function as a part of its own of the program that calls it, where that makes loading quick.

  When it loads a program, XLA for CPUs compares each of its kernels with each other; kernels of two
  parts it does not compare, nor does it merge them. The first of the results must be computed, not
  one of the arguments.
  """
  inner = jax.jit(function)

  @functools.wraps(function)
  def call(*args):
    if jax.default_backend() != 'cpu':
      return function(*args)
    leaves, structure = jax.tree.flatten(inner(*args))
    # What is said of a result is noted at the call that it comes from.
    leaves[0] = set_xla_metadata(leaves[0], inlineable='false')
    return jax.tree.unflatten(structure, leaves)

  return call


Capability = tuple[int, int] | None
"""Of an NVIDIA GPU, such as (9, 0); None for all else."""


def chip() -> tuple[str, Capability]:
  """(platform, compute capability) of what programs are for."""
  device = jax.local_devices()[0]
  # An AMD GPU has a name in its place.
  found = re.fullmatch(r'(\d+)\.(\d+)', str(getattr(device, 'compute_capability', '')))
  return device.platform, (int(found[1]), int(found[2])) if found else None
