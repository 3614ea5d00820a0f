"""The pictures of a model, or of a folder, against a reference, in any features."""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusion_jax.cli import evaluate_told
from diffusion_jax.errors import UserError

if TYPE_CHECKING:
  from diffusion_jax.evaluation.comparison import Comparison, Found, Reference
  from diffusion_jax.evaluation.images import ImageSet, Split

METRICS, MODEL_METRICS, SIZE = 'fd,kid', 'fd,kid,clip_score,retrieval', 64
PAIR_METRICS = 'fd,psnr,ssim,l1'
CLIP = 'asset:clip-openmoji-64'


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """What is compared, with what, and how."""
  group = parser.add_argument_group('what is compared')
  group.add_argument('--images', metavar='PATH', help='score pictures instead of a model: of a '
                     'folder, of tar files, of a prepared data set (FOLDER:SPLIT), or of an npz '
                     'with arr_0')
  group.add_argument('--size', type=int, metavar='N', help='with --images, or an autoencoder by '
                     f'--model, edge of the images of --dataset in pixels (default: {SIZE}, or '
                     'what the autoencoder was trained at)')
  group.add_argument('--most_unreadable', type=float, metavar='SHARE',
                     help='of the pictures of a set that may be damaged; they are named and left '
                     "out (default: the run's data.most_unreadable, else 0)")
  group.add_argument('--sweep', action='append', metavar='NAME=A,B', help='score every combination '
                     'of values of guidance, steps, sampler, spacing, guidance_rescale, '
                     'image_guidance, clip_skip, ema_halflife_images; repeat for several names')
  group.add_argument('--follow', action='store_true', help='with --workdir, score each checkpoint '
                     'as it is written, until the run is over')
  group.add_argument('--captions', metavar='FILE',
                     help='captions to draw, one a line (default: of the test split)')
  group.add_argument('--labels', metavar='FILE', help='with --captions, the class of each, one a '
                     'line, for class_accuracy (default: of the test split)')
  group.add_argument('--keep', metavar='KIND',
                     help='keep what is drawn, in NAME.images: png or tar')
  group.add_argument('--reference', metavar='WHAT', help='what they are compared with: pictures '
                     'as for --images, a file of statistics (.npz with mu and sigma, a cache of '
                     'torch-fidelity), or train or test of the data set (default: train)')
  group.add_argument('--save_statistics', metavar='FILE', help='write the mean and covariance of '
                     'the features, as .npz (mu, sigma) or .pt (a cache of torch-fidelity); with '
                     '--images, and without --metrics and --reference, nothing else is computed')
  group.add_argument('--features', action='append', metavar='KIND:PATH',
                     help='inception/tensorflow, inception/pytorch or inception/clean (by the rule '
                     'of resizing) with a file of weights, or clip, dinov2, classifier with a '
                     "directory; repeat for several (default: the run's CLIP, else "
                     f'clip:{CLIP})')
  group.add_argument('--metrics', metavar='A,B', help='any of fd, fd_infinity, kid, '
                     'precision_recall, density_coverage, cmmd, kl, inception_score, for models '
                     'clip_score, retrieval, class_accuracy (in the features of a classifier), '
                     'bits_per_dim, and for autoencoders psnr, ssim, l1, lpips (default: '
                     f'{MODEL_METRICS}; without captions {METRICS}, and for autoencoders '
                     f'{PAIR_METRICS})')


OF_MODELS = ('captions', 'labels', 'keep', 'samples', 'sweep', 'follow', 'ema_halflife_images')
OF_BOTH = ('reference', 'features', 'metrics', 'save_statistics')


def check(args: argparse.Namespace) -> None:
  """Raises a UserError for options that would do nothing, or whose value is none."""
  from diffusion_jax.evaluation.pieces import KINDS
  from diffusion_jax.evaluation.scores import outputs_of
  from diffusion_jax.evaluation.statistics import check_suffix

  if args.images is not None and (args.workdir or args.model or args.likelihood):
    raise UserError('--images takes no model; leave out --workdir, --model and --likelihood.')
  useless, why = () if args.images is None else OF_MODELS, 'with --images'
  if args.likelihood:
    useless = (*OF_BOTH, 'most_unreadable', 'captions', 'labels', 'keep', 'sweep', 'follow')
    why = 'with --likelihood'
  for name in useless:
    if getattr(args, name) not in (None, False):
      raise UserError(f'--{name} does nothing {why}; leave it out.')
  _check_sweep(args)
  if args.keep is not None and args.keep not in KINDS:
    raise UserError(f'--keep is {args.keep}; choose {" or ".join(KINDS)}.')
  if args.metrics:
    outputs_of(args.metrics.split(','), {})
  if args.labels and not args.captions:
    raise UserError('--labels are those of --captions; give both.')
  if args.captions:
    captions, labels = lines(args.captions), labels_of(args)
    if labels and len(labels) != len(captions):
      raise UserError(
        f'{args.labels} has {len(labels)} labels, but {args.captions} {len(captions)} captions; '
        'write one label for each.'
      )
  if args.save_statistics:
    check_suffix(args.save_statistics)


