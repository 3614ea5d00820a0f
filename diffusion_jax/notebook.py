"""Helpers for a notebook: pictures inline, a training that is watched, a box to draw from.

They need IPython, which a notebook has: pip install 'diffusion_jax[notebook]'.
"""

from __future__ import annotations

import html
import importlib
import io
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from diffusion_jax.errors import UserError, require
from diffusion_jax.pixels import to_uint8
from diffusion_jax.session import Session
from diffusion_jax.viz.charts import smooth
from diffusion_jax.viz.grids import framed, make_grid
from diffusion_jax.viz.run_files import MetricsFile, find_grids
from diffusion_jax.viz.scores import metric_title

CELL = 128
"""Pixels that smaller pictures are enlarged to, at least."""
Picture = np.ndarray | Image.Image | str | Path
_SMOOTHING = 0.8
_COLORS = {'train': '#2A8FD0', 'evaluation': '#D55E00'}
_LINES = 15
"""Of what a failed training has said, that an error repeats."""


def show(
  pictures: Picture | Sequence[Picture], captions: str | Sequence[str] | None = None,
  columns: int | None = None, scale: int | None = None,
) -> None:
  """Show pictures inline in one grid, each above its caption.

  Args:
    pictures: one or several: arrays, uint8 or float in [-1, 1], [h w 3] or all as [n h w 3];
      Pillow's pictures; or files.
    captions: as many; None for none.
    columns: of the grid; None for about a square.
    scale: how often pixels are repeated; None to enlarge small pictures to 128 pixels.
  """
  display = _ipython('display').display
  images = framed(as_arrays(pictures))
  captions = [captions] if isinstance(captions, str) else captions
  columns = columns or math.ceil(math.sqrt(len(images)))
  scale = scale or math.ceil(CELL / min(CELL, *images.shape[1:3]))
  display(make_grid(images, columns, captions, scale))


def as_arrays(pictures: Picture | Sequence[Picture]) -> list[np.ndarray]:
  """Return uint8 [h w 3] of each picture, see `show`. UserError for what is none."""
  if isinstance(pictures, (Image.Image, str, Path)) or getattr(pictures, 'ndim', 4) == 3:
    pictures = [pictures]
  require(len(pictures) > 0, 'there are no pictures to show; give one or more.')
  return [_as_array(picture) for picture in pictures]


def _as_array(picture: Picture) -> np.ndarray:
  if isinstance(picture, (str, Path)):
    from diffusion_jax.data.images import read_pixels

    return read_pixels(picture)
  if isinstance(picture, Image.Image):
    return np.asarray(picture.convert('RGB'))
  array = np.asarray(picture)
  if array.ndim != 3 or array.shape[-1] != 3 or array.size == 0:
    raise UserError(
      f'a picture is an array of the shape {list(array.shape)}; give [height, width, 3].'
    )
  if array.dtype == np.uint8:
    return array
  if not np.issubdtype(array.dtype, np.floating) and array.dtype.name != 'bfloat16':
    raise UserError(f'a picture is of {array.dtype}; give uint8, or float in [-1, 1].')
  return to_uint8(array)


def curves(workdir: str | Path, names: Sequence[str] = ('loss',)) -> Image.Image:
  """Return the metrics of a run so far as a picture, a chart for each name; see `watch`."""
  metrics = MetricsFile(Path(workdir) / 'metrics.jsonl')
  metrics.update()
  return _charts(metrics, names)


def watch(
  workdir: str | Path, names: Sequence[str] = ('loss',), *, running: Callable[[], bool],
  seconds: float = 3.0, previews: bool = True,
) -> None:
  """Show curves of a run while `running()`, drawn anew as its metrics.jsonl grows, and its grids.

  Args:
    names: of metrics, such as 'loss' or 'fd_clip', a chart each; those that are not there yet are
      left empty.
    seconds: between two looks at the file.
    previews: also show the last grid of samples.
  """
  display = _ipython('display')
  workdir, shown = Path(workdir), None
  metrics = MetricsFile(workdir / 'metrics.jsonl')
  charts = display.display(display.Markdown('training starts'), display_id=True)
  samples = display.display(display.Markdown(''), display_id=True)
  while True:
    going, before = running(), metrics.latest  # Asked first, so that nothing is missed at the end.
    metrics.update()
    if metrics.latest != before:
      charts.update(_charts(metrics, names))
    grid = (find_grids(workdir / 'samples') or [None])[-1]
    if previews and grid != shown:
      samples.update(Image.open(grid[1]))
      shown = grid
    if not going:
      return
    time.sleep(seconds)


