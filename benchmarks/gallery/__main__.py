"""Draw what diffusion does where the exact answers are known.

  python -m benchmarks.gallery --out drawings
"""

import argparse
import sys
from pathlib import Path

from diffusion_jax.errors import UserError

DESCRIPTION = """Draws what diffusion does where the exact answers are known: schedules, errors of
samplers against network calls, their paths in the plane, and scores. Writes SVG files and one page,
index.html. Needs no model.

example:
  python -m benchmarks.gallery --out drawings
  python -m benchmarks.gallery --what errors --samplers ddim,heun,unipc --out drawings"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Add --out, --what and --samplers."""
  parser.add_argument('--out', required=True, metavar='DIR', help='where the files go')
  parser.add_argument('--what', default='', metavar='NAMES',
                      help='which of schedules,errors,trajectories,scores (default: all)')
  parser.add_argument('--samplers', default='', metavar='NAMES',
                      help='samplers of errors and trajectories, such as ddim,heun '
                      '(default: a choice of each)')


def run(args: argparse.Namespace) -> int:
  """Compute and write."""
  from tqdm import tqdm

  from benchmarks.gallery.drawings import draw
  from benchmarks.gallery.page import Section, write_gallery
  from diffusion_jax.backend.xla import enable_compile_cache

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


if __name__ == '__main__':
  from benchmarks.command import run_command

  sys.exit(run_command('benchmarks.gallery', sys.modules[__name__]))
