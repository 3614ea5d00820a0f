"""evaluate: scores on the test split."""

import argparse
from pathlib import Path

from diffusion_jax.cli import evaluate_autoencoder, evaluate_follow, evaluate_job, evaluate_model
from diffusion_jax.cli.evaluate_model import BITS_DRAWS, SAMPLES
from diffusion_jax.cli.options import add_model_arguments, add_sample_arguments, check_numbers
from diffusion_jax.errors import UserError

HELP = 'score a model on the test captions'
DESCRIPTION = """Draws a picture for each test caption and reports, in the features of the CLIP
image tower, the Frechet distance (fd_clip) and KID (kid_clip) to the training images, the CLIP
score, and how often a picture's own caption is the nearest among 100 (retrieval_r1), each beside
the value of the real test images and of the same network untrained. Other features (the FID
Inception, DINOv2, a classifier), metrics, captions and references are named by options. Beside
FILE.json come a row in FILE.csv and a page, FILE.html. What has been computed is kept in
FILE.parts, so that a start after an interruption goes on where it was; several processes share the
work. Of an autoencoder, by its workdir or --model, test images are encoded and decoded, and
compared with themselves (rfid or rfd_FEATURES, psnr, ssim, l1, lpips). The workdir of a CLIP or a
classifier is scored by its own metrics.

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

LIKELIHOOD_SAMPLES = 64
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
  evaluate_autoencoder.add_arguments(parser)
  add_likelihood_arguments(parser)


def add_likelihood_arguments(parser: argparse.ArgumentParser) -> None:
  """--likelihood, and how to estimate it; defaults are those of `LikelihoodConfig`."""
  group = parser.add_argument_group('likelihood')
  group.add_argument('--likelihood', action='store_true',
                     help='bits per dimension of test images, instead of scores of drawn ones')
  group.add_argument('--draws', type=int, metavar='N',
                     help='noise levels of each bound, a network call each (default: 32, and '
                     f'{BITS_DRAWS} for bits_per_dim among --metrics)')
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
  from diffusion_jax.backend.xla import enable_compile_cache
  from diffusion_jax.evaluation.report import write

  enable_compile_cache()
  out = Path(args.out)
  if out.is_dir():
    raise UserError(f'--out {out} is a directory; name a file such as {out / "scores.json"}.')
  check_numbers(args)
  evaluate_job.check(args)
  out.parent.mkdir(parents=True, exist_ok=True)
  shown: dict = {}
  if args.follow:
    return evaluate_follow.run(args, out)
  scores = evaluate_job.of_folder(args, out, shown) if args.images else _score(args, out, shown)
  if scores is not None:  # The first process tells.
    write(out, scores, shown)
    print_table(scores)
    print(f'written to {out}, beside it {out.with_suffix(".csv").name} and '
          f'{out.with_suffix(".html").name}')
  evaluate_job.all_are_here('written')
  return 0


def _score(args: argparse.Namespace, out: Path, shown: dict) -> dict | None:
  from diffusion_jax.run import load_evaluator
  from diffusion_jax.runs.directory import RunDirectory

  config = RunDirectory(args.workdir).read_json('config.json') if args.workdir else None
  task = config['task'] if config else 'diffusion'
  if evaluate_autoencoder.names_autoencoder(args.model):
    task = 'autoencoder'
  _check(args, task)
  if task == 'autoencoder':
    return evaluate_autoencoder.run(args, out, shown)
  if task != 'diffusion':
    return load_evaluator(args.workdir)(SAMPLES if args.samples is None else args.samples)
  if args.likelihood:
    return _likelihood(args)
  draw = evaluate_model.sweep if args.sweep else evaluate_model.pictures
  return draw(args, out, config, shown)


def _check(args: argparse.Namespace, task: str) -> None:
  """Raises a UserError for options that would do nothing."""
  if args.likelihood and task != 'diffusion':
    raise UserError(
      f'{args.workdir or args.model} trains {task}; --likelihood needs a diffusion model.'
    )
  if args.size is not None and (task != 'autoencoder' or args.workdir):
    raise UserError('--size does nothing without --images, or an autoencoder by --model.')
  if args.lpips and task != 'autoencoder':
    raise UserError('--lpips does nothing without an autoencoder; leave it out.')
  if task not in ('diffusion', 'autoencoder'):
    for name in (*evaluate_job.OF_BOTH, 'captions', 'labels', 'keep'):
      if getattr(args, name) is not None:
        raise UserError(f'{args.workdir} trains {task}; --{name} does nothing there, leave it out.')
  useless, why = (SAMPLING, 'with') if args.likelihood else (ESTIMATING, 'without')
  if evaluate_model.wants_bits(args):
    useless = [name for name in useless if name != 'draws']
    if args.captions:
      raise UserError('bits_per_dim is of test images; leave it or --captions out.')
  for name in useless:
    if getattr(args, name) is not None:
      raise UserError(f'--{name} does nothing {why} --likelihood; leave it out.')


def _likelihood(args: argparse.Namespace) -> dict:
  from diffusion_jax.evaluation.likelihood import LikelihoodConfig, evaluate_likelihood
  from diffusion_jax.parallel.mesh import MeshConfig, make_mesh

  given = {name: getattr(args, name) for name in ESTIMATING}
  settings = LikelihoodConfig(**{k: v for k, v in given.items() if v is not None})
  mesh = make_mesh(MeshConfig())
  subject = evaluate_model.Subject(args, mesh)
  found = evaluate_likelihood(
    subject.model, subject.weights(args.ema_halflife_images)(), subject.train, subject.test,
    settings, samples=LIKELIHOOD_SAMPLES if args.samples is None else args.samples,
    seed=args.seed, mesh=mesh, batch_size=args.batch,
  )
  whose = f'Of {found["settings"]["samples"]:,} images of {subject.split("test").name}.'
  return found | {'measured': [whose, *subject.trained_on]}


def print_table(scores: dict) -> None:
  """Metrics as rows and columns as they are, or, of many columns, the other way round."""
  from diffusion_jax.viz.evaluation import MOST_COLUMNS, figure_columns

  columns = figure_columns(scores)
  metrics = list(dict.fromkeys(metric for name in columns for metric in scores[name]))
  value = lambda column, metric: scores[column].get(metric)
  if len(columns) > MOST_COLUMNS:
    columns, metrics, value = metrics, columns, lambda metric, column: scores[column].get(metric)
  width = max(map(len, metrics), default=0)
  print(' ' * width + ''.join(f' {name:>13}' for name in columns))
  for row in metrics:
    cells = (value(column, row) for column in columns)
    print(f'{row:<{width}}' + ''.join(' ' * 14 if c is None else f' {c:13.4g}' for c in cells))
