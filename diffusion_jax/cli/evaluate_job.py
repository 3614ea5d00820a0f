"""The pictures of a model, or of a folder, against a reference, in any features."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusion_jax.errors import UserError

if TYPE_CHECKING:
  from diffusion_jax.evaluation.comparison import Comparison, Found, Reference

METRICS, MODEL_METRICS, SIZE = 'fd,kid', 'fd,kid,clip_score,retrieval', 64
CLIP = 'asset:clip-openmoji-64'


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """What is compared, with what, and how."""
  group = parser.add_argument_group('what is compared')
  group.add_argument('--images', metavar='DIR',
                     help='score the pictures of a folder instead of a model')
  group.add_argument('--size', type=int, metavar='N', help='with --images, edge of the images of '
                     f'--dataset in pixels (default: {SIZE})')
  group.add_argument('--most_unreadable', type=float, metavar='SHARE',
                     help='with --images, of the pictures that may be damaged; they are named and '
                     'left out (default: 0)')
  group.add_argument('--sweep', action='append', metavar='NAME=A,B', help='score every combination '
                     'of values of guidance, steps, sampler, spacing, guidance_rescale, '
                     'image_guidance, clip_skip, ema_halflife_images; repeat for several names')
  group.add_argument('--follow', action='store_true', help='with --workdir, score each checkpoint '
                     'as it is written, until the run is over')
  group.add_argument('--captions', metavar='FILE',
                     help='captions to draw, one a line (default: of the test split)')
  group.add_argument('--keep', metavar='KIND',
                     help='keep what is drawn, in NAME.images: png or tar')
  group.add_argument('--reference', metavar='WHAT', help='what they are compared with: a folder, '
                     'a file of statistics (.npz of clean-fid, ADM or our own, a cache of '
                     'torch-fidelity), or train or test of the data set (default: train)')
  group.add_argument('--features', action='append', metavar='KIND:PATH',
                     help='inception/tensorflow, inception/pytorch or inception/clean (by the rule '
                     'of resizing) with a file of weights, or clip, dinov2, classifier with a '
                     "directory; repeat for several (default: the run's CLIP, else "
                     f'clip:{CLIP})')
  group.add_argument('--metrics', metavar='A,B', help='any of fd, fd_infinity, kid, '
                     'precision_recall, density_coverage, cmmd, kl, inception_score, and for '
                     f'models clip_score, retrieval (default: {MODEL_METRICS}, or {METRICS})')


OF_IMAGES = ('size', 'most_unreadable')
OF_MODELS = ('captions', 'keep', 'samples', 'sweep', 'follow', 'ema_halflife_images')
OF_BOTH = ('reference', 'features', 'metrics')


def check(args: argparse.Namespace) -> None:
  """Raises a UserError for options that would do nothing, or whose value is none."""
  from diffusion_jax.evaluation.keeping import KINDS
  from diffusion_jax.evaluation.scores import outputs_of

  if args.images is not None and (args.workdir or args.model or args.likelihood):
    raise UserError('--images takes no model; leave out --workdir, --model and --likelihood.')
  useless, why = (OF_IMAGES, 'without --images') if args.images is None else (
    OF_MODELS, 'with --images'
  )
  if args.likelihood:
    useless = (*OF_BOTH, *OF_IMAGES, 'captions', 'keep', 'sweep', 'follow')
    why = 'with --likelihood'
  for name in useless:
    if getattr(args, name) not in (None, False):
      raise UserError(f'--{name} does nothing {why}; leave it out.')
  _check_sweep(args)
  if args.keep is not None and args.keep not in KINDS:
    raise UserError(f'--keep is {args.keep}; choose {" or ".join(KINDS)}.')
  if args.metrics:
    outputs_of(args.metrics.split(','), {})
  if args.captions:
    lines(args.captions)


def _check_sweep(args: argparse.Namespace) -> None:
  from diffusion_jax.evaluation.sweep import combinations

  if args.follow and not args.workdir:
    raise UserError('--follow needs the run that it follows; name it by --workdir.')
  if args.follow and args.sweep:
    raise UserError('--follow takes no --sweep; sweep over the checkpoint that you choose by it.')
  for name in combinations(args.sweep)[0] if args.sweep else ():
    if getattr(args, name) is not None:
      raise UserError(f'--{name} does nothing beside --sweep {name}; leave it out.')


def lines(path: str) -> list[str]:
  """The captions of a file, one a line."""
  try:
    lines = [line.strip() for line in Path(path).read_text(encoding='utf-8').splitlines()]
  except (OSError, UnicodeDecodeError) as error:
    raise UserError(f'the captions {path} cannot be read ({error}); give UTF-8 text.') from error
  if not any(lines):
    raise UserError(f'{path} has no captions; write one a line.')
  return [line for line in lines if line]


def start() -> None:
  """Finds the other processes, where there are some."""
  from diffusion_jax.parallel.startup import start_distributed

  start_distributed()


def all_are_here(name: str) -> bool:
  """Waits until every process has come here; whether this is the first one."""
  import jax

  from diffusion_jax.parallel.agreement import agree

  agree(name, '')
  return jax.process_index() == 0


def open_comparison(
  args: argparse.Namespace, out: Path, split: Callable[[str], Any], clip: str = CLIP
) -> Comparison:
  """What --features, --metrics and --reference say, on the devices of this process.

  Args:
    split: opens a split of the data set.
    clip: the features without --features.
  """
  from diffusion_jax.evaluation.comparison import Comparison
  from diffusion_jax.evaluation.extraction import Extraction
  from diffusion_jax.evaluation.named import load_named, text_towers
  from diffusion_jax.evaluation.offline import local_mesh

  mesh = local_mesh()
  named = args.features or [f'clip:{clip}']
  metrics = (args.metrics or (METRICS if args.images else MODEL_METRICS)).split(',')
  extraction = Extraction(load_named(named, metrics, mesh), mesh)
  kept = (out.with_name(f'{out.stem}.images'), args.keep) if args.keep else None
  texts = {} if args.images else text_towers(named, extraction.extractors, mesh)
  return Comparison(
    extraction, metrics, _reference(args, extraction, split), out.with_name(f'{out.stem}.parts'),
    texts=texts, seed=args.seed,
    most_unreadable=args.most_unreadable or 0.0, kept=kept,
  )


def report(
  comparison: Comparison, found: Found, shown: dict, first: str, settings: dict | None = None
) -> dict[str, Any]:
  """Columns of figures, and, of the first, 'intervals', 'warnings', 'settings'; JSON-ready.

  Args:
    shown: is given what the page shows beside them, of that column.
    settings: what else decides the figures.
  """
  features, plan = found.pictured[first].features, found.columns[first].work.plan
  shown |= comparison.shown(found, first)
  return found.told(first) | {'settings': {
    'samples': len(features.rows), 'unreadable': len(features.trouble),
    **{name: plan[name] for name in ('images', 'model') if name in plan},
    **settings_of(comparison), **(settings or {}),
  }}


def settings_of(comparison: Comparison) -> dict[str, Any]:
  """What decides the figures, whatever the pictures are."""
  return {
    'reference': comparison.reference.name,
    'features': [extractor.name for extractor in comparison.extraction.extractors],
    'metrics': comparison.metrics, 'seed': comparison.seed,
  }


def _reference(args: argparse.Namespace, extraction, split: Callable) -> Reference:
  from diffusion_jax.evaluation.comparison import Reference
  from diffusion_jax.evaluation.images import Folder, Split
  from diffusion_jax.evaluation.statistics_files import load_statistics

  what = args.reference or 'train'
  if Path(what).is_file():
    columns = [c for c in extraction.columns if not c.endswith('logits_unbiased')]
    return Reference(what, moments={
      c: load_statistics(what, spatial=c.endswith(':spatial')) for c in columns
    })
  images = Folder(what) if what not in ('train', 'test') else Split(
    split(what), f'{args.dataset} {what}'
  )
  return Reference(images.name, images)


def of_folder(args: argparse.Namespace, out: Path, shown: dict) -> dict[str, Any] | None:
  """Scores of the pictures of --images."""
  from diffusion_jax.data.sources import open_source
  from diffusion_jax.evaluation.comparison import Column
  from diffusion_jax.evaluation.images import Folder
  from diffusion_jax.evaluation.offline import of_images

  start()
  size = SIZE if args.size is None else args.size
  split = lambda name: open_source(
    args.dataset, name, size=size, data_dir=args.data_dir, prepare=True
  )
  columns = {'samples': Column(of_images(Folder(args.images)))}
  comparison = open_comparison(args, out, split)
  found = comparison(columns)
  return None if found is None else report(comparison, found, shown, 'samples')
