"""What the C library does with memory that is freed; neither NumPy nor JAX is imported above."""

import ctypes
import os

GLIBC = ((-4, 0), (-1, 2**31 - 1), (-2, 2**26))
"""M_MMAP_MAX: large blocks come from what is free, too. M_TRIM_THRESHOLD: so much of it is kept.
M_TOP_PAD: so much more is asked for at a time (numbers from glibc's malloc.h). Threads keep arenas
of their own: in one for all, a product that packs its operands searches what compiling has left
behind, which doubles a step's time."""


def keep_freed_memory() -> None:
  """Lets the process keep what it frees, for the next step to take, on a machine without a chip.

  To be called before NumPy and JAX start their threads, so before they are imported. XLA for CPUs
  allocates the temporary memory of each run anew; glibc gives large blocks back to the kernel at
  once, which has to clear them again. Programs run on the thread that calls them, not on one of
  XLA's: the arena of a thread holds blocks up to 64 MB, only the first one's larger ones.
  """
  mallopt = getattr(ctypes.CDLL(None), 'mallopt', None)
  if mallopt is None or _has_chip():
    return
  for option, value in GLIBC:
    mallopt(option, value)
  import jax

  jax.config.update('jax_cpu_enable_async_dispatch', False)


def _has_chip() -> bool:
  """Whether this looks like the host of a GPU or TPU; asking JAX would start its threads."""
  asked = os.environ.get('JAX_PLATFORMS')
  devices = ('/dev/nvidia0', '/dev/kfd', '/dev/accel0', '/dev/vfio/0')
  return asked != 'cpu' if asked else any(map(os.path.exists, devices))