def _check_sweep(args: argparse.Namespace) -> None:
  from diffusion_jax.evaluation.sweep import combinations

  if args.follow and not args.workdir:
    raise UserError('--follow needs the run that it follows; name it by --workdir.')
  if args.follow and args.sweep:
    raise UserError('--follow takes no --sweep; sweep over the checkpoint that you choose by it.')
  if args.save_statistics and (args.follow or args.sweep):
    raise UserError(
      'statistics are of one set of pictures; leave out --save_statistics, or --sweep and --follow.'
    )
  for name in combinations(args.sweep)[0] if args.sweep else ():
    if getattr(args, name) is not None:
      raise UserError(f'--{name} does nothing beside --sweep {name}; leave it out.')


def labels_of(args: argparse.Namespace) -> list[str] | None:
  """The classes of --captions."""
  return lines(args.labels, 'labels') if args.labels else None


def lines(path: str, what: str = 'captions') -> list[str]:
  """The captions, or what else it is, of a file, one a line."""
  from diffusion_jax.data.captions import read_lines

  found = read_lines(path, what)
  if not found:
    raise UserError(f'{path} has no {what}; write one a line.')
  return found


def start() -> None:
  """Finds the other processes, where there are some."""
  from diffusion_jax.parallel.startup import start_distributed

  start_distributed()


def all_are_here(name: str) -> bool:
  """Waits until every process has come here, a page may take long; whether this is the first one.
  """
  import jax

  from diffusion_jax.parallel.processes import A_DAY, agree

  agree(name, '', A_DAY)
  return jax.process_index() == 0


def open_comparison(
  args: argparse.Namespace, out: Path, split: Callable[[str], ImageSet], clip: str = CLIP,
  reference: Reference | None = None, default: str = MODEL_METRICS,
) -> Comparison:
  """What --features, --metrics and --reference say, on the devices of this process.

  Args:
    split: opens a split of the data set, by its name.
    clip: the features without --features.
    reference: in place of --reference. default: the metrics without --metrics.
  """
  from diffusion_jax.evaluation.comparison import Comparison, local_mesh
  from diffusion_jax.evaluation.extract import Extraction
  from diffusion_jax.evaluation.extractors import load_named
  from diffusion_jax.evaluation.extractors.clip import text_towers

  mesh = local_mesh()
  named = args.features or [f'clip:{clip}']
  metrics = _metrics(args, default)
  computed = list(dict.fromkeys([*metrics, 'fd'])) if args.save_statistics else metrics
  extraction = Extraction(load_named(named, computed, mesh), mesh)
  _check_towers(metrics, extraction.extractors)
  kept = (out.with_name(f'{out.stem}.images'), args.keep) if args.keep else None
  captioned = not args.images and reference is None
  return Comparison(
    extraction, metrics, reference or _reference(args, metrics, extraction, split),
    out.with_name(f'{out.stem}.parts'),
    texts=text_towers(named, extraction.extractors, mesh) if captioned else {}, named=named,
    seed=args.seed, most_unreadable=args.most_unreadable or 0.0, kept=kept,
  )


def _metrics(args: argparse.Namespace, default: str) -> list[str]:
  if args.images and args.save_statistics and not (args.metrics or args.reference):
    return []
  return (args.metrics or (METRICS if args.images else default)).split(',')


def _check_towers(metrics: list[str], extractors: list) -> None:
  """Raises a UserError where texts are asked of CLIPs that all are image towers alone."""
  from diffusion_jax.evaluation import scores

  clips = [extractor for extractor in extractors if hasattr(extractor, 'has_texts')]
  asked = [name for name in metrics if 'texts' in scores.metric_of(name).needs]
  if asked and clips and not any(clip.has_texts for clip in clips):
    raise UserError(
      f'{asked[0]} needs texts, but {clips[0].name} is an image tower alone; give a CLIP with both '
      f'towers in --features, or leave {asked[0]} out of --metrics.'
    )


