"""demo: a page in the browser that draws."""

import argparse
import contextlib
import dataclasses
import threading
from collections.abc import Sequence
from typing import Annotated

from diffusion_jax.cli.options import AdapterOptions, ModelOptions, add_options, read_options
from diffusion_jax.errors import require
from diffusion_jax.limits import MOST_EDGE, Help, Range

HELP = 'a page in the browser that draws'
DESCRIPTION = """Opens a model and serves a page, to this machine alone, that draws: prompts,
sampler, seed, size, a picture to start from and a mask that is painted with a brush. Nothing is
loaded from or sent to another machine. Needs pip install 'diffusion_jax[demo]'.

examples:
  python -m diffusion_jax demo --workdir runs/quickstart
  python -m diffusion_jax demo --model sd15 --lora style.safetensors --port 8000"""

MOST_LETTERS = 2000
"""Of a prompt."""


@dataclasses.dataclass(frozen=True)
class Options:
  """Where the page is served."""

  host: Annotated[str, Help(
    'address to serve at (default: 127.0.0.1, this machine alone); at 0.0.0.0 whoever reaches this '
    'machine may draw', 'HOST'
  )] = '127.0.0.1'
  port: Annotated[int, Range(0, 65535), Help(
    'port to serve at (default: the first free one from 7860 on)', 'N'
  )] = 0


@dataclasses.dataclass(frozen=True)
class Limits:
  """What those who draw may ask for."""

  most_pictures: Annotated[int, Range(1, 64), Help('pictures at a time (default: 4)', 'N')] = 4
  most_edge: Annotated[int, Range(1, MOST_EDGE), Help(
    'pixels of an edge of what is drawn (default: 1024)', 'N'
  )] = 1024
  most_steps: Annotated[int, Range(1, 10_000), Help('sampling steps (default: 100)', 'N')] = 100
  queue: Annotated[int, Range(1, 1000), Help(
    'requests that may wait; more are turned away (default: 8)', 'N'
  )] = 8

  def check(self, prompts: Sequence[str], count: int, steps: int) -> None:
    """Raise UserError for more."""
    for text in prompts:
      require(
        len(text) <= MOST_LETTERS,
        f'the prompt has {len(text):,} letters; give {MOST_LETTERS:,} at most.',
      )
    for name, value, most in (
      ('pictures', count, self.most_pictures), ('steps', steps, self.most_steps)
    ):
      require(1 <= value <= most, f'{name} is {value}; give a number from 1 to {most}.')

  def check_size(self, height: int, width: int, trained: tuple[int, int]) -> None:
    """Raise UserError for more pixels than that, unless the model was trained on as many."""
    most = max(self.most_edge, *trained)
    require(
      max(height, width) <= most,
      f'the size is {height}x{width}; an edge of {most} pixels is the most here.',
    )


OPTIONS = (ModelOptions, AdapterOptions, Options, Limits)


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Model, adapters, address, limits."""
  for cls in OPTIONS:
    add_options(parser, cls)


def run(args: argparse.Namespace) -> int:
  """Serve until Ctrl-C."""
  source, adapters, options, limits = (read_options(cls, args) for cls in OPTIONS)
  from diffusion_jax.demo import check_gradio, launch
  from diffusion_jax.session import Session

  check_gradio()  # Before the model is read.
  session = Session.of(source, adapters)
  how = {'quiet': True, 'prevent_thread_lock': True}
  address = launch(session, options.host, options.port, limits, **how)
  beyond = '' if options.host == '127.0.0.1' else ', open to all that reach this machine'
  print(f'the page is at {address}{beyond}; Ctrl-C ends it', flush=True)
  with contextlib.suppress(KeyboardInterrupt):
    threading.Event().wait()
  return 0
