"""report: the page of a run."""

import argparse
from pathlib import Path

HELP = "write a run's report.html"
DESCRIPTION = """Writes report.html into a workdir from what the run has logged so far: curves,
grids over time, scores, speed, config and versions, in one self-contained page.

example:
  python -m diffusion_jax report --workdir runs/quickstart"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
  parser.add_argument('--workdir', required=True, metavar='DIR', help='a run of train')


def run(args: argparse.Namespace) -> int:
  from diffusion_jax.viz.report import write_report

  print(f'written to {write_report(Path(args.workdir))}')
  return 0
