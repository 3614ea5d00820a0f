"""report: the page of a run."""

import argparse
import dataclasses
from pathlib import Path
from typing import Annotated

from diffusion_jax.cli.options import add_options, read_options
from diffusion_jax.limits import Help

HELP = "write a run's report.html"
DESCRIPTION = """Writes report.html into a workdir from what the run has logged so far: curves,
grids over time, scores, speed, config and versions, in one self-contained page.

example:
  python -m diffusion_jax report --workdir runs/quickstart"""


@dataclasses.dataclass(frozen=True)
class Options:
  """A run."""

  workdir: Annotated[str, Help('a run of train', 'DIR')]


def add_arguments(parser: argparse.ArgumentParser) -> None:
  add_options(parser, Options)


def run(args: argparse.Namespace) -> int:
  from diffusion_jax.viz.report import write_report

  print(f'written to {write_report(Path(read_options(Options, args).workdir))}')
  return 0
