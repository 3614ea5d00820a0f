"""The evaluation job: samples and a reference -> features -> figures. See `cli.evaluate`."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from diffusion_jax.errors import UserError
from diffusion_jax.evaluation.chunks import Chunks
from diffusion_jax.evaluation.extraction import Extraction, Features, Made, extract, gather, reader
from diffusion_jax.evaluation.images import ImageSet
from diffusion_jax.evaluation.keeping import Keeper, Thumbnails
from diffusion_jax.evaluation.scores import Compared, Scores, score, takes_reference
from diffusion_jax.evaluation.statistics import Moments
from diffusion_jax.parallel.mesh import MeshConfig, make_mesh
from diffusion_jax.parallel.processes import agree
from diffusion_jax.pipelines.model import Diffusion, SampleConfig
from diffusion_jax.types import Weights

CHUNK = 64
"""Images of a piece: what is made again, at most, after a kill."""


def local_mesh() -> Mesh:
  """A mesh of the devices of this process alone."""
  return make_mesh(MeshConfig(), jax.local_devices()[: len(jax.devices())])


@dataclasses.dataclass(frozen=True)
class Work:
  """Images whose features are wanted: how many, what decides them, and how they are made.

  begin: called by all processes together before any image is made, and only then. each: the figures
  of single images that come of making them.
  """

  total: int
  plan: dict[str, Any]
  make: Callable[[range], Made]
  begin: Callable[[], Any] = lambda: None
  each: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class FiguresOf:
  """Figures of single images: their names, what decides them, and a function of a model's weights
  and a range of images that computes them, [n] each."""

  names: tuple[str, ...]
  plan: dict[str, Any]
  compute: Callable[[Weights, range], dict[str, np.ndarray]]


def of_images(images: ImageSet) -> Work:
  """The work of reading a set of images."""
  return Work(len(images), {'images': images.name, 'files': images.stamp}, reader(images))


def of_model(
  model: Diffusion, weights: Callable[[], Weights], name: str, captions: Sequence[str],
  sample: SampleConfig, *, seed: int, mesh: Mesh, batch_size: int = 16,
  figures: FiguresOf | None = None,
) -> Work:
  """The work of drawing an image for each caption; image i depends on the seed and i alone.

  Args:
    weights: gives them on `mesh`; first called by all processes together, when there is something
      to draw.
    name: of the model with its weights, such as a run and its step.
    figures: what else is wanted of the model for each caption, such as the bits of its real image.
  """

  def make(items: range) -> Made:
    images = [image for batch in model.generate(
      weights(), captions[items.start : items.stop], sample, seed=seed, mesh=mesh,
      batch_size=batch_size, first=items.start,
    ) for image in batch]
    each = figures.compute(weights(), items) if figures else {}
    return Made(images, [''] * len(images), each)

  plan = {'model': name, 'captions': list(captions), 'seed': seed,
          'sample': dataclasses.asdict(sample), **(figures.plan if figures else {})}
  return Work(len(captions), plan, make, weights, figures.names if figures else ())


def features_of(
  work: Work, extraction: Extraction, directory: Path, *, most_unreadable: float = 0.0,
  keep: Keeper | None = None, label: str = '', chunk: int = CHUNK,
) -> tuple[Features, Thumbnails]:
  """The features of all of the work's images, of which `directory` has what was done before.

  And small pictures of them.

  All processes must call it together; each makes its share, and all get the whole.

  Raises:
    UserError: too many images cannot be read, or the directory holds other results.
  """
  plan = {**work.plan, **extraction.plan}
  if work.each:
    plan['each'] = sorted(work.each)
  chunks = Chunks(directory, plan, total=work.total, size=chunk)
  # Pictures that an earlier start has not kept have to be made once more.
  missing = chunks.missing((lambda items: not keep.has(items)) if keep else None)
  if any(map(json.loads, agree('features/missing', json.dumps(bool(missing))))):
    work.begin()
    extract(chunks, work.make, extraction, missing=missing, keep=keep, label=label)
    agree('features/made', '')
  return gather(chunks, most_unreadable), Thumbnails(chunks)


def _known(
  reference: Features | dict[str, Moments], column: str
) -> tuple[np.ndarray | None, Moments | None]:
  """The reference's features, where there are any, and their moments."""
  if not isinstance(reference, Features):
    return None, reference.get(column)
  return reference.columns[column], reference.statistics(column)


def compare(
  samples: Features, reference: Features | dict[str, Moments], metrics: Sequence[str], *,
  texts: dict[str, np.ndarray] | None = None, labels: dict[str, np.ndarray] | None = None,
  own: bool = False, seed: int = 0, intervals: bool = True,
) -> Scores:
  """Every metric of the samples against the reference.

  Args:
    reference: its features, or what is known of them by column, from files of statistics.
    texts: column -> embeddings [total d] of the captions of all samples, unreadable ones too.
    labels: column -> numbers [total] of the classes that they should be of.
    own: whether the samples are reconstructions of the reference.
    intervals: whether to compute those that take resampling.
  """
  rows = lambda known, column: known[column][samples.rows] if column in (known or ()) else None
  compared = [
    Compared(f'image:{name}', values[:, None]) for name, values in samples.each.items()
  ]
  for column, values in samples.columns.items():
    there, moments = None, None
    if takes_reference(column.rpartition(':')[2]):
      there, moments = _known(reference, column)
    if moments is not None and moments.mean.shape != values.shape[1:]:
      raise UserError(
        f'the statistics of the reference are {len(moments.mean)} wide, but {column} is '
        f'{values.shape[1]}; give statistics of the same features.'
      )
    compared.append(Compared(
      column, values, moments, there, rows(texts, column), rows(labels, column), own
    ))
  scores = score(metrics, compared, seed=seed, intervals=intervals)
  if samples.trouble:
    scores.warnings.append(f'{len(samples.trouble)} images could not be read and were left out.')
  if isinstance(reference, Features) and reference.trouble:
    scores.warnings.append(
      f'{len(reference.trouble)} images of the reference could not be read and were left out.'
    )
  if isinstance(reference, Features) and None not in (samples.edge, reference.edge):
    if samples.edge != reference.edge and any(takes_reference(one.output) for one in compared):
      scores.warnings.append(
        f'The samples are {samples.edge:g} pixels wide, the images of the reference '
        f'{reference.edge:g}: how sharp either is counts as a difference, too.'
      )
  return scores
