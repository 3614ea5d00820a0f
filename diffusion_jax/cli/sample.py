"""sample: prompts to PNGs."""

import argparse
import math
import re
from pathlib import Path

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

HELP = 'draw pictures for prompts'
DESCRIPTION = """Draws one picture for each prompt, as PNG with the prompt and all settings in its
metadata, and one grid of them all. The same seed gives the same pictures whatever the batch size.

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
                      help='what to draw; repeat for several pictures')
  parser.add_argument('--prompts', metavar='FILE', help='a text file with one prompt a line')
  parser.add_argument('--negative', default='', metavar='TEXT',
                      help='what not to draw (default: nothing)')
  parser.add_argument('--out', required=True, metavar='DIR', help='where the pictures go')
  add_adapter_arguments(parser)
  add_picture_arguments(parser)
  add_sample_arguments(parser)


def read_prompts(args: argparse.Namespace) -> list[str]:
  """All prompts, checked.

  Raises:
    UserError: no prompt, an empty one, or a file that cannot be read.
  """
  prompts = list(args.prompt)
  if args.prompts:
    from diffusion_jax.data.text import read_lines

    prompts += read_lines(args.prompts, 'prompts file')
  if not prompts:
    raise UserError('there is no prompt; give --prompt TEXT or --prompts FILE.')
  if any(not prompt.strip() for prompt in prompts):
    raise UserError('a prompt is empty; say what to draw.')
  return prompts


def add_picture_arguments(parser: argparse.ArgumentParser) -> None:
  """What a model may be shown beside the prompt."""
  group = parser.add_argument_group('pictures; the central square of each is taken')
  group.add_argument('--image', metavar='FILE', help='a picture to start from, repaint or edit')
  group.add_argument('--strength', type=float, metavar='S',
                     help='with --image: share of the steps that are taken, up to 1; 1 keeps '
                     f'least of the picture (default: {STRENGTH}; 1 where the model is shown it)')
  group.add_argument('--mask', metavar='FILE',
                     help='for an inpainting model: white where to paint')
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
  import numpy as np

  from diffusion_jax.data.images import read_image
  from diffusion_jax.pipelines.conditions import Inputs

  for name, needed in NEEDED.items():
    if getattr(args, name) is not None and getattr(args, needed) is None:
      raise UserError(f'--{name} needs a picture; give --{needed} FILE, too.')
  strength = args.strength
  if strength is not None and (not 0 < strength <= 1 or round(strength * steps) < 1):
    raise UserError(
      f'--strength {strength:g} leaves no step of {steps}; choose a share up to 1.'
    )
  latent = model.latent_shape[0]
  edges = {'image': model.image_size, 'mask': model.image_size, 'control': model.image_size,
           'depth': latent, 'small': latent, 'reference': getattr(model.text, 'size', 0)}
  given = {name: getattr(args, name) for name in edges if getattr(args, name)}
  if 'reference' in given and not edges['reference']:
    raise UserError('the model varies no picture; leave --reference out, or use a model that does.')
  pictures = {name: read_image(path, edges[name])[None] for name, path in given.items()}
  if 'mask' in pictures:
    pictures['masks'] = pictures.pop('mask').mean(axis=-1) > 127.5
  if 'image' in pictures:
    pictures['images'] = pictures.pop('image')
  if 'depth' in pictures:
    depth = pictures['depth'].mean(axis=-1)
    # Models of depth were shown maps that fill the range.
    low, high = depth.min(), max(depth.max(), depth.min() + 1)
    pictures['depth'] = (2 * (depth - low) / (high - low) - 1).astype(np.float32)
  numbers = {name: getattr(args, name) for name in NEEDED if getattr(args, name) is not None}
  inputs = Inputs(**pictures, **numbers)
  inputs.rows(model, 1)  # So that what does not fit is said before anything is drawn.
  if 'image' in given and inputs.share(model) < 1:
    numbers['strength'] = inputs.share(model)
  return inputs, given | {name: f'{value:g}' for name, value in numbers.items()}


def file_name(index: int, prompt: str) -> str:
  """'0003_red_apple.png'."""
  return f'{index:04d}_{re.sub(r"[^a-z0-9]+", "_", prompt.lower()).strip("_")[:60]}.png'


def run(args: argparse.Namespace) -> int:
  """Draws and writes."""
  prompts = read_prompts(args)
  import numpy as np
  from PIL import Image
  from tqdm import tqdm

  from diffusion_jax.compile_cache import enable_compile_cache
  from diffusion_jax.parallel.mesh import MeshConfig, make_mesh
  from diffusion_jax.viz.grids import make_grid, save_png

  enable_compile_cache()
  out = Path(args.out)
  if out.exists() and not out.is_dir():
    raise UserError(f'--out {out} is a file; choose a directory.')
  mesh = make_mesh(MeshConfig())
  model, weights, sample, name = load(args, mesh)
  model, weights = with_adapters(model, weights, args)
  model.tokens([*prompts, args.negative], on_long='error')
  inputs, started = read_inputs(args, model, sample.steps)
  settings = {
    'negative': args.negative, **sample.in_force(), **started, **named_adapters(args),
    'seed': str(args.seed), 'model': name, 'software': f'diffusion_jax {__version__}',
  }
  images = []
  with tqdm(total=len(prompts), desc='drawing', unit='img', leave=False) as bar:
    for batch in model.generate(
      model.on_mesh(weights, mesh), prompts, sample, seed=args.seed, mesh=mesh,
      negative=args.negative, batch_size=min(args.batch, len(prompts)), inputs=inputs,
    ):
      for image in batch:
        index = len(images)
        metadata = {'prompt': prompts[index], 'index': str(index), **settings}
        save_png(Image.fromarray(image), out / file_name(index, prompts[index]), metadata)
        images.append(image)
        bar.update()
  columns = math.ceil(math.sqrt(len(images)))
  scale = max(1, 192 // images[0].shape[0])
  grid = make_grid(np.stack(images), columns=columns, captions=prompts, scale=scale)
  save_png(grid, out / 'grid.png', {'prompts': '\n'.join(prompts), **settings})
  print(f'{len(images)} pictures and grid.png are in {out}')
  return 0
