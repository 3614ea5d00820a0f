"""`python -m diffusion_jax COMMAND`, also installed as `diffusion-jax`."""

import gc
import sys
from collections.abc import Sequence


def set_up_process() -> None:
  """What has to be set before NumPy and JAX are imported."""
  from diffusion_jax.host_memory import keep_freed_memory

  # Imports and tracing make objects by the hundred thousand and keep them; looking through them for
  # garbage after every 700 takes a tenth of the time to start.
  gc.set_threshold(20_000, 10, 10)
  keep_freed_memory()  # It imports JAX.


def main(argv: Sequence[str] | None = None) -> int:
  """Runs one command; returns its exit code (2: a mistake in what was given)."""
  set_up_process()
  from diffusion_jax.cli.main import run

  return run(sys.argv[1:] if argv is None else argv)


if __name__ == '__main__':
  sys.exit(main())
