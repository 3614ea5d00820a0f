"""evaluate: scores on the test split."""

import argparse
import json
from pathlib import Path

from diffusion_jax.cli.options import add_model_arguments, add_sample_arguments, load
from diffusion_jax.errors import UserError

HELP = 'score a model on the test captions'
DESCRIPTION = """Draws a picture for each test caption and reports, in the features of the CLIP
image tower, the Frechet distance (fd_clip) and KID (kid_clip) to the training images, the CLIP
score, and how often a picture's own caption is the nearest among 100 (retrieval_r1), each beside
the value of the real test images and of the same network untrained. The workdir of an autoencoder
or a CLIP is scored by its own metrics.

example:
  python -m diffusion_jax evaluate --workdir runs/quickstart --out runs/quickstart/scores.json"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Model, samples, output."""
  add_model_arguments(parser)
  parser.add_argument('--out', required=True, metavar='FILE.json', help='where the scores go')
  parser.add_argument('--samples', type=int, default=256, metavar='N',
                      help='pictures to draw (default: 256)')
  parser.add_argument('--dataset', default='openmoji', metavar='NAME',
                      help='data set, for --model (default: openmoji)')
  parser.add_argument('--data_dir', metavar='DIR', help='folder of all data sets, for --model')
  add_sample_arguments(parser)


def run(args: argparse.Namespace) -> int:
  """Scores and writes."""
  from diffusion_jax.compile_cache import enable_compile_cache

  enable_compile_cache()
  out = Path(args.out)
  if out.is_dir():
    raise UserError(f'--out {out} is a directory; name a file such as {out / "scores.json"}.')
  scores = _score(args)
  out.parent.mkdir(parents=True, exist_ok=True)
  out.write_text(json.dumps(scores, indent=2) + '\n')
  print_table(scores)
  print(f'written to {out}')
  return 0


def _score(args: argparse.Namespace) -> dict:
  from diffusion_jax.build import load_evaluator
  from diffusion_jax.io.run_directory import RunDirectory

  if args.workdir and RunDirectory(args.workdir).read_json('config.json')['task'] != 'diffusion':
    return load_evaluator(args.workdir)(args.samples)
  from diffusion_jax.data.sources import open_source
  from diffusion_jax.evaluation.job import Evaluation, evaluate_text_to_image, fresh_weights
  from diffusion_jax.parallel.mesh import MeshConfig, make_mesh

  model, weights, sample, _ = load(args)
  data = {'dataset': args.dataset, 'data_dir': args.data_dir, 'prepare': True}
  if args.workdir:
    data = RunDirectory(args.workdir).read_json('config.json')['data']
  train, test = (
    open_source(
      data['dataset'], split, size=model.image_size, data_dir=data['data_dir'] or None,
      prepare=data['prepare'],
    )
    for split in ('train', 'test')
  )
  mesh = make_mesh(MeshConfig())
  weights = model.on_mesh(weights, mesh)
  evaluation = Evaluation.prepare(model, weights.clip, train, test, mesh=mesh)
  return evaluate_text_to_image(
    evaluation, weights, fresh_weights(model, weights, mesh), sample, samples=args.samples,
    seed=args.seed, real=True,
  )


def print_table(scores: dict) -> None:
  """Metrics as rows, columns as they are."""
  columns = [name for name in scores if name != 'settings']
  rows = list(dict.fromkeys(metric for name in columns for metric in scores[name]))
  width = max(map(len, rows))
  print(' ' * width + ''.join(f'{name:>12}' for name in columns))
  for row in rows:
    cells = (f'{scores[c][row]:12.4g}' if row in scores[c] else ' ' * 12 for c in columns)
    print(f'{row:<{width}}' + ''.join(cells))
