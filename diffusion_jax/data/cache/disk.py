"""Rows of a cache in a folder of files, which outlive the process and are mended.

Files are named after what is in them (see `files`), so what is there of the wanted shards is simply
kept, whoever has written it and however that ended. Of other files rows are copied whose records
are wanted; the rest is encoded. What is not wanted is removed at the end.
"""

import contextlib
import itertools
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from diffusion_jax.data.cache import identity
from diffusion_jax.data.cache.encoding import Encoder
from diffusion_jax.data.cache.files import (
  CHECKED,
  MANIFEST,
  NAME,
  OpenShards,
  is_whole,
  open_shard,
  shards_in,
  temporaries_in,
  write_shard,
)
from diffusion_jax.data.cache.rows import DIGEST, Row, Rows, shard_of
from diffusion_jax.data.cache.store import can_read, span_of
from diffusion_jax.errors import UserError
from diffusion_jax.files import atomic_write, first_line, read_object, say
from diffusion_jax.parallel.processes import A_DAY, agree, in_step

FORMAT = 1
"""Of the files; and of what encoders compute, where that has changed."""
_KEY = f'S{DIGEST}'
"""Digests as NumPy can sort them."""



class DiskStore:
  """Files in a folder; what is there already is kept, if it is of the same kind.

  source: its name, for the manifest, such as 'folder:PATH'.
  """

  says = True

  def __init__(self, folder: Path, source: str):
    self.folder, self._source = Path(folder), source

  def begin(self, encoder: Encoder) -> list[int]:
    """UserError: a cache of something else, a folder that cannot be written, or no room."""
    self._encoder, folder = encoder, self.folder
    facts = {'source': self._source, **encoder.identity()}
    in_step(f'cache/{encoder.name}/folder', lambda: self._take(facts), (UserError,))
    encoder.options.report('encoding', message=(
      f'looking for {encoder.name} of {len(encoder):,} records in {folder}, by their contents'
    ))
    keys, base = encoder.keys, identity.of_value([FORMAT, encoder.name, facts])
    self._ids = [
      identity.of_value([base, keys[span.start : span.stop].tobytes().hex()])
      for span in (span_of(encoder, n) for n in range(-(-len(encoder) // encoder.rows)))
    ]
    self._facts, self._new = facts, {}
    self._found = self._present()
    missing = [n for n, name in enumerate(self._ids) if name not in self._found]
    missing = sorted({*missing, *self._now_readable()})
    self._others = _Reused(folder, self._other_files() if missing else ())
    in_step(f'cache/{encoder.name}/room', lambda: self._check_room(len(missing)), (UserError,))
    return missing

  def _take(self, facts: Mapping[str, str]) -> None:
    """Make the folder, or check what it is of. Of several processes the first writes."""
    try:
      self.folder.mkdir(parents=True, exist_ok=True)
      path = self.folder / MANIFEST
      if path.exists():
        _check_manifest(path, facts)
      elif jax.process_index() == 0:
        self._write(facts, [])
    except OSError as error:
      raise self._unwritable(error) from error

  def _unwritable(self, error: OSError) -> UserError:
    return UserError(
      f'the cache {self.folder} cannot be written ({first_line(error)}); make room, or give '
      'another settings.cache_dir.'
    )

  def _write(self, facts: Mapping[str, str], files: Sequence[str]) -> None:
    manifest = {
      'format': FORMAT, 'kind': self._encoder.name, 'complete': bool(files),
      'records': len(self._encoder), 'records_in_a_file': self._encoder.rows, 'made_of': facts,
      'files': list(files),
    }
    with atomic_write(self.folder / MANIFEST, flushed=True) as file:
      file.write(json.dumps(manifest, indent=1).encode() + b'\n')

  def _present(self) -> dict[str, str]:
    """Return ID -> file of shards that are there, whole, and wanted; damaged ones are removed."""
    folder, name = self.folder, self._encoder.name
    listed, checked = shards_in(folder), _read_checked(folder)
    wanted = {i: min(listed[i], key=_empty_rows) for i in self._ids if i in listed}
    fresh = [n for n in wanted.values() if checked.get(n) != _stamp(folder / n)]
    mine = fresh[jax.process_index() :: jax.process_count()]
    bad = [n for n in mine if not is_whole(folder / n)]
    answers = agree(f'cache/{name}/bad', json.dumps([identity.of_value(wanted), bad]), A_DAY)
    seen, bad = zip(*map(json.loads, answers), strict=True)
    damaged, everywhere = {n for part in bad for n in part}, set(wanted.values())
    if len(set(seen)) > 1:  # A shared disk may show new files late.
      answers = agree(f'cache/{name}/present', json.dumps(sorted(wanted.values())))
      everywhere = set.intersection(*(set(json.loads(answer)) for answer in answers))
    if jax.process_index() == 0:
      for each in sorted(damaged):
        say(f'{folder / each} is damaged; what is in it is encoded anew', 'diffusion_jax: ')
        (folder / each).unlink(missing_ok=True)
      for path in temporaries_in(folder):
        path.unlink(missing_ok=True)
    agree(f'cache/{name}/mended', '')
    return {i: n for i, n in wanted.items() if n in everywhere and n not in damaged}

  def _other_files(self) -> list[str]:
    """Return files with rows that may be wanted in other shards, or in the same again."""
    folder, checked = self.folder, _read_checked(self.folder)
    used = {n for n in self._found.values() if not _empty_rows(n)}
    others = (n for names in shards_in(folder).values() for n in names if n not in used)
    return [n for n in others if checked.get(n) == _stamp(folder / n) or is_whole(folder / n)]

  def _now_readable(self) -> list[int]:
    """Return shards with empty rows of records that can be read by now; others are counted."""
    again = []
    for number, name in enumerate(self._ids):
      if (file := self._found.get(name)) and NAME.fullmatch(file)[3]:
        rows = open_shard(self.folder / file).why
        first = number * self._encoder.rows
        if any([can_read(self._encoder, first + row) for row in rows]):
          again.append(number)
    found = agree(f'cache/{self._encoder.name}/again', json.dumps(again))
    return sorted({n for each in found for n in json.loads(each)})

  def _check_room(self, shards: int) -> None:
    encoder = self._encoder
    need = min(shards * encoder.rows, len(encoder)) * encoder.bytes
    free = shutil.disk_usage(self.folder).free
    if need > free:
      raise UserError(
        f'{self.folder} has {free / 1e9:,.1f} GB free, but {encoder.name} of '
        f'{len(encoder):,} records need about {need / 1e9:,.1f} GB more; make room, or '
        'give another settings.cache_dir or a smaller dtype.'
      )

  def kept(self, number: int) -> Row | None:
    return self._others.find(self._encoder.keys[number])

  def put(self, number: int, rows: Sequence[Row]) -> None:
    span = span_of(self._encoder, number)
    records = shard_of(rows, self._encoder.keys[span.start : span.stop])
    unreadable = sum(bool(row.why) for row in rows)
    self._new[number] = write_shard(self.folder, self._ids[number], records, unreadable)

  def end(self) -> Rows:
    name, folder, ids = self._encoder.name, self.folder, self._ids
    files = {n: self._found.get(i, '') for n, i in enumerate(ids)}
    new = {n: file[len(ids[n]) :] for n, file in self._new.items()}  # Messages are bounded.
    for answer in agree(f'cache/{name}/files', json.dumps(new), A_DAY):
      files |= {int(n): ids[int(n)] + rest for n, rest in json.loads(answer).items()}
    self._names = names = [files[n] for n in range(len(files))]

    def finish() -> None:
      if gone := [n for n in names if not (folder / n).is_file()]:
        raise UserError(
          f'{folder / gone[0]} is not there; give a settings.cache_dir on a disk that all '
          'processes share, and let one run at a time fill it.'
        )
      if jax.process_index() == 0:
        self._tidy(names)

    in_step(f'cache/{name}/end', finish, (UserError,))
    return Rows(len(self._encoder), self._encoder.rows, OpenShards(folder, names))

  def empty(self, rows: Rows) -> Sequence[int]:
    return [
      number * self._encoder.rows + row for number, name in enumerate(self._names)
      if NAME.fullmatch(name)[3] for row in open_shard(self.folder / name).why
    ]

  def _tidy(self, names: Sequence[str]) -> None:
    """List the files, remove what the cache has no more, and note the dates of what it has."""
    try:
      if read_object(self.folder / MANIFEST).get('files') != list(names):
        self._write(self._facts, names)
      stamps = {name: _stamp(self.folder / name) for name in sorted(names)}
      if stamps != _read_checked(self.folder):
        with atomic_write(self.folder / CHECKED) as file:
          file.write(json.dumps(stamps).encode())
      for name in itertools.chain(*shards_in(self.folder).values()):
        if name not in stamps:
          (self.folder / name).unlink(missing_ok=True)
    except OSError as error:
      raise self._unwritable(error) from error


class _Reused:
  """Rows of other files of the folder, by the digests of their records."""

  def __init__(self, folder: Path, files: Sequence[str]):
    self._folder, self._names = folder, []
    keys, places = [np.zeros(0, _KEY)], [np.zeros((0, 2), np.int32)]
    for file in files:
      with contextlib.suppress(UserError, ValueError):
        shard = open_shard(folder / file)
        rows = np.array([row for row in range(len(shard)) if row not in shard.why], np.int32)
        keys.append(np.ascontiguousarray(shard.keys).view(_KEY).reshape(-1)[rows])
        places.append(np.stack([np.full_like(rows, len(self._names)), rows], axis=1))
        self._names.append(file)
    every, where = np.concatenate(keys), np.concatenate(places)
    order = np.argsort(every, kind='stable')
    self._sorted, self._where = every[order], where[order]
    self._open = OpenShards(folder, self._names)

  def find(self, key: np.ndarray) -> Row | None:
    """Return the row of a record with this digest, uint8 [DIGEST]."""
    wanted = np.ascontiguousarray(key).view(_KEY)
    place = int(np.searchsorted(self._sorted, wanted)[0])
    if place == len(self._sorted) or self._sorted[place] != wanted[0]:
      return None
    shard, row = map(int, self._where[place])
    return self._open(shard).row(row)


def _empty_rows(name: str) -> int:
  return int(NAME.fullmatch(name)[3] or 0)


def _stamp(path: Path) -> list[int]:
  with contextlib.suppress(OSError):
    found = path.stat()
    return [found.st_size, found.st_mtime_ns]
  return []


def _read_checked(folder: Path) -> dict[str, Any]:
  try:
    return read_object(folder / CHECKED)
  except UserError:
    return {}


def _check_manifest(path: Path, facts: Mapping[str, str]) -> None:
  """Raise UserError, which names what differs, for a cache of something else."""
  remedy = f'remove {path.parent} to encode anew, or give another settings.cache_dir'
  found = read_object(path, remedy=remedy)
  made_of = found.get('made_of')
  if found.get('format') != FORMAT or not isinstance(made_of, dict):
    raise UserError(f'{path} is not of this version; {remedy}.')
  names = [n for n in {**made_of, **facts} if made_of.get(n) != facts.get(n)]
  if names:
    shown = ', '.join(
      f'{name} ({str(made_of.get(name, "none"))[:60]}, now {str(facts.get(name, "none"))[:60]})'
      for name in names
    )
    raise UserError(f'the cache {path.parent} differs in {shown}; {remedy}.')
