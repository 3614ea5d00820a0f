"""Makes a data set on disk, once, in a form that is read at random and without TensorFlow."""

import contextlib
import io
import os
from pathlib import Path
from typing import Any

from diffusion_jax.data.prepared_metadata import METADATA, check_metadata
from diffusion_jax.errors import UserError
from diffusion_jax.files import first_line, reading

_ENVIRONMENT = 'DIFFUSION_JAX_DATA'


def prepare(dataset: str, size: int, data_dir: str | None = None) -> str:
  """Prepares a data set unless that is done already.

  An interrupted run leaves a folder with another name, which is never read. When two processes
  prepare at once, the first to finish wins and the second uses its result.

  Args:
    dataset: a name in `DATASETS`.
    size: image edge in pixels.
    data_dir: folder for all data sets; by default $DIFFUSION_JAX_DATA, else
      ~/.cache/diffusion_jax/data.

  Returns:
    The folder of the prepared data set.

  Raises:
    UserError: unknown data set or size, missing packages, or a folder that cannot be written.
  """
  builder = make_builder(dataset, size, data_dir)
  if not is_prepared(builder):
    _generate(builder)
  return str(builder.data_dir)


def default_data_dir() -> str:
  """Where data sets are kept when no folder is given."""
  return os.environ.get(_ENVIRONMENT) or str(Path.home() / '.cache' / 'diffusion_jax' / 'data')


def make_builder(dataset: str, size: int, data_dir: str | None = None) -> Any:
  """The TFDS builder of a data set, prepared or not.

  Raises:
    UserError: unknown data set or size, or a data set on disk that cannot be understood.
  """
  if dataset not in DATASETS:
    known = ', '.join(sorted(DATASETS))
    raise UserError(f'Unknown data set {dataset!r}: use one of {known}.')
  make, sizes = DATASETS[dataset]
  if size not in sizes:
    raise UserError(f'{dataset} has no size {size!r}: use one of {", ".join(map(str, sizes))}.')
  root = str(Path(data_dir or default_data_dir()).expanduser())
  remedy = 'delete that folder and prepare it again'
  with reading(f'The data set {dataset} in {root}', remedy=remedy):
    for info in Path(root, dataset, str(size)).glob(f'*/{METADATA}'):
      check_metadata(info.parent)
    return make(size, root)


def is_prepared(builder: Any) -> bool:
  """Whether the data set of this builder is complete on disk."""
  return (Path(builder.data_dir) / METADATA).exists()


def _openmoji(size: int, data_dir: str) -> Any:
  from diffusion_jax.data.datasets.openmoji.builder import Openmoji

  return Openmoji(config=str(size), data_dir=data_dir, file_format='array_record')


DATASETS = {'openmoji': (_openmoji, (32, 64, 128))}
"""By name: how to make the builder from (size, data_dir), and the sizes there are."""


def _generate(builder: Any) -> None:
  import tensorflow_datasets as tfds

  tfds.disable_progress_bar()  # Ours says more in one line.
  config = tfds.download.DownloadConfig(try_download_gcs=False)
  try:
    with contextlib.redirect_stdout(io.StringIO()):
      builder.download_and_prepare(download_config=config)
  except OSError as error:
    # TFDS renames a finished folder into place, which fails when another process was faster.
    if not is_prepared(builder):
      raise UserError(
        f'Cannot write the data set to {builder.data_dir} ({first_line(error)}): '
        f'choose another folder with --data_dir or ${_ENVIRONMENT}.'
      ) from error
