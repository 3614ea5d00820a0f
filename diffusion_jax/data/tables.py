"""Tables in files of Parquet and Arrow, through pyarrow where it is installed."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from diffusion_jax.errors import UserError


def pyarrow(what: str) -> Any:
  """The package; UserError, naming `what` needs it, where it is missing."""
  try:
    import pyarrow
    import pyarrow.parquet
  except ImportError as error:
    raise UserError(
      f"{what} needs the package pyarrow: install it with pip install 'diffusion_jax[data]'."
    ) from error
  return pyarrow


def rows_of(path: Path) -> Iterator[dict[str, Any]]:
  """The rows of a file of Parquet, a batch in memory at a time. ValueError, OSError: damage."""
  with pyarrow(path).parquet.ParquetFile(path) as file:
    for batch in file.iter_batches(1024):
      yield from batch.to_pylist()
