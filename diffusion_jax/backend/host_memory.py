"""Settings of the C library's allocator, made before NumPy or JAX is imported."""

import contextlib
import ctypes
import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path

TRANSPARENT = Path('/sys/kernel/mm/transparent_hugepage/enabled')
HUGE_PAGES = 'glibc.malloc.hugetlb'
SWITCH = 'DIFFUSION_JAX_HUGE_PAGES'
"""An environment variable: 0 leaves the pages as they are."""

GLIBC = ((-4, 0), (-1, 2**31 - 1), (-2, 2**26))
"""M_MMAP_MAX: large blocks come from what is free, too. M_TRIM_THRESHOLD: so much of it is kept.
M_TOP_PAD: so much more is asked for at a time (numbers from glibc's malloc.h). Threads keep arenas
of their own: in one for all, a product that packs its operands searches what compiling has left
behind, which doubles a step's time."""


def ask_for_huge_pages() -> None:
  """Restart this program once, where that makes the C library ask for huge pages.

  Where the kernel grants them only on request (`madvise`), a process without them spends half of
  its time on small pages. The C library reads the setting as a process starts.
  """
  environment = _with_huge_pages(os.environ, TRANSPARENT, sys.platform)
  if environment is not None and sys.executable and sys.orig_argv:
    # Ctrl-C waits until the program can answer (`cli.interrupts`).
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    with contextlib.suppress(OSError):  # Then it is as before, only slower.
      os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)


def _with_huge_pages(
  environment: Mapping[str, str], transparent: Path, platform: str
) -> dict[str, str] | None:
  """The environment to restart in; None where nothing is gained, or it was done already."""
  tunables = environment.get('GLIBC_TUNABLES', '')
  if platform != 'linux' or environment.get(SWITCH) == '0' or HUGE_PAGES in tunables:
    return None
  try:
    if '[madvise]' not in transparent.read_text(encoding='ascii'):
      return None
  except (OSError, UnicodeError):
    return None
  asked = f'{HUGE_PAGES}=1'
  return {**environment, 'GLIBC_TUNABLES': f'{tunables}:{asked}' if tunables else asked}


def keep_freed_memory() -> None:
  """Let the process keep freed memory for the next step, on a machine without a chip.

  Call it before NumPy and JAX are imported. XLA for CPUs allocates temporary memory anew for each
  run, and glibc returns large blocks to the kernel at once, which clears them again. Programs run
  on the calling thread: only the first thread's arena holds blocks above 64 MB.
  """
  mallopt = getattr(ctypes.CDLL(None), 'mallopt', None)
  if mallopt is None or _has_chip():
    return
  for option, value in GLIBC:
    mallopt(option, value)
  import jax

  jax.config.update('jax_cpu_enable_async_dispatch', False)


def _has_chip() -> bool:
  """Return whether this looks like the host of a GPU or TPU; JAX would start its threads."""
  asked = os.environ.get('JAX_PLATFORMS')
  devices = ('/dev/nvidia0', '/dev/kfd', '/dev/accel0', '/dev/vfio/0')
  return asked != 'cpu' if asked else any(map(os.path.exists, devices))
