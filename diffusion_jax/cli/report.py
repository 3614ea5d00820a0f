"""report: the page of a run, of two side by side, or of one that goes on."""

import argparse
import dataclasses
from pathlib import Path
from typing import Annotated

from diffusion_jax.cli.options import add_options, read_options
from diffusion_jax.errors import UserError
from diffusion_jax.limits import Help, Range

HELP = "write a run's page, compare two runs, or watch one live"
DESCRIPTION = """Writes report.html into a workdir from what the run has logged so far: what it
trains and how good it is, pictures of all steps, curves, scores, speed, config and versions, in one
self-contained page.

With --compare it writes comparison.html instead: two runs side by side, with the settings that
differ; the command compare tells whether a difference is more than chance. With --serve it writes
nothing, and shows the page at http://127.0.0.1:6007, to this machine alone, where it follows a run
that goes on, or has yet to begin.

examples:
  python -m diffusion_jax report --workdir runs/quickstart
  python -m diffusion_jax report --workdir runs/quickstart --compare runs/other
  python -m diffusion_jax report --workdir runs/quickstart --serve"""
PORT = 6007
"""Beside TensorBoard's."""


@dataclasses.dataclass(frozen=True)
class Options:
  """A run, and what to show of it."""

  workdir: Annotated[str, Help('a run of train', 'DIR')]
  compare: Annotated[str, Help('another run, to show beside it', 'DIR')] = ''
  serve: Annotated[bool, Help('show the page on this machine, following the run')] = False
  port: Annotated[int | None, Range(0, 65535), Help(
    f'with --serve, its port; 0 takes a free one (default: {PORT})', 'N'
  )] = None

  def __post_init__(self):
    if self.compare and self.serve:
      raise UserError('--compare writes a page and --serve writes none; give one of them.')
    if self.port is not None and not self.serve:
      raise UserError('--port is for --serve; give both.')


def add_arguments(parser: argparse.ArgumentParser) -> None:
  add_options(parser, Options)


def run(args: argparse.Namespace) -> int:
  options = read_options(Options, args)
  if options.serve:
    return _serve(options)
  if options.compare:
    print(f'written to {_compare(options)}')
    return 0
  from diffusion_jax.viz.report import write_report

  print(f'written to {write_report(Path(options.workdir))}')
  return 0


def _compare(options: Options) -> Path:
  from diffusion_jax.files import atomic_write
  from diffusion_jax.viz.compare import comparison_page

  text = comparison_page([Path(options.workdir), Path(options.compare)])
  path = Path(options.workdir) / 'comparison.html'
  with atomic_write(path) as file:
    file.write(text.encode(errors='replace'))
  return path


def _serve(options: Options) -> int:
  """Serve until the keyboard ends it."""
  from diffusion_jax.viz.serve import ADDRESS, make_server

  port = PORT if options.port is None else options.port
  with make_server(Path(options.workdir), port) as server:
    print(f'http://{ADDRESS}:{server.server_port} follows {options.workdir}; Ctrl-C ends it',
          flush=True)
    try:
      server.serve_forever()
    except KeyboardInterrupt:
      return 0
  return 0
