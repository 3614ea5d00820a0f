"""The pictures of a model, or of a folder, against a reference, in any features."""

import argparse
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from diffusion_jax.errors import UserError

METRICS, MODEL_METRICS, SIZE = 'fd,kid', 'fd,kid,clip_score,retrieval', 64
CLIP = 'asset:clip-openmoji-64'


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """What is compared, with what, and how."""
  group = parser.add_argument_group('what is compared')
  group.add_argument('--images', metavar='PATH', help='score pictures instead of a model: of a '
                     'folder, of tar files, of a prepared data set (FOLDER:SPLIT), or of an npz '
                     'with arr_0')
  group.add_argument('--size', type=int, metavar='N', help='with --images, edge of the images of '
                     f'--dataset in pixels (default: {SIZE})')
  group.add_argument('--most_unreadable', type=float, metavar='SHARE',
                     help='with --images, of the pictures that may be damaged; they are named and '
                     'left out (default: 0)')
  group.add_argument('--captions', metavar='FILE',
                     help='captions to draw, one a line (default: of the test split)')
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
                     'precision_recall, density_coverage, cmmd, kl, inception_score, and for '
                     f'models clip_score, retrieval (default: {MODEL_METRICS}, or {METRICS})')


OF_IMAGES, OF_MODELS = ('size', 'most_unreadable'), ('captions', 'keep', 'samples')
OF_BOTH = ('reference', 'features', 'metrics', 'save_statistics')


def check(args: argparse.Namespace) -> None:
  """Raises a UserError for options that would do nothing, or whose value is none."""
  from diffusion_jax.evaluation.keeping import KINDS
  from diffusion_jax.evaluation.scores import outputs_of
  from diffusion_jax.evaluation.statistics_files import check_suffix

  if args.images is not None and (args.workdir or args.model or args.likelihood):
    raise UserError('--images takes no model; leave out --workdir, --model and --likelihood.')
  useless, why = (OF_IMAGES, 'without --images') if args.images is None else (
    OF_MODELS, 'with --images'
  )
  if args.likelihood:
    useless, why = (*OF_BOTH, *OF_IMAGES, 'captions', 'keep'), 'with --likelihood'
  for name in useless:
    if getattr(args, name) is not None:
      raise UserError(f'--{name} does nothing {why}; leave it out.')
  if args.keep is not None and args.keep not in KINDS:
    raise UserError(f'--keep is {args.keep}; choose {" or ".join(KINDS)}.')
  if args.metrics:
    outputs_of(args.metrics.split(','), {})
  if args.captions:
    lines(args.captions)
  if args.save_statistics:
    check_suffix(args.save_statistics)


def lines(path: str) -> list[str]:
  """The captions of a file, one a line."""
  try:
    lines = [line.strip() for line in Path(path).read_text(encoding='utf-8').splitlines()]
  except (OSError, UnicodeDecodeError) as error:
    raise UserError(f'the captions {path} cannot be read ({error}); give UTF-8 text.') from error
  if not any(lines):
    raise UserError(f'{path} has no captions; write one a line.')
  return [line for line in lines if line]


@dataclasses.dataclass(frozen=True)
class Column:
  """One set of pictures to score: the work of making them, and their captions if they have some.

  keep: whether --keep is about them.
  """

  work: Any
  captions: list[str] | None = None
  keep: bool = False


def of_folder(args: argparse.Namespace, mesh) -> tuple[dict[str, Column], Callable]:
  """(columns, a function that opens a split of the data set) for --images."""
  from diffusion_jax.data.sources import open_source
  from diffusion_jax.evaluation.images import open_images
  from diffusion_jax.evaluation.offline import of_images

  size = SIZE if args.size is None else args.size
  split = lambda name: open_source(
    args.dataset, name, size=size, data_dir=args.data_dir, prepare=True
  )
  return {'samples': Column(of_images(open_images(args.images)))}, split


def run(
  args: argparse.Namespace, out: Path, shown: dict,
  columns: Callable[[argparse.Namespace, Any], tuple[dict[str, Column], Callable]],
  clip: str = CLIP, settings: dict | None = None,
) -> dict | None:
  """Columns of figures, 'intervals', 'warnings', 'settings'; None but in the first process.

  Args:
    shown: is given what the page shows beside them, of the first column.
    columns: as `of_folder`.
    clip: the features without --features.
    settings: what else decides the figures.
  """
  import jax

  from diffusion_jax.evaluation.extraction import Extraction
  from diffusion_jax.evaluation.offline import compare, local_mesh
  from diffusion_jax.evaluation.reference import write_moments
  from diffusion_jax.parallel.startup import start_distributed

  start_distributed()
  mesh = local_mesh()
  named, metrics = args.features or [f'clip:{clip}'], _metrics(args)
  computed = [*metrics, 'fd'] if args.save_statistics else metrics
  extraction = Extraction(_extractors(named, computed, mesh), mesh)
  _check_towers(metrics, extraction.extractors)
  made, split = columns(args, mesh)
  name, reference, notes = _reference(args, metrics, extraction, split)
  _check_metrics(metrics, extraction, reference, made)
  found, reference = _features(args, out, extraction, made, reference)
  if jax.process_index():
    return None
  texts = {
    c: _texts(named, extraction, column.captions) for c, column in made.items() if column.captions
  }
  scores = {
    c: compare(found[c][0], reference[0], metrics, texts=texts.get(c), seed=args.seed)
    for c in made
  }
  first = next(iter(made))
  scores[first].warnings[:0] = notes
  if args.save_statistics:
    files = write_moments(args.save_statistics, found[first][0].columns, extraction.extractors)
    print(f'statistics of {first} written to {", ".join(map(str, files))}')
  shown |= _shown(found[first], reference, texts.get(first), made[first].captions)
  for text in (*found[first][0].trouble, *scores[first].warnings):
    print(f'note: {text}')
  return {c: one.values for c, one in scores.items()} | {
    'intervals': {n: interval._asdict() for n, interval in scores[first].intervals.items()},
    'warnings': scores[first].warnings,
    'settings': {
      'samples': len(found[first][0].rows), 'unreadable': len(found[first][0].trouble),
      **_told(made[first].work.plan), 'reference': name,
      'features': [extractor.name for extractor in extraction.extractors], 'metrics': metrics,
      'seed': args.seed, **(settings or {}),
    },
  }


