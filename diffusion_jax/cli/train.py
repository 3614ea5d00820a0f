"""train: a config and a workdir."""

import argparse
import dataclasses
from typing import Annotated

from diffusion_jax.cli.options import add_options, check_overrides, read_options
from diffusion_jax.limits import Help
from diffusion_jax.parallel.startup import find_cluster
from diffusion_jax.runs.start import Start

HELP = 'train or fine-tune a diffusion model, autoencoder, CLIP, classifier or toy'
DESCRIPTION = """Trains what the config describes. Running the same command again goes on from the
last checkpoint in the workdir. Ctrl-C saves first; a second Ctrl-C leaves at once.

Any key of the config can be changed: --config.loop.batch_size=32
--config.optimizer.learning_rate=3e-4 --config.dtype=bfloat16

example:
  python -m diffusion_jax train --config configs/openmoji/quickstart.py --workdir runs/quickstart"""


@dataclasses.dataclass(frozen=True)
class Options:
  """A config and a workdir."""

  config: Annotated[str, Help(
    'config file to run, or the name of a recipe of the package, such as openmoji/quickstart; '
    'configs lists them', 'FILE'
  )]
  workdir: Annotated[str, Help(
    'where config, checkpoints, metrics, grids, report and model go', 'DIR'
  )]
  quiet: Annotated[bool, Help('no progress bar, only the paths of results')] = False


def add_arguments(parser: argparse.ArgumentParser) -> None:
  add_options(parser, Options)
  parser.add_argument('--config.KEY', dest='example', metavar='VALUE',
                      help='change any key of the config; repeat for several')


def opening(args: argparse.Namespace) -> Start:
  """Take the workdir before heavy imports, so that a kill at any time leaves a status there.

  UserError: the workdir cannot be used, or another run holds it.
  """
  check_overrides(args)
  cluster = find_cluster()
  start = Start(args.workdir)
  if cluster.processes:  # Else only the TPU's own service knows how many there are.
    start.open(cluster.index, cluster.processes)
  return start


def run(args: argparse.Namespace) -> int:
  from diffusion_jax.backend.xla import enable_compile_cache
  from diffusion_jax.build import build
  from diffusion_jax.parallel.startup import start_distributed
  from diffusion_jax.recipe import load_config
  from diffusion_jax.train.loop import train

  enable_compile_cache()
  start_distributed()
  args.start.join()
  options = read_options(Options, args)
  config = load_config(options.config, args.overrides)
  training = build(config, options.workdir, report=args.start.report)
  return train(training, progress=not options.quiet, start=args.start)
