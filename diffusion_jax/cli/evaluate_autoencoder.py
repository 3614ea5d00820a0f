"""An autoencoder's reconstructions against their originals."""

import argparse
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from diffusion_jax.cli import evaluate_job, evaluate_model
from diffusion_jax.errors import UserError

USELESS = (
  'reference', 'captions', 'labels', 'sweep', 'sampler', 'spacing', 'steps', 'guidance',
  'guidance_rescale', 'guidance_interval', 'threshold', 'threshold_limit', 'threshold_percentile',
  'image_guidance', 'clip_skip', 'decoding',
)
SAMPLES = 256


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """What an autoencoder alone takes."""
  parser.add_argument('--lpips', metavar='FILE', help='of an autoencoder, weights of LPIPS (VGG) '
                      'as safetensors, with which lpips is a figure, too')


def names_autoencoder(path: str | None) -> bool:
  """Whether --model is a directory of an autoencoder, not of a whole model."""
  from diffusion_jax.formats.networks import network_format, resolve
  from diffusion_jax.formats.tensors import read_json

  file = resolve(path) / 'config.json' if path else None
  return bool(file) and file.is_file() and network_format('autoencoder').matches(
    read_json(file)
  )


def run(args: argparse.Namespace, out: Path, shown: dict) -> dict[str, Any] | None:
  """Scores of 'reconstructed' and 'untrained', both against the originals."""
  from diffusion_jax.evaluation.comparison import Column, Reference, local_mesh
  from diffusion_jax.evaluation.images import First

  check(args)
  evaluate_job.start()
  mesh = local_mesh()
  network, read, name, test, about = _open(args)
  originals = First(test, min(SAMPLES, len(test)) if args.samples is None else args.samples)
  default = evaluate_job.PAIR_METRICS + (',lpips' if args.lpips else '')
  comparison = evaluate_job.open_comparison(
    args, out, lambda name: test, args.clip or evaluate_job.CLIP,
    Reference(originals.name, originals, own=True), default,
  )
  works = _works(args, network, read, name, originals, mesh)
  found = comparison({
    column: Column(work, keep=column == 'reconstructed') for column, work in works.items()
  })
  if found is None:
    return None
  settings = {'lpips': args.lpips} if args.lpips else {}
  return evaluate_job.report(args, comparison, found, shown, settings, about, test)


def check(args: argparse.Namespace) -> None:
  """Raises a UserError for options that would do nothing."""
  for name in USELESS:
    if getattr(args, name) is not None:
      raise UserError(f'--{name} does nothing for an autoencoder; leave it out.')
  if args.batch < 1:
    raise UserError(f'--batch is {args.batch}; encode at least 1 image at a time.')
  if args.lpips and args.metrics and 'lpips' not in args.metrics.split(','):
    raise UserError('--lpips does nothing without lpips among --metrics; name it there, too.')


def _works(
  args: argparse.Namespace, network, read: Callable, name: str, originals, mesh
) -> dict[str, Any]:
  import jax

  from diffusion_jax.evaluation.reconstruction import (
    FIGURES,
    of_autoencoder,
    perceptual,
    reconstructor,
  )
  from diffusion_jax.formats.networks import load_lpips
  from diffusion_jax.parallel.mesh import put_params, to_host

  distances = None
  if args.lpips:
    distances = perceptual(put_params(load_lpips(args.lpips), mesh), mesh, args.batch)
  fresh = lambda: to_host(jax.jit(network.initialize)(jax.random.key(1)))
  reconstruct = reconstructor(network, mesh, args.batch)
  # All of them whatever is asked for, so that a second start may ask for more.
  work = lambda name, params: of_autoencoder(
    reconstruct, functools.cache(lambda: put_params(params(), mesh)), name, originals,
    tuple(FIGURES), distances, args.lpips or '',
  )
  return {'reconstructed': work(name, read), 'untrained': work(f'untrained {name}', fresh)}


def _open(args: argparse.Namespace) -> tuple:
  """(network, a function that reads its parameters, its name and weights, the test images, what it
  was trained on)."""
  from diffusion_jax.data.splits import measured_on
  from diffusion_jax.evaluation.report import TESTED, of_model
  from diffusion_jax.formats.networks import load_params
  from diffusion_jax.models.autoencoder import AutoencoderKL
  from diffusion_jax.models.network import Network, under
  from diffusion_jax.parallel.mesh import to_host
  from diffusion_jax.run import TrainedRun

  half_life = args.ema_halflife_images
  if args.workdir:
    run = TrainedRun(args.workdir)
    network, step, data = run.autoencoder, run.newest(), run.config.data
    read = lambda: to_host(under('autoencoder', run.params(step, half_life)))
    name = evaluate_model.identity(args.workdir, run, step, half_life)
    images = evaluate_job.named_split(run.sources[1], data.dataset, data.size, 'test')
    return network, read, name, images, [measured_on(run.sources[1]).told]
  if half_life is not None:
    raise UserError('--ema_halflife_images needs --workdir: a model alone has one average.')
  config, params = load_params('autoencoder', args.model)
  own = config.sample_size if args.size is None and isinstance(config.sample_size, int) else None
  name, images = evaluate_model.identity(args.model), evaluate_job.open_split(args, 'test', own)
  about = [of_model(args.model, args.model, {TESTED: images.pictures})]
  return Network.of(AutoencoderKL, config), lambda: params, name, images, about