def _metrics(args: argparse.Namespace) -> list[str]:
  if args.images and args.save_statistics and not (args.metrics or args.reference):
    return []
  return (args.metrics or (METRICS if args.images else MODEL_METRICS)).split(',')


def _told(plan: dict) -> dict:
  return {name: plan[name] for name in ('images', 'model') if name in plan}


def _check_metrics(metrics: list[str], extraction, reference, columns: dict[str, Column]) -> None:
  from diffusion_jax.evaluation.scores import check_metrics

  known = {'moments', 'reference'}
  if isinstance(reference, dict):
    known = {'moments'} if reference else set()
  known |= {'texts'} if all(column.captions for column in columns.values()) else set()
  check_metrics(metrics, [column.rpartition(':')[2] for column in extraction.columns], known)


def _check_towers(metrics: list[str], extractors: list) -> None:
  """Raises a UserError where texts are asked of CLIPs that all are image towers alone."""
  from diffusion_jax.evaluation import scores

  clips = [extractor for extractor in extractors if hasattr(extractor, 'has_texts')]
  asked = [name for name in metrics if 'texts' in scores.METRICS[name].needs]
  if asked and clips and not any(clip.has_texts for clip in clips):
    raise UserError(
      f'{asked[0]} needs texts, but {clips[0].name} is an image tower alone; give a CLIP with both '
      f'towers in --features, or leave {asked[0]} out of --metrics.'
    )


def _features(args, out: Path, extraction, columns: dict[str, Column], reference) -> tuple:
  """({column: (features, thumbnails)}, the same of the reference, whose second may be None)."""
  from diffusion_jax.evaluation.keeping import keeper
  from diffusion_jax.evaluation.offline import features_of, of_images

  parts, share = out.with_name(f'{out.stem}.parts'), args.most_unreadable or 0.0
  found = {}
  for name, column in columns.items():
    keep = None
    if args.keep and column.keep:
      keep = keeper(out.with_name(f'{out.stem}.images'), args.keep)
    found[name] = features_of(
      column.work, extraction, parts / name, most_unreadable=share, keep=keep, label=name
    )
  if isinstance(reference, dict):
    return found, (reference, None)
  return found, features_of(
    of_images(reference), extraction, parts / 'reference', most_unreadable=share,
    label='reference',
  )


def _texts(named: list[str], extraction, captions: list[str]) -> dict:
  """Column -> embeddings of the captions, of every CLIP."""
  from diffusion_jax.evaluation.extraction import column
  from diffusion_jax.evaluation.features import CLIPFeatures
  from diffusion_jax.io.pretrained import resolve
  from diffusion_jax.models.text.tokenizer import load_tokenizer

  found = {}
  for text, extractor in zip(named, extraction.extractors, strict=True):
    kind, _, path = text.partition(':')
    if kind == 'clip' and extractor.has_texts:
      clip = CLIPFeatures(extractor, load_tokenizer(resolve(path)), extraction.mesh)
      found[column(extractor, 'embedding')] = clip.texts(captions)
  return found


def _shown(samples: tuple, reference: tuple, texts: dict | None, captions) -> dict:
  from diffusion_jax.evaluation.showing import best_and_worst, clouds, near_copies

  found = {}
  if reference[1] is not None:
    found = {
      'clouds': clouds(samples[0], reference[0]), 'pairs': near_copies(*samples, *reference)
    }
  if texts:
    column, rows = next(iter(texts.items()))
    found |= best_and_worst(*samples, column, rows, captions)
  return found


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
    inception = kind.startswith('inception')
    outputs = outputs_of(metrics, InceptionConfig().widths) if inception else ()
    found.append(load_extractor(kind, path, outputs=outputs, mesh=mesh))
  return found


def _reference(
  args: argparse.Namespace, metrics: list[str], extraction, split: Callable
) -> tuple:
  """(name, the images, or what a file of statistics says of each kind of features, warnings).

  Images that are scored without a reference are compared with nothing.
  """
  from diffusion_jax.evaluation import scores
  from diffusion_jax.evaluation.images import Split
  from diffusion_jax.evaluation.reference import open_reference

  what = args.reference
  needs = {need for name in metrics for need in scores.METRICS[name].needs}
  if args.images and what is None and not needs & {'reference', 'moments'}:
    return 'none', {}, []
  if what not in (None, 'train', 'test'):
    return open_reference(what, extraction.columns)
  images = Split(split(what or 'train'), f'{args.dataset} {what or "train"}')
  return images.name, images, []
