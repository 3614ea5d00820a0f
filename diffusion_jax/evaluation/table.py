"""One CSV file of many evaluations, a row each, that spreadsheets and pandas read."""

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from diffusion_jax.errors import UserError
from diffusion_jax.files import atomic_write


def read_rows(path: Path) -> tuple[list[dict[str, str]], list[str]]:
  """(rows, names of columns), none where there is no file.

  UserError where the file is none of comma-separated values.
  """
  if not path.is_file():
    return [], []
  try:
    with path.open(newline='', encoding='utf-8') as file:
      reader = csv.DictReader(file, strict=True)
      rows, names = list(reader), list(reader.fieldnames or ())
    if any(None in known for known in rows):
      raise ValueError('a row is longer than the first')
  except (OSError, ValueError, csv.Error) as error:
    raise UserError(f'{path} is not a table of evaluations ({error}); move it away.') from error
  return rows, names


def as_read(row: Mapping[str, object]) -> dict[str, str]:
  """A row as it comes back from a table, without what is empty."""
  return {name: str(value) for name, value in row.items() if value not in (None, '')}


def add_rows(path: Path, new: Sequence[Mapping[str, object]]) -> None:
  """Appends rows; columns that are new come last and stay empty in the rows before.

  A row that is there already is left out. UserError as in `read_rows`.
  """
  rows, names = read_rows(path)
  names += [name for row in new for name in row if name not in names]
  names = list(dict.fromkeys(names))
  known = list(map(as_read, rows))
  rows += [row for row in new if as_read(row) not in known]
  text = io.StringIO(newline='')
  writer = csv.DictWriter(text, names, restval='')
  writer.writeheader()
  writer.writerows(rows)
  with atomic_write(path) as file:
    file.write(text.getvalue().encode())
