"""Run a script of this folder as the package runs its commands."""

import argparse
import sys
from collections.abc import Sequence
from types import ModuleType

from diffusion_jax.__main__ import set_up_process
from diffusion_jax.backend.host_memory import ask_for_huge_pages
from diffusion_jax.errors import UserError


def run_command(
  name: str, script: ModuleType, argv: Sequence[str] | None = None, overrides: bool = False
) -> int:
  """Parse the arguments and run the script; return 0, or 2 after a sentence on a mistake.

  Args:
    name: how Python starts it, such as benchmarks.run.
    script: has DESCRIPTION, `add_arguments(parser)` and `run(args)`.
    argv: the arguments; None for those of the process, which is started again where huge pages
      make it faster.
    overrides: keep other arguments, such as --config.KEY=VALUE, as `args.overrides`.
  """
  if argv is None:
    ask_for_huge_pages()
  parser = argparse.ArgumentParser(
    prog=f'python -m {name}', description=script.DESCRIPTION, allow_abbrev=False,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  script.add_arguments(parser)
  args, rest = parser.parse_known_args(argv)
  if stray := [a for a in rest if not (overrides and a.startswith('--config.'))]:
    parser.error(f'there is no option {stray[0]}.')
  args.overrides = rest
  set_up_process()
  try:
    return script.run(args)
  except UserError as error:
    print(f'{name}: {error}', file=sys.stderr)
    return 2
