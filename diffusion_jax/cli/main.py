"""The table of commands, and how their errors reach a person."""

import argparse
import contextlib
import sys
from collections.abc import Callable, Sequence

from diffusion_jax import __version__
from diffusion_jax.cli import (
  classify,
  compare,
  configs,
  convert,
  demo,
  evaluate,
  plan,
  prepare,
  report,
  sample,
  search,
  train,
  verify,
)
from diffusion_jax.cli.interrupts import say_interrupted
from diffusion_jax.errors import Diverged, UserError

COMMANDS = {
  'train': train, 'sample': sample, 'evaluate': evaluate, 'report': report, 'compare': compare,
  'verify': verify, 'prepare': prepare, 'convert': convert, 'classify': classify,
  'search': search, 'configs': configs, 'demo': demo, 'plan': plan,
}

CHANGE_CONFIGS = ('train', 'compare', 'prepare', 'plan')
"""Commands that take --config.KEY=VALUE."""


def make_parser() -> argparse.ArgumentParser:
  """Return one parser with a subparser for each command."""
  parser = argparse.ArgumentParser(
    prog='diffusion_jax', allow_abbrev=False,
    description='Train, sample and score text-to-image latent diffusion models in JAX.',
    epilog='Each command explains itself: python -m diffusion_jax COMMAND --help',
  )
  parser.add_argument('--version', action='version', version=f'diffusion_jax {__version__}')
  subparsers = parser.add_subparsers(dest='command', metavar='COMMAND', required=True)
  for name, module in COMMANDS.items():
    sub = subparsers.add_parser(
      name, help=module.HELP, description=module.DESCRIPTION, allow_abbrev=False,
      formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    module.add_arguments(sub)
  return parser


def run(argv: Sequence[str], set_up: Callable[[], None]) -> int:
  """Run a command; 0: done, 2: a mistake in what was given, 1: any other error.

  set_up: prepares the process before heavy imports.
  """
  for stream in (sys.stdout, sys.stderr):
    if hasattr(stream, 'reconfigure'):  # A notebook's has not.
      stream.reconfigure(errors='backslashreplace')  # Names of files need not be text.

  args, rest = make_parser().parse_known_args(argv)
  try:
    if rest and args.command not in CHANGE_CONFIGS:
      raise UserError(
        f'there is no option {rest[0]}; see python -m diffusion_jax {args.command} --help.'
      )
    args.overrides = rest
    with contextlib.ExitStack() as stack:
      if opening := getattr(COMMANDS[args.command], 'opening', None):
        args.start = stack.enter_context(opening(args))
      set_up()
      return COMMANDS[args.command].run(args)
  except UserError as error:
    print(f'diffusion_jax {args.command}: {error}', file=sys.stderr)
    return 2
  except Diverged as error:
    print(f'diffusion_jax {args.command}: {error}', file=sys.stderr)
    return 1
  except KeyboardInterrupt:
    return say_interrupted(args.command)
