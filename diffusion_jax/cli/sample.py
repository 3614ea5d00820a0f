"""sample: prompts to PNGs."""

import argparse
import math
import re
from pathlib import Path

from diffusion_jax import __version__
from diffusion_jax.cli.options import add_model_arguments, add_sample_arguments, load
from diffusion_jax.errors import UserError

HELP = 'draw pictures for prompts'
DESCRIPTION = """Draws one picture for each prompt, as PNG with the prompt and all settings in its
metadata, and one grid of them all. The same seed gives the same pictures whatever the batch size.

examples:
  python -m diffusion_jax sample --prompt 'grinning cat' --prompt 'red apple' --out pictures
  python -m diffusion_jax sample --prompt 'blue car' --image car.png --strength 0.6 --out new"""


STRENGTH = 0.8


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Model, prompts, settings."""
  add_model_arguments(parser)
  parser.add_argument('--prompt', action='append', default=[], metavar='TEXT',
                      help='what to draw; repeat for several pictures')
  parser.add_argument('--prompts', metavar='FILE', help='a text file with one prompt a line')
  parser.add_argument('--negative', default='', metavar='TEXT',
                      help='what not to draw (default: nothing)')
  parser.add_argument('--image', metavar='FILE',
                      help='a picture to start from; its central square is taken')
  parser.add_argument('--strength', type=float, metavar='S',
                      help='with --image: share of the steps that are taken, up to 1; 1 '
                      f'keeps least of the picture (default: {STRENGTH})')
  parser.add_argument('--out', required=True, metavar='DIR', help='where the pictures go')
  add_sample_arguments(parser)


def read_prompts(args: argparse.Namespace) -> list[str]:
  """All prompts, checked.

  Raises:
    UserError: no prompt, an empty one, or a file that cannot be read.
  """
  prompts = list(args.prompt)
  if args.prompts:
    try:
      lines = Path(args.prompts).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
      raise UserError(f'the prompts file {args.prompts} cannot be read ({error}).') from error
    prompts += [line for line in lines if line.strip()]
  if not prompts:
    raise UserError('there is no prompt; give --prompt TEXT or --prompts FILE.')
  if any(not prompt.strip() for prompt in prompts):
    raise UserError('a prompt is empty; say what to draw.')
  return prompts


def starting_image(args: argparse.Namespace, size: int, steps: int) -> tuple[dict, dict[str, str]]:
  """(arguments of `generate`, metadata) of image-to-image; both empty without --image.

  Raises:
    UserError: an image that cannot be read, or a strength that is none.
  """
  if not args.image:
    if args.strength is not None:
      raise UserError('--strength needs a picture to start from; give --image FILE, too.')
    return {}, {}
  from diffusion_jax.data.images import read_image

  strength = STRENGTH if args.strength is None else args.strength
  if not 0 < strength <= 1 or round(strength * steps) < 1:
    raise UserError(
      f'--strength {strength:g} leaves no step of {steps}; choose a share up to 1.'
    )
  start = {'images': read_image(args.image, size)[None], 'strength': strength}
  return start, {'image': args.image, 'strength': f'{strength:g}'}


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
  model, weights, sample, name = load(args)
  model.tokens([*prompts, args.negative], on_long='error')
  mesh = make_mesh(MeshConfig())
  start, started = starting_image(args, model.image_size, sample.steps)
  settings = {
    'negative': args.negative, **sample.in_force(), **started, 'seed': str(args.seed),
    'model': name, 'software': f'diffusion_jax {__version__}',
  }
  images = []
  with tqdm(total=len(prompts), desc='drawing', unit='img', leave=False) as bar:
    for batch in model.generate(
      model.on_mesh(weights, mesh), prompts, sample, seed=args.seed, mesh=mesh,
      negative=args.negative, batch_size=min(args.batch, len(prompts)), **start,
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
