"""evaluate: scores on the test split."""

import argparse
import dataclasses
import json
from pathlib import Path

from diffusion_jax.cli import evaluate_job
from diffusion_jax.cli.options import add_model_arguments, add_sample_arguments, load
from diffusion_jax.errors import UserError

HELP = 'score a model on the test captions'
DESCRIPTION = """Draws a picture for each test caption and reports, in the features of the CLIP
image tower, the Frechet distance (fd_clip) and KID (kid_clip) to the training images, the CLIP
score, and how often a picture's own caption is the nearest among 100 (retrieval_r1), each beside
the value of the real test images and of the same network untrained. Other features (the FID
Inception, DINOv2, a classifier), metrics, captions and references are named by options. Beside
FILE.json come a row in FILE.csv and a page, FILE.html. What has been computed is kept in
FILE.parts, so that a start after an interruption goes on where it was; several processes share the
work. The workdir of an autoencoder, a CLIP or a classifier is scored by its own metrics.

With --images: pictures that are there in place of a model's.

With --likelihood: bits per dimension of test images given their captions. The density is that of
the scaled latents, one sample of the autoencoder's posterior per image, not of pixels, and lower is
better: the variational bound over the schedule's steps (discrete), the bound in continuous time,
and the probability-flow ODE (flow), each with its standard error over images, beside the same
network untrained and a diagonal Gaussian fitted to training latents. All three give a latent the
width of the schedule's first noise. image_bits_per_dim_bound adds the autoencoder's part and bounds
the bits of the pixels, so that it compares models with different autoencoders.

examples:
  python -m diffusion_jax evaluate --workdir runs/quickstart --out runs/quickstart/scores.json
  python -m diffusion_jax evaluate --images samples --reference test --out folder.json
  python -m diffusion_jax evaluate --images photos --save_statistics photos.npz --out photos.json
  python -m diffusion_jax evaluate --likelihood --samples 64 --out likelihood.json"""

SAMPLES, LIKELIHOOD_SAMPLES = 256, 64
DEFAULT_CLIP = 'asset:clip-openmoji-64'
SAMPLING = ('sampler', 'spacing', 'steps', 'guidance')
ESTIMATING = ('draws', 'trace', 'probes', 'solver', 'ode_steps')


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Model, samples, output."""
  add_model_arguments(parser)
  parser.add_argument('--out', required=True, metavar='FILE.json', help='where the scores go')
  parser.add_argument('--samples', type=int, metavar='N',
                      help=f'pictures to draw (default: {SAMPLES}), or test images of which to '
                      f'compute the likelihood (default: {LIKELIHOOD_SAMPLES})')
  parser.add_argument('--dataset', default='openmoji', metavar='NAME',
                      help='data set, for --model (default: openmoji)')
  parser.add_argument('--clip', metavar='DIR', help='a CLIP with both towers, in whose features to '
                      f"score (default: the run's, else {DEFAULT_CLIP})")
  parser.add_argument('--data_dir', metavar='DIR', help='folder of all data sets, for --model')
  add_sample_arguments(parser)
  evaluate_job.add_arguments(parser)
  add_likelihood_arguments(parser)


def add_likelihood_arguments(parser: argparse.ArgumentParser) -> None:
  """--likelihood, and how to estimate it; defaults are those of `LikelihoodConfig`."""
  group = parser.add_argument_group('likelihood')
  group.add_argument('--likelihood', action='store_true',
                     help='bits per dimension of test images, instead of scores of drawn ones')
  group.add_argument('--draws', type=int, metavar='N',
                     help='noise levels of each bound, a network call each (default: 32)')
  group.add_argument('--trace', metavar='NAME', help='of the Jacobian: rademacher (default), '
                     'gaussian, or exact, which takes a backward pass per dimension')
  group.add_argument('--probes', type=int, metavar='N',
                     help='noises that estimate the trace (default: 1)')
  group.add_argument('--solver', metavar='NAME',
                     help='of the ODE: rk4 (default), heun or adaptive')
  group.add_argument('--ode_steps', type=int, metavar='N',
                     help='steps of rk4 or heun (default: 8)')


def run(args: argparse.Namespace) -> int:
  """Scores and writes."""
  from diffusion_jax.compile_cache import enable_compile_cache
  from diffusion_jax.evaluation.table import add_row
  from diffusion_jax.viz.evaluation import write_evaluation_page

  enable_compile_cache()
  out = Path(args.out)
  if out.is_dir():
    raise UserError(f'--out {out} is a directory; name a file such as {out / "scores.json"}.')
  evaluate_job.check(args)
  out.parent.mkdir(parents=True, exist_ok=True)
  shown: dict = {}
  if args.images:
    scores = evaluate_job.run(args, out, shown, evaluate_job.of_folder)
  else:
    scores = _score(args, out, shown)
  if scores is None:
    return 0  # The first process tells.
  out.write_text(json.dumps(scores, indent=2) + '\n')
  add_row(out.with_suffix('.csv'), flat_row(scores))
  write_evaluation_page(out.with_suffix('.html'), scores, **shown)
  print_table(scores)
  print(f'written to {out}, beside it {out.with_suffix(".csv").name} and '
        f'{out.with_suffix(".html").name}')
  return 0


def flat_row(scores: dict) -> dict:
  """Figures as COLUMN.FIGURE, then settings: one row of a table."""
  from diffusion_jax.viz.evaluation import figure_columns

  figures = {f'{c}.{name}': v for c in figure_columns(scores) for name, v in scores[c].items()}
  settings = {f'settings.{k}': v for k, v in scores.get('settings', {}).items()}
  return figures | settings


def _score(args: argparse.Namespace, out: Path, shown: dict) -> dict | None:
  from diffusion_jax.io.run_directory import RunDirectory
  from diffusion_jax.trained import load_evaluator

  config = RunDirectory(args.workdir).read_json('config.json') if args.workdir else None
  _check(args, config['task'] if config else 'diffusion')
  if config and config['task'] != 'diffusion':
    return load_evaluator(args.workdir)(_given(args.samples, SAMPLES))
  return _likelihood(args, config) if args.likelihood else _pictures(args, config, out, shown)


def _check(args: argparse.Namespace, task: str) -> None:
  """Raises a UserError for options that would do nothing."""
  if args.likelihood and task != 'diffusion':
    raise UserError(f'{args.workdir} trains {task}; --likelihood needs a diffusion model.')
  if task != 'diffusion':
    for name in (*evaluate_job.OF_BOTH, 'captions', 'keep'):
      if getattr(args, name) is not None:
        raise UserError(f'{args.workdir} trains {task}; --{name} does nothing there, leave it out.')
  useless, why = (SAMPLING, 'with') if args.likelihood else (ESTIMATING, 'without')
  for name in useless:
    if getattr(args, name) is not None:
      raise UserError(f'--{name} does nothing {why} --likelihood; leave it out.')


def _pictures(
  args: argparse.Namespace, config: dict | None, out: Path, shown: dict
) -> dict | None:
  clip = args.clip or (config['settings']['clip'] if config else DEFAULT_CLIP)
  settings = {}

  def columns(args, mesh):
    model, weights, sample, name, train, test = _open(args, config, mesh)
    name = _identity(args, name)
    settings.update(dataclasses.asdict(sample))
    return _columns(args, mesh, model, weights, sample, name, test), (
      lambda split: train if split == 'train' else test
    )

  return evaluate_job.run(args, out, shown, columns, clip, settings)


def _columns(args: argparse.Namespace, mesh, model, weights, sample, name: str, test) -> dict:
  """'generated', 'untrained' and, of captions of the test split, 'real'."""
  from diffusion_jax.evaluation.images import Split
  from diffusion_jax.evaluation.job import check_samples, fresh_weights, shuffled
  from diffusion_jax.evaluation.offline import of_images, of_model

  if args.captions:
    captions, records = evaluate_job.lines(args.captions)[: args.samples], None
  else:
    check_samples(_given(args.samples, SAMPLES), len(test))
    records = shuffled(test, _given(args.samples, SAMPLES))
    captions = [record['captions'][0] for record in records]
  drawn = lambda name, weights: of_model(
    model, weights, name, captions, sample, seed=args.seed, mesh=mesh, batch_size=args.batch
  )
  fresh = fresh_weights(model, weights, mesh)
  columns = {
    'generated': evaluate_job.Column(drawn(name, weights), captions, keep=True),
    'untrained': evaluate_job.Column(drawn(f'untrained {name}', fresh), captions),
  }
  if records is not None:
    real = of_images(Split(records, f'{len(records)} test images'))
    columns['real'] = evaluate_job.Column(real, captions)
  return columns


def _identity(args: argparse.Namespace, name: str) -> str:
  """The model's name and which of its weights these are, for it may be trained on meanwhile."""
  from diffusion_jax.io.checkpoint import Checkpoints
  from diffusion_jax.io.pretrained import resolve
  from diffusion_jax.io.run_directory import RunDirectory

  if args.workdir:
    step = Checkpoints(RunDirectory(args.workdir).checkpoints, read_only=True).latest()
    return f'{name} at step {step}'
  files = [path.stat() for path in resolve(name).rglob('*.safetensors')]
  return f'{name} of {max((int(file.st_mtime) for file in files), default=0)}'


