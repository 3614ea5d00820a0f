"""sample: prompts to PNGs."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from diffusion_jax import __version__
from diffusion_jax.cli.options import (
  add_adapter_arguments,
  add_model_arguments,
  add_sample_arguments,
  load,
  named_adapters,
  with_adapters,
)
from diffusion_jax.errors import UserError

if TYPE_CHECKING:
  import numpy as np

HELP = 'draw pictures for prompts'
DESCRIPTION = """Draws one picture for each prompt, as PNG with the prompt and all settings in its
metadata, and one grid of the first 256. The same seed gives the same pictures, but for what
--batch says of rounding. An empty prompt draws without condition.

examples:
  python -m diffusion_jax sample --prompt 'grinning cat' --prompt 'red apple' --out pictures
  python -m diffusion_jax sample --prompt 'blue car' --image car.png --strength 0.6 --out new"""


STRENGTH = 0.8
NEEDED = {'strength': 'image', 'control_strength': 'control', 'noise_level': 'small'}
"""Numbers that mean nothing without a picture."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Model, prompts, settings."""
  add_model_arguments(parser)
  parser.add_argument('--prompt', action='append', default=[], metavar='TEXT',
                      help='what to draw; repeat for several pictures. An empty one draws '
                      'without condition')
  parser.add_argument('--prompts', metavar='FILE',
                      help='a text file with one prompt a line; blank lines are passed over')
  parser.add_argument('--negative', default='', metavar='TEXT',
                      help='what not to draw (default: nothing)')
  parser.add_argument('--out', required=True, metavar='DIR', help='where the pictures go')
  add_adapter_arguments(parser)
  add_picture_arguments(parser)
  add_sample_arguments(parser)


def read_prompts(args: argparse.Namespace) -> list[str]:
  """All prompts, checked.

  An empty one draws without condition; in a file blank lines only divide others.

  Raises:
    UserError: no prompt, or a file that cannot be read.
  """
  prompts = list(args.prompt)
  if args.prompts:
    from diffusion_jax.data.captions import read_lines

    prompts += read_lines(args.prompts, 'prompts file')
  if not prompts:
    raise UserError(
      "there is no prompt; give --prompt TEXT (--prompt '' draws without one) or --prompts FILE."
    )
  return prompts


def add_picture_arguments(parser: argparse.ArgumentParser) -> None:
  """What a model may be shown beside the prompt."""
  group = parser.add_argument_group(
    'pictures; the central square is taken, of all that are given at the same place'
  )
  group.add_argument('--image', metavar='FILE', help='a picture to start from, repaint or edit')
  group.add_argument('--strength', type=float, metavar='S',
                     help='with --image: share of the steps that are taken, up to 1; 1 keeps '
                     f'least of the picture (default: {STRENGTH}; 1 where the model is shown it)')
  group.add_argument('--mask', metavar='FILE',
                     help='for an inpainting model: white where to paint; laid over the image '
                     'whatever its size, and what is transparent is not painted')
  group.add_argument('--control', metavar='FILE', help='what a ControlNet sees')
  group.add_argument('--control_strength', type=float, metavar='S',
                     help='share of what the ControlNet adds (default: 1)')
  group.add_argument('--depth', metavar='FILE', help='for a depth model: white is near')
  group.add_argument('--small', metavar='FILE', help='for an upscaler: a picture to enlarge')
  group.add_argument('--reference', metavar='FILE',
                     help='for a model that varies a picture; the prompt then only names the file')
  group.add_argument('--noise_level', type=int, metavar='N',
                     help='noise put on the small picture, 0 to 350 (default: 20)')


