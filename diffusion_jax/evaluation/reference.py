"""References: images or files of statistics, read and written."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float

from diffusion_jax.errors import UserError
from diffusion_jax.evaluation.extractors import Extractor
from diffusion_jax.evaluation.images import ImageSet, holds_images, open_images
from diffusion_jax.evaluation.metrics.metric import POOLED
from diffusion_jax.evaluation.statistics import (
  Moments,
  Statistics,
  check_suffix,
  described,
  load_statistics,
  save_statistics,
)

SPATIAL = 'spatial'


def open_reference(
  path: str, columns: Mapping[str, int]
) -> tuple[str, ImageSet | dict[str, Moments], list[str]]:
  """(name, images or file statistics of each kind of features, warnings).

  A file of both, such as ADM's reference batches, gives images, which suit every metric. UserError
  as `open_images` and `moments_of`.
  """
  if Path(path).is_file() and not holds_images(path):
    return path, *moments_of(path, columns)
  images = open_images(path)
  return images.name, images, [*images.notes]


def moments_of(
  path: str | Path, columns: Mapping[str, int]
) -> tuple[dict[str, Moments], list[str]]:
  """(file statistics of each kind of features, warnings); columns: 'EXTRACTOR:OUTPUT' -> width.

  UserError: an unreadable file, or another network, resize rule or width.
  """
  known, has_spatial = described(path)
  found: dict[str, Moments] = {}
  notes: dict[str, None] = {}
  for column, width in columns.items():
    name, _, output = column.rpartition(':')
    if output not in (*POOLED, SPATIAL):
      continue
    notes |= dict.fromkeys(comparable(path, known, name))
    if output == SPATIAL and not has_spatial:
      notes[f'{path} has no spatial features (mu_s, sigma_s), so that there is no sfid.'] = None
      continue
    found[column] = load_statistics(path, spatial=output == SPATIAL)
    if len(found[column].mean) != width:
      raise UserError(
        f'the statistics in {path} are {len(found[column].mean)} wide, but {column} is {width}; '
        'give statistics of the same features.'
      )
  return found, list(notes)


def comparable(path: str | Path, known: str, name: str) -> list[str]:
  """Warnings where a file's features are `known` ('' if it does not say) and ours `name`.

  UserError: another kind of network or resize rule.
  """
  if not known:
    return [f'{path} does not say in which features it is; the values are right if in {name}.']
  theirs, ours = known.split('/'), name.split('/')
  if (theirs[0], theirs[-1]) != (ours[0], ours[-1]):
    raise UserError(
      f'the statistics in {path} are in the features {known}, which cannot be compared with '
      f'{name}; name the same in --features, or compute the file again.'
    )
  if theirs == ours:
    return []
  return [f'{path} is in the features {known}; values in {name} are right if both are the same.']


def write_moments(
  path: str | Path, columns: Mapping[str, Float[np.ndarray, 'n d']],
  extractors: Sequence[Extractor],
) -> list[Path]:
  """Write feature statistics, a file for each extractor; return the paths.

  Of several extractors, each adds its name before the suffix. UserError: another suffix than
  `statistics.SUFFIXES`, or fewer than two images.
  """
  path, written = check_suffix(path), []
  for extractor in extractors:
    (pooled,) = (columns[f'{extractor.name}:{o}'] for o in extractor.widths if o in POOLED)
    # torch-fidelity knows no spatial features.
    spatial = columns.get(f'{extractor.name}:{SPATIAL}') if path.suffix == '.npz' else None
    file = path if len(extractors) == 1 else path.with_name(
      f'{path.stem}-{extractor.name.replace("/", "-")}{path.suffix}'
    )
    save_statistics(
      file, Statistics.from_features(pooled), features=extractor.name,
      spatial=None if spatial is None else Statistics.from_features(spatial),
    )
    written.append(file)
  return written
