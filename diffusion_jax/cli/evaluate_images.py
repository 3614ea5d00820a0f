"""evaluate --images: a folder of pictures against a reference, in any features."""

import argparse
from pathlib import Path

from diffusion_jax.errors import UserError

METRICS, SIZE = 'fd,kid', 64
FEATURES = 'clip:asset:clip-openmoji-64'


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """What only a folder of pictures takes."""
  group = parser.add_argument_group('pictures that are there already')
  group.add_argument('--images', metavar='DIR',
                     help='score the pictures of a folder instead of a model')
  group.add_argument('--reference', metavar='WHAT', help='what they are compared with: a folder, '
                     'a file of statistics (.npz of clean-fid, ADM or our own, a cache of '
                     'torch-fidelity), or train or test of --dataset (default: train)')
  group.add_argument('--size', type=int, metavar='N',
                     help=f'edge of the images of --dataset in pixels (default: {SIZE})')
  group.add_argument('--features', action='append', metavar='KIND:PATH',
                     help='inception/tensorflow, inception/pytorch or inception/clean (by the rule '
                     'of resizing) with a file of weights, or clip with a directory; repeat for '
                     f'several (default: {FEATURES})')
  group.add_argument('--metrics', metavar='A,B', help='any of fd, fd_infinity, kid, '
                     'precision_recall, density_coverage, cmmd, kl, inception_score '
                     f'(default: {METRICS})')
  group.add_argument('--most_unreadable', type=float, metavar='SHARE',
                     help='of the pictures that may be damaged; they are named and left out '
                     '(default: 0)')


OWN = ('reference', 'size', 'features', 'metrics', 'most_unreadable')


def check(args: argparse.Namespace) -> None:
  """Raises a UserError for options that would do nothing."""
  if args.images is None:
    for name in OWN:
      if getattr(args, name) is not None:
        raise UserError(f'--{name} does nothing without --images; leave it out.')
    return
  if args.workdir or args.model or args.likelihood:
    raise UserError('--images takes no model; leave out --workdir, --model and --likelihood.')


def run(args: argparse.Namespace, out: Path, shown: dict) -> dict | None:
  """{'samples': figures, 'intervals', 'warnings', 'settings'}; None but in the first process.

  `shown` is given what the page shows beside them.
  """
  import jax

  from diffusion_jax.evaluation.extraction import Extraction
  from diffusion_jax.evaluation.images import Folder
  from diffusion_jax.evaluation.offline import compare, features_of, local_mesh, of_images
  from diffusion_jax.evaluation.scores import check_metrics, outputs_of
  from diffusion_jax.evaluation.showing import show
  from diffusion_jax.parallel.startup import start_distributed

  metrics = (args.metrics or METRICS).split(',')
  outputs_of(metrics, {})
  images = Folder(args.images)
  start_distributed()
  mesh = local_mesh()
  extraction = Extraction(_extractors(args.features or [FEATURES], metrics, mesh), mesh)
  name, reference = _reference(args, extraction)
  known = {'moments'} if isinstance(reference, dict) else {'moments', 'reference'}
  check_metrics(metrics, [column.rpartition(':')[2] for column in extraction.columns], known)
  parts, share = out.with_name(f'{out.stem}.parts'), args.most_unreadable or 0.0
  samples = features_of(
    of_images(images), extraction, parts / 'samples', most_unreadable=share, label='pictures'
  )
  set_of_reference = None if isinstance(reference, dict) else reference
  if set_of_reference is not None:
    reference = features_of(
      of_images(set_of_reference), extraction, parts / 'reference', most_unreadable=share,
      label='reference',
    )
  if jax.process_index():
    return None
  scores = compare(samples, reference, metrics, seed=args.seed)
  if set_of_reference is not None:
    shown |= show(images, samples, set_of_reference, reference)
  for text in (*samples.trouble, *scores.warnings):
    print(f'note: {text}')
  return {
    'samples': scores.values,
    'intervals': {name: interval._asdict() for name, interval in scores.intervals.items()},
    'warnings': scores.warnings,
    'settings': {
      'samples': len(samples.rows), 'images': images.name, 'unreadable': len(samples.trouble),
      'reference': name, 'features': [extractor.name for extractor in extraction.extractors],
      'metrics': metrics, 'seed': args.seed,
    },
  }


def _extractors(named: list[str], metrics: list[str], mesh) -> list:
  from diffusion_jax.evaluation.extractors import NAMES, load_extractor
  from diffusion_jax.evaluation.scores import outputs_of
  from diffusion_jax.models.inception import InceptionConfig

  found = []
  for text in named:
    kind, colon, path = text.partition(':')
    if not colon or kind not in NAMES:
      raise UserError(
        f'--features {text} is not of the form KIND:PATH with a kind of {", ".join(NAMES)}.'
      )
    outputs = outputs_of(metrics, InceptionConfig().widths) if kind.startswith('inception') else ()
    found.append(load_extractor(kind, path, outputs=outputs, mesh=mesh))
  return found


def _reference(args: argparse.Namespace, extraction) -> tuple:
  """(name, the images, or what a file of statistics says of each kind of features)."""
  from diffusion_jax.evaluation.images import Folder, Split
  from diffusion_jax.evaluation.statistics_files import load_statistics

  what = args.reference or 'train'
  if Path(what).is_file():
    columns = [c for c in extraction.columns if not c.endswith('logits_unbiased')]
    return what, {c: load_statistics(what, spatial=c.endswith(':spatial')) for c in columns}
  images = Folder(what) if what not in ('train', 'test') else Split(
    _split(args, what), f'{args.dataset} {what}'
  )
  return images.name, images


def _split(args: argparse.Namespace, split: str):
  from diffusion_jax.data.sources import open_source

  size = SIZE if args.size is None else args.size
  return open_source(args.dataset, split, size=size, data_dir=args.data_dir, prepare=True)