def report(
  args: argparse.Namespace, comparison: Comparison, found: Found, shown: dict,
  settings: dict | None = None, about: Sequence[str] = (), tested: Split | None = None,
) -> dict[str, Any]:
  """Columns of figures, and, of the first, 'intervals', 'measured', 'warnings', 'settings';
  JSON-ready.

  Args:
    shown: is given what the page shows beside them, of that column.
    settings: what else decides the figures.
    about, tested: as for `evaluate_told.told`.
  """
  from diffusion_jax.evaluation.reference import write_moments

  first = found.first
  features, plan = found.pictured[first].features, found.columns[first].work.plan
  shown |= comparison.shown(found)
  if args.save_statistics:
    files = write_moments(
      args.save_statistics, features.columns, comparison.extraction.extractors
    )
    print(f'statistics of {first} written to {", ".join(map(str, files))}')
  measured, warnings = evaluate_told.told(comparison, len(features.rows), about, tested)
  for text in warnings:
    print(f'note: {text}')
  scores = found.told()
  scores['warnings'] = [*warnings, *scores['warnings']]
  return scores | {'measured': measured, 'settings': {
    'samples': len(features.rows), 'unreadable': len(features.trouble),
    **{name: plan[name] for name in ('images', 'model') if name in plan},
    **settings_of(comparison), **(settings or {}),
  }}


def settings_of(comparison: Comparison) -> dict[str, Any]:
  """What decides the figures, whatever the pictures are."""
  return {
    'reference': comparison.reference.name, 'reference_images': comparison.reference.count,
    'features': [extractor.name for extractor in comparison.extraction.extractors],
    'metrics': comparison.metrics, 'seed': comparison.seed,
  }


def open_split(args: argparse.Namespace, name: str, size: int | None = None) -> Split:
  """A split of --dataset, at a size of --size where none is given."""
  from diffusion_jax.data.sources.tfds import open_source

  size = size or (SIZE if args.size is None else args.size)
  source = open_source(args.dataset, name, size=size, data_dir=args.data_dir, prepare=True)
  return named_split(source, args.dataset, size, name)


def named_split(source, dataset: str, size: int, name: str) -> Split:
  """A split of a data set as a set of images that knows which it is."""
  from diffusion_jax.data.splits import fingerprint
  from diffusion_jax.evaluation.images import Split
  from diffusion_jax.runs.trained_on import pictures_of

  return Split(
    source, split_name(dataset, size, name),
    pictures=pictures_of(dataset, name, size, len(source), fingerprint(source)),
  )


def say_unreadable(sentence: str) -> None:
  """Names a record that is left out."""
  print(f'diffusion_jax evaluate: left out: {sentence}', file=sys.stderr)


def split_name(dataset: str, size: int, name: str) -> str:
  """What a reference is called: images of another size are another one."""
  return f'{dataset} {size} px {name}'


def _reference(
  args: argparse.Namespace, metrics: list[str], extraction, split: Callable
) -> Reference:
  """Images that are scored without a reference are compared with nothing."""
  from diffusion_jax.evaluation import scores
  from diffusion_jax.evaluation.comparison import Reference
  from diffusion_jax.evaluation.reference import open_reference

  what = args.reference
  needs = {need for name in metrics for need in scores.metric_of(name).needs}
  if args.images and what is None and not needs & {'reference', 'moments'}:
    return Reference('none', moments={})
  if what in (None, 'train', 'test'):
    images = split(what or 'train')
    return Reference(images.name, images)
  name, found, notes = open_reference(what, extraction.columns)
  known = {'moments' if isinstance(found, dict) else 'images': found}
  return Reference(name, notes=tuple(notes), **known)


def of_folder(args: argparse.Namespace, out: Path, shown: dict) -> dict[str, Any] | None:
  """Scores of the pictures of --images."""
  from diffusion_jax.evaluation.comparison import Column, of_images
  from diffusion_jax.evaluation.images import open_images

  start()
  images = open_images(args.images)  # Before a data set is prepared, which may take minutes.
  comparison = open_comparison(args, out, functools.partial(open_split, args))
  found = comparison({'samples': Column(of_images(images))})
  if found is None:
    return None
  for note in images.notes:
    print(f'note: {note}')
  found.scores[found.first].warnings.extend(images.notes)
  return report(args, comparison, found, shown, about=[f'They are of {images.name}.'])