def train(
  config: str | Path, workdir: str | Path, *overrides: str, names: Sequence[str] = ('loss',),
  seconds: float = 3.0,
) -> None:
  """Train in a process of its own, and `watch` it; the same call again goes on from there.

  An interrupt of the notebook lets the training save and end. A TPU is of one process: there, train
  before the notebook itself uses JAX.

  Args:
    config: a file, or a recipe such as 'openmoji/quickstart'.
    overrides: such as 'loop.total_steps=500', for --config.loop.total_steps=500.

  UserError: it failed; with the last lines that it said.
  """
  _ipython('display')
  command = [
    sys.executable, '-m', 'diffusion_jax', 'train', '--config', str(config), '--workdir',
    str(workdir), '--quiet', *(f'--config.{override}' for override in overrides),
  ]
  with tempfile.TemporaryFile() as said:
    # In a session of its own: the notebook's interrupt is passed on once, not twice.
    process = subprocess.Popen(command, stdout=said, stderr=said, start_new_session=True)
    try:
      watch(workdir, names, running=lambda: process.poll() is None, seconds=seconds)
    except BaseException:
      process.send_signal(signal.SIGINT)
      raise
    finally:
      code = process.wait()
      said.seek(0)
      # Of a progress bar only what it has come to.
      ends = [line.rpartition('\r')[2] for line in said.read().decode(errors='replace').split('\n')]
      lines = [line for line in ends if line.strip()][-_LINES:]
  if code:
    raise UserError(f'the training in {workdir} ended with code {code}: {" / ".join(lines)}')
  print('\n'.join(lines))


def command(*arguments: str | Path | float) -> None:
  """Run a command of the package in this process: command('evaluate', 'model', '--out', 'x.json').

  So that one process holds the chip. UserError: it failed; it has said why.
  """
  from diffusion_jax.cli.main import run
  from diffusion_jax.parallel.startup import EXPLICIT, find_cluster

  if find_cluster().kind == 'tpu':  # JAX may be in use already, too late to look for others.
    os.environ |= dict(zip(EXPLICIT, ('localhost:1', '1', '0'), strict=True))
  if code := run([str(argument) for argument in arguments], lambda: None):
    raise UserError(f'the command {arguments[0]} ended with code {code}; see above why.')


def page(path: str | Path, height: int = 700) -> None:
  """Show a page that a command has written, in a frame of that many pixels."""
  text = Path(path).read_text(encoding='utf-8')
  frame = f'<iframe srcdoc="{html.escape(text)}" width="100%" height="{height}"></iframe>'
  _ipython('display').display({
    'text/html': frame, 'text/plain': f'the page {path}; a browser opens it',
  }, raw=True)


def text_box(session: Session | str = '', **settings: Any) -> Callable[..., None]:
  """Show a box for a prompt, with seed and a button that draws it; return what the button does.

  Without ipywidgets there is no box, but what is returned draws as well: draw('red apple', seed=1).

  Args:
    session: an opened model, or the directory of one, or 'asset:NAME', '' for that of the package.
    settings: of `Session.sample`, in place of the model's own.
  """
  _ipython('display')
  session = Session.opened(session)

  def draw(prompt: str, **more: Any) -> None:
    pictures = [image for image, _ in session.sample(prompt, **settings | more)]
    show(pictures, [prompt])

  try:
    import ipywidgets
  except ImportError:
    print("There is no ipywidgets, so draw = text_box(...) shows no box: call draw('red apple').")
    return draw
  _show_box(ipywidgets, draw)
  return draw


def _show_box(ipywidgets: ModuleType, draw: Callable[..., None]) -> None:
  """Show the widgets, whose button draws below them; a mistake is a sentence there."""
  prompt = ipywidgets.Text(description='prompt', placeholder='red apple')
  seed = ipywidgets.BoundedIntText(description='seed', min=0, max=2**31 - 1)
  button, out = ipywidgets.Button(description='draw'), ipywidgets.Output()

  @button.on_click
  def _clicked(_: Any) -> None:
    with out:
      out.clear_output(wait=True)
      try:
        draw(prompt.value, seed=seed.value)
      except UserError as error:
        print(error)

  _ipython('display').display(ipywidgets.VBox([prompt, seed, button, out]))


def _charts(metrics: MetricsFile, names: Sequence[str]) -> Image.Image:
  """Draw each metric over the steps: training faint with its mean strong, evaluations as dots."""
  with matplotlib.rc_context({'font.size': 9, 'text.parse_math': False}):
    figure = Figure(figsize=(4.5 * len(names), 2.6), layout='constrained', dpi=80)
    for name, axes in zip(names, figure.subplots(1, len(names), squeeze=False)[0], strict=True):
      axes.set_title(metric_title(name), loc='left', fontsize=9)
      axes.set_xlabel('step')
      axes.spines[['top', 'right']].set_visible(False)
      for kind, found in (('train', metrics.train), ('evaluation', metrics.evaluation)):
        points = [(step, v) for step, v in found.curve(name).points if v is not None]
        if not points:
          continue
        dots = kind == 'evaluation'
        axes.plot(*zip(*points, strict=True), color=_COLORS[kind], alpha=1 if dots else 0.35,
                  linewidth=1, marker='o' if dots else None, markersize=3)
        if not dots:
          axes.plot(*zip(*smooth(points, _SMOOTHING), strict=True), color=_COLORS[kind])
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
  return Image.open(buffer)


def _ipython(part: str) -> ModuleType:
  """Return a module of IPython. UserError where it is not installed."""
  try:
    return importlib.import_module(f'IPython.{part}')
  except ImportError as error:
    raise UserError(
      "a notebook needs the package IPython; install it with pip install 'diffusion_jax[notebook]'."
    ) from error