def _likelihood(args: argparse.Namespace, config: dict | None) -> dict:
  from diffusion_jax.evaluation.likelihood import LikelihoodConfig, evaluate_likelihood
  from diffusion_jax.parallel.mesh import MeshConfig, make_mesh

  given = {name: getattr(args, name) for name in ESTIMATING}
  settings = LikelihoodConfig(**{k: v for k, v in given.items() if v is not None})
  mesh = make_mesh(MeshConfig())
  model, weights, _, _, train, test = _open(args, config, mesh)
  return evaluate_likelihood(
    model, weights, train, test, settings, samples=_given(args.samples, LIKELIHOOD_SAMPLES),
    seed=args.seed, mesh=mesh, batch_size=args.batch,
  )


def _given(value: int | None, default: int) -> int:
  return default if value is None else value


def _open(args: argparse.Namespace, config: dict | None, mesh) -> tuple:
  """(model, weights on the mesh, sample settings, name, training source, test source)."""
  from diffusion_jax.data.sources import open_source

  model, weights, sample, name = load(args, mesh)
  data = {'dataset': args.dataset, 'data_dir': args.data_dir, 'prepare': True}
  if config:
    data = config['data']
  train, test = (
    open_source(
      data['dataset'], split, size=model.image_size, data_dir=data['data_dir'] or None,
      prepare=data['prepare'],
    )
    for split in ('train', 'test')
  )
  return model, weights, sample, name, train, test


def print_table(scores: dict) -> None:
  """Metrics as rows, columns as they are."""
  from diffusion_jax.viz.evaluation import figure_columns

  columns = figure_columns(scores)
  rows = list(dict.fromkeys(metric for name in columns for metric in scores[name]))
  width = max(map(len, rows), default=0)
  print(' ' * width + ''.join(f'{name:>12}' for name in columns))
  for row in rows:
    cells = (f'{scores[c][row]:12.4g}' if row in scores[c] else ' ' * 12 for c in columns)
    print(f'{row:<{width}}' + ''.join(cells))
