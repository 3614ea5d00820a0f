"""draw: pictures of schedules, samplers and scores."""

import argparse
from pathlib import Path

from diffusion_jax.errors import UserError

HELP = 'draw schedules, errors and paths of samplers, and scores'
DESCRIPTION = """Draws what diffusion does where the exact answers are known: schedules, errors of
samplers against network calls, their paths in the plane, and scores. Writes SVG files and one page,
index.html. Needs no model.

example:
  python -m diffusion_jax draw --out drawings
  python -m diffusion_jax draw --what errors --samplers ddim,heun,unipc --out drawings"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """--out, --what, --samplers."""
  parser.add_argument('--out', required=True, metavar='DIR', help='where the files go')
  parser.add_argument('--what', default='', metavar='NAMES',
                      help='which of schedules,errors,trajectories,scores (default: all)')
  parser.add_argument('--samplers', default='', metavar='NAMES',
                      help='samplers of errors and trajectories, such as ddim,heun '
                      '(default: a choice of each)')


def run(args: argparse.Namespace) -> int:
  """Computes and writes."""
  from tqdm import tqdm

  from diffusion_jax.backend.xla import enable_compile_cache
  from diffusion_jax.pipelines.drawings import draw
  from diffusion_jax.viz.gallery import Section, write_gallery

  enable_compile_cache()
  out = Path(args.out)
  if out.exists() and not out.is_dir():
    raise UserError(f'--out {out} is a file; choose a directory.')
  parts, sections = draw(_names(args.what), _names(args.samplers)), []
  with tqdm(desc='drawing', bar_format='{desc} [{elapsed}]', leave=False) as bar:
    for made in parts:
      if isinstance(made, Section):
        sections.append(made)
      else:
        bar.set_description_str(made)
  paths = write_gallery(out, sections, 'Diffusion, where the answers are known')
  print(f'{len(paths) - 1} drawings and {paths[-1].name} are in {out}')
  return 0


def _names(text: str) -> list[str]:
  return list(dict.fromkeys(name.strip() for name in text.split(',') if name.strip()))
