"""`python -m diffusion_jax COMMAND`, also installed as `diffusion-jax`."""

import gc
import sys
from collections.abc import Sequence

from diffusion_jax.backend.host_memory import ask_for_huge_pages, keep_freed_memory
from diffusion_jax.cli.interrupts import interrupts, say_interrupted


def set_up_process() -> None:
  """Set what has to be set before NumPy and JAX are imported."""
  # Imports and tracing make objects by the hundred thousand and keep them; looking through them for
  # garbage after every 700 takes a tenth of the time to start.
  gc.set_threshold(20_000, 10, 10)
  keep_freed_memory()  # It imports JAX.


def main(argv: Sequence[str] | None = None) -> int:
  """Run one command; return its exit code (2: a mistake in what was given)."""
  try:
    with interrupts():
      from diffusion_jax.cli.main import run

      return run(sys.argv[1:] if argv is None else argv, set_up_process)
  except KeyboardInterrupt:
    return say_interrupted()


def start() -> int:
  """Run `main` in a process of its own, started again where huge pages make it faster."""
  ask_for_huge_pages()
  return main()


if __name__ == '__main__':
  sys.exit(start())
