"""Pictures made small and enlarged again: by a diffusion model, by a regression, by a formula.

  python -m benchmarks.enlarging runs/notes/imagen_32 runs/notes/enlarger

The PSNR to the test pictures, which the mean of what is possible has the highest of, and fd_clip to
them, which sharp pictures have the lowest of. Real small pictures, without noise.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.command import run_command
from diffusion_jax.data.sources.tfds import open_source
from diffusion_jax.evaluation.extract import Extraction
from diffusion_jax.evaluation.extractors import load_named
from diffusion_jax.evaluation.images import shuffled
from diffusion_jax.evaluation.metrics.gaussians import frechet_distance
from diffusion_jax.evaluation.metrics.images import psnr_of_each
from diffusion_jax.files import atomic_write
from diffusion_jax.parallel.mesh import MeshConfig, make_mesh
from diffusion_jax.pipelines.inputs import Inputs
from diffusion_jax.pixels import resize, to_float
from diffusion_jax.run import TrainedRun

DESCRIPTION = __doc__
CLIP = 'clip:asset:clip-openmoji-64'
OUT = Path(__file__).with_suffix('.json')


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Runs, and how many pictures."""
  parser.add_argument('runs', nargs='+', metavar='WORKDIR', help='runs with the condition upscale')
  parser.add_argument('--pictures', type=int, default=379, metavar='N', help='(default: 379)')


def drawn(workdir: str, small: np.ndarray, captions: list[str], mesh: Any) -> np.ndarray:
  """Return what a run's model makes of small pictures uint8 [n h w 3]."""
  run = TrainedRun(workdir)
  model, inputs = run.model, Inputs(small=small, noise_level=0)
  weights = model.on_mesh(run.weights(), mesh)
  return np.concatenate(list(model.generate(
    weights, captions, run.sample, seed=0, mesh=mesh, inputs=inputs, batch_size=32
  )))


def run(args: argparse.Namespace) -> int:
  """Enlarge, score, write."""
  mesh = make_mesh(MeshConfig())
  size = max(TrainedRun(args.runs[0]).model.trained_size)
  records = shuffled(open_source('openmoji', 'test', size=size, prepare=True), args.pictures)
  real = np.stack([record['image'] for record in records])
  small = np.stack([resize(image, size // 2, size // 2) for image in real])
  found = {'bicubic': np.stack([resize(image, size, size) for image in small])}
  for workdir in args.runs:
    found[Path(workdir).name] = drawn(workdir, small, [r['captions'][0] for r in records], mesh)
  extraction = Extraction(load_named([CLIP], ['fd'], mesh), mesh)
  column = next(iter(extraction.columns))
  features = lambda images: extraction.collect([images]).statistics(column)
  wanted = features(real)
  scores = {
    name: {
      'psnr': round(float(psnr_of_each(to_float(images), to_float(real)).mean()), 2),
      'fd_clip': round(float(frechet_distance(features(images), wanted)), 2),
    } for name, images in found.items()
  }
  text = json.dumps({'pictures': len(real), 'size': size, **scores}, indent=1)
  with atomic_write(OUT) as file:
    file.write(f'{text}\n'.encode())
  print(json.dumps(scores, indent=1))
  return 0


if __name__ == '__main__':
  raise SystemExit(run_command('benchmarks.enlarging', sys.modules[__name__]))
