"""The device that a program is compiled for, and XLA's options there.

Devices are those of the mesh in force (`jax.set_mesh`), or else of the arguments (`jit`), and only
then this process's default: programs can be compiled for chips that are not here.
"""

import contextlib
import functools
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax import lax
from jax.experimental.xla_metadata import set_xla_metadata
from jax.sharding import AbstractDevice, AbstractMesh, Mesh

Capability = tuple[int, int] | None
"""Compute capability of an NVIDIA GPU, such as (9, 0); None for other devices."""

GPUS = (
  (r'B[23]00', (10, 0)), (r'H[128]00|H20\b|GH200', (9, 0)), (r'L4\b|L40|RTX 40|Ada', (8, 9)),
  (r'A10\b|A40\b|A16|RTX 30|RTX A', (8, 6)), (r'A[138]00?\b', (8, 0)), (r'T4\b|RTX 20', (7, 5)),
  (r'V100', (7, 0)),
)
"""Compute capabilities by the name of a GPU that is not here."""

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

DETERMINISTIC: dict[str, dict[str, bool]] = {
  # Without kernels that add in any order, and without timing kernels against each other to choose.
  'gpu': {'xla_gpu_deterministic_ops': True},
}
"""Options by platform with which a program gives the same bits each time; others always do."""
_is_deterministic = False


def use_deterministic(on: bool) -> None:
  """Compile programs of `jit` from now on with the options of `DETERMINISTIC`, or without."""
  global _is_deterministic
  _is_deterministic = on


def enable_compile_cache() -> None:
  """Keep compiled programs in $JAX_COMPILATION_CACHE_DIR, else ~/.cache/diffusion_jax/compiled."""
  if not os.environ.get('JAX_COMPILATION_CACHE_DIR'):
    folder = Path.home() / '.cache' / 'diffusion_jax' / 'compiled'
    jax.config.update('jax_compilation_cache_dir', str(folder))
  if not os.environ.get('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'):
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 1.0)


class Chip(NamedTuple):
  """A kind of device: 'cpu', 'gpu' or 'tpu', and an NVIDIA GPU's compute capability."""

  platform: str
  capability: Capability = None


def chip(mesh: Mesh | AbstractMesh | None = None) -> Chip:
  """Return what programs of a mesh run on; None: of the mesh in force, see above."""
  mesh = jax.sharding.get_abstract_mesh() if mesh is None else mesh
  device = (mesh.abstract_mesh if isinstance(mesh, Mesh) else mesh).abstract_device
  return _chip(device.platform, device.device_kind) if device else _default()


def on_cpu() -> bool:
  """Return whether programs of the mesh in force run on CPUs."""
  return chip().platform == 'cpu'


def _default() -> Chip:
  device = jax.config.jax_default_device or jax.default_backend()
  platform = device if isinstance(device, str) else device.platform
  return Chip(platform) if platform in ('cpu', 'tpu') else _chip(
    platform, jax.local_devices(backend=platform)[0].device_kind
  )


@functools.cache
def _chip(platform: str, kind: str) -> Chip:
  if platform not in ('gpu', 'cuda', 'rocm'):
    return Chip(platform)
  here = [device for device in jax.local_devices() if device.device_kind == kind]
  if here:  # An AMD GPU has a name in this place.
    found = re.fullmatch(r'(\d+)\.(\d+)', str(getattr(here[0], 'compute_capability', '')))
    return Chip('gpu', (int(found[1]), int(found[2])) if found else None)
  return Chip('gpu', next((able for names, able in GPUS if re.search(names, kind)), None))


def options(platform: str) -> dict[str, str | bool] | None:
  """Return compiler options for programs of that platform that run often, or are large."""
  # An unknown one of these is an error: it is asked for, and must not be left out in silence.
  asked = DETERMINISTIC.get(platform, {}) if _is_deterministic else {}
  return {**_known_options(platform), **asked} or None


@functools.cache
def _known_options(platform: str) -> dict[str, str]:
  known: dict[str, str] = {}
  for some in OPTIONS.get(platform, ()):
    try:
      with jax.default_device(jax.local_devices(backend=platform)[0]):
        jax.jit(lambda: 0, compiler_options=some).lower().compile()
    except (RuntimeError, jax.errors.JaxRuntimeError):
      continue
    known.update(some)
  return known


def jit(function: Callable, **how) -> Callable:
  """jax.jit of a function of positional arguments, compiled with `options`; `how` is for jax.jit.

  The devices are the mesh's in force, or else the arguments'. Within another program its options
  hold.
  """
  within = jax.jit(function, **how)
  alone = functools.cache(
    lambda platform: jax.jit(function, compiler_options=options(platform), **how)
  )

  def there(method: str, *args):
    with _for_devices_of(args):
      return getattr(alone(chip().platform), method)(*args)

  @functools.wraps(function)
  def call(*args):
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(args)):
      return within(*args)
    return there('__call__', *args)

  call.lower, call.trace = functools.partial(there, 'lower'), functools.partial(there, 'trace')
  return call


def _for_devices_of(args: Any) -> contextlib.AbstractContextManager:
  """A context with a mesh without axes, of the devices that hold the arguments."""
  if jax.sharding.get_abstract_mesh().abstract_device is not None:
    return contextlib.nullcontext()
  found = (getattr(leaf, 'sharding', None) for leaf in jax.tree.leaves(args))
  sharding = next((sharding for sharding in found if sharding is not None), None)
  if sharding is None:
    return contextlib.nullcontext()
  if isinstance(mesh := getattr(sharding, 'mesh', None), AbstractMesh):
    device = mesh.abstract_device
  else:
    device = min(sharding.device_set, key=lambda device: device.id)
  if device is None:
    return contextlib.nullcontext()
  return jax.sharding.use_abstract_mesh(_without_axes(device.platform, device.device_kind))


@functools.cache
def _without_axes(platform: str, kind: str) -> AbstractMesh:
  return AbstractMesh((), (), axis_types=(), abstract_device=AbstractDevice(kind, None, platform))


def block_on_cpu(results: Any) -> None:
  """Wait for a program's results on CPUs: one called meanwhile would allocate on another thread."""
  if on_cpu():
    jax.block_until_ready(results)


def optimization_barrier(tree: Any) -> Any:
  """The tree, its arrays computed before whatever depends on them, on CPUs.

  XLA for CPUs makes one kernel for each result, recomputes shared parts in each, and keeps what it
  reads for that from being overwritten in place. Other platforms make several results in one
  kernel.
  """
  return lax.optimization_barrier(tree) if on_cpu() else tree


def separate(function: Callable) -> Callable:
  """The function as a separate part of the program that calls it, on CPUs.

  XLA for CPUs compares all kernels of a part with each other as it loads a program, and merges them
  only there. The first result must be computed, not an argument.
  """
  inner = jax.jit(function)

  @functools.wraps(function)
  def call(*args):
    if not on_cpu():
      return function(*args)
    leaves, structure = jax.tree.flatten(inner(*args))
    # What is said of a result is noted at the call that it comes from.
    leaves[0] = set_xla_metadata(leaves[0], inlineable='false')
    return jax.tree.unflatten(structure, leaves)

  return call