def read_inputs(args: argparse.Namespace, model, steps: int) -> tuple:
  """(`Inputs`, metadata) of the pictures that were given.

  Raises:
    UserError: an image that cannot be read, or a strength that is none.
  """
  from diffusion_jax.pipelines.conditions import Inputs, read_pictures

  for name, needed in NEEDED.items():
    if getattr(args, name) is not None and getattr(args, needed) is None:
      raise UserError(f'--{name} needs a picture; give --{needed} FILE, too.')
  strength = args.strength
  if strength is not None and (not 0 < strength <= 1 or round(strength * steps) < 1):
    raise UserError(
      f'--strength {strength:g} leaves no step of {steps}; choose a share up to 1.'
    )
  edge = max(model.trained_size)
  latent = max(model.space.shape(edge, edge)[:2])
  seen = model.conditioners['text'].pictures(model.space, edge, edge).get('reference')
  edges = {'image': edge, 'mask': edge, 'control': edge, 'depth': latent, 'small': latent,
           'reference': seen[0][0] if seen else 0}
  given = {name: getattr(args, name) for name in edges if getattr(args, name)}
  if 'reference' in given and not edges['reference']:
    raise UserError('the model varies no picture; leave --reference out, or use a model that does.')
  pictures, notes = read_pictures(given, edges)
  for note in notes:
    print(f'note: {note}')
  numbers = {name: getattr(args, name) for name in NEEDED if getattr(args, name) is not None}
  inputs = Inputs(**pictures, **numbers)
  inputs.rows(model, 1, edge, edge)  # So that what does not fit is said before anything is drawn.
  if 'image' in given and inputs.fraction(model) < 1:
    numbers['strength'] = inputs.fraction(model)
  return inputs, given | {name: f'{value:g}' for name, value in numbers.items()}


def file_name(index: int, prompt: str) -> str:
  """'0003_red_apple.png'."""
  return f'{index:04d}_{re.sub(r"[^a-z0-9]+", "_", prompt.lower()).strip("_")[:60]}.png'


def write(
  out: Path, batches: Iterable[np.ndarray], prompts: Sequence[str], settings: dict[str, str]
) -> str:
  """Writes each picture as it comes, then the grid; returns what to tell people.

  Args:
    batches: uint8 [b h w 3], of all prompts in their order.
  """
  from PIL import Image
  from tqdm import tqdm

  from diffusion_jax.viz.grids import MOST, Overview, save_png

  overview, shown = Overview(len(prompts)), prompts[:MOST]
  images = (image for batch in batches for image in batch)
  with tqdm(total=len(prompts), desc='drawing', unit='img', leave=False) as bar:
    for index, image in enumerate(images):
      metadata = {'prompt': prompts[index], 'index': str(index), **settings}
      save_png(Image.fromarray(image), out / file_name(index, prompts[index]), metadata)
      overview.add(image)
      bar.update()
  save_png(overview.grid(shown), out / 'grid.png', {'prompts': '\n'.join(shown), **settings})
  more = len(prompts) - len(shown)
  left_out = f'; grid.png shows the first {len(shown)} and leaves out {more:,}' * bool(more)
  return f'{len(prompts)} pictures and grid.png are in {out}{left_out}'


def run(args: argparse.Namespace) -> int:
  """Draws and writes."""
  prompts = read_prompts(args)
  from diffusion_jax.backend.xla import enable_compile_cache
  from diffusion_jax.parallel.mesh import MeshConfig, make_mesh

  enable_compile_cache()
  out = Path(args.out)
  if out.exists() and not out.is_dir():
    raise UserError(f'--out {out} is a file; choose a directory.')
  mesh = make_mesh(MeshConfig())
  model, weights, sample, name = load(args, mesh)
  model, weights = with_adapters(model, weights, args)
  model.check_prompts([*prompts, args.negative])
  inputs, started = read_inputs(args, model, sample.steps)
  settings = {
    'negative': args.negative, **sample.in_force(), **started, **named_adapters(args),
    'seed': str(args.seed), 'model': name, 'software': f'diffusion_jax {__version__}',
  }
  batches = model.generate(
    model.on_mesh(weights, mesh), prompts, sample, seed=args.seed, mesh=mesh,
    negative=args.negative, batch_size=min(args.batch, len(prompts)), inputs=inputs,
  )
  try:
    out.mkdir(parents=True, exist_ok=True)
    print(write(out, batches, prompts, settings))
  except OSError as error:
    raise UserError(f'--out {out} cannot be written to ({error}).') from error
  return 0
