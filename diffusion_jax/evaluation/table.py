"""One CSV file of many evaluations, a row each, that spreadsheets and pandas read."""

import csv
import io
from collections.abc import Mapping
from pathlib import Path

from diffusion_jax.errors import UserError
from diffusion_jax.io.whole import replacing


def add_row(path: Path, row: Mapping[str, object]) -> None:
  """Appends a row; columns that are new come last and stay empty in the rows before.

  UserError where the file is none of comma-separated values.
  """
  rows, names = [], []
  try:
    if path.is_file():
      with path.open(newline='', encoding='utf-8') as file:
        reader = csv.DictReader(file, strict=True)
        rows, names = list(reader), list(reader.fieldnames or ())
    if any(None in known for known in rows):
      raise ValueError('a row is longer than the first')
  except (OSError, ValueError, csv.Error) as error:
    raise UserError(f'{path} is not a table of evaluations ({error}); move it away.') from error
  names += [name for name in row if name not in names]
  text = io.StringIO(newline='')
  writer = csv.DictWriter(text, names, restval='')
  writer.writeheader()
  writer.writerows([*rows, row])
  with replacing(path) as file:
    file.write(text.getvalue().encode())
