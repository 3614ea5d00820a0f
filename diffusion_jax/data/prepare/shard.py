"""One shard of records, with what the card says of them: every picture is decoded once.

Beside a shard, until all are written, there is a folder of notes: SHARD.npy, of each record NOTE,
and SHARD.json, of texts and of what could not be read. They are complete before the shard is there.
"""

import hashlib
import io
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from diffusion_jax.data.fields import BREAKS
from diffusion_jax.data.finding import key_of
from diffusion_jax.data.images import MOST_BYTES, format_of, read_pixels, read_size
from diffusion_jax.data.perceptual import EDGE, look
from diffusion_jax.data.prepare.options import SourceOptions
from diffusion_jax.data.prepare.rules import rewritten
from diffusion_jax.data.sources.entries import DIGEST, Entry
from diffusion_jax.data.sources.pictures import PictureSource
from diffusion_jax.data.sources.records import ShardWriter
from diffusion_jax.errors import Unreadable
from diffusion_jax.files import atomic_write, printable
from diffusion_jax.pixels import resize

NOTE = np.dtype([
  ('bytes', '<i8'), ('content', 'u1', (DIGEST,)), ('hash', '<u8'),
  ('copy', 'u1', (EDGE, EDGE, 3)), ('captions', '<i4'), ('characters', '<i4'), ('label', '<i4'),
])
"""Length and digest of the whole picture as it is kept; `perceptual.look`; number of captions, and
length of the first; place among the shard's own labels, -1 for none."""
MOST_WORDS, MOST_SAMPLES = 5000, 4
"""Of a shard: words with their numbers, the most frequent, and captions as examples."""


class Job(NamedTuple):
  """Records first to last (not included) of a split are shard `path`; notes: path without suffix.
  """

  split: str
  first: int
  last: int
  path: Path
  notes: Path


class Kept(NamedTuple):
  """A picture as it is written; height, width: upright; pixels: of the original, decoded."""

  data: bytes
  height: int
  width: int
  pixels: np.ndarray


def write_shard(
  job: Job, source: PictureSource, options: SourceOptions, count: Callable[[int], None]
) -> list[list[str]]:
  """Write one shard and its notes; return [cause, sentence, name] of each that cannot be read.

  count: called with numbers of pictures as they are done.
  """
  bad: list[list[str]] = []
  notes, labels, words, samples, rules = [], {}, Counter(), [], options.rules()
  with ShardWriter(job.path) as writer:
    for place in range(job.first, job.last):
      count(1)
      number = int(source.numbers[place])
      try:
        entry = rewritten(with_class(source.entries[number], options), rules)
        kept = keep(entry, options)
      except Unreadable as error:
        bad.append([error.cause, str(error), _name(source, number)])
        continue
      writer.add(entry._replace(picture=kept.data), (kept.height, kept.width))
      captions = list(entry.captions or ())
      for caption in captions:
        words.update(word.lower() for word in BREAKS.split(caption) if word)
      if captions and len(samples) < MOST_SAMPLES:
        samples.append([entry.name, captions[0]])
      label = -1 if entry.label is None else labels.setdefault(entry.label, len(labels))
      notes.append((
        len(kept.data), list(hashlib.sha256(kept.data).digest()[:DIGEST]), *look(kept.pixels),
        len(captions), len(captions[0]) if captions else 0, label,
      ))
    said = {
      'bad': bad, 'labels': list(labels), 'samples': samples, 'words': _most_frequent(words),
    }
    with atomic_write(job.notes.with_suffix('.npy')) as file:
      np.save(file, np.array(notes, NOTE))
    with atomic_write(job.notes.with_suffix('.json')) as file:
      file.write(json.dumps(said).encode())
  return bad


def _most_frequent(words: Counter) -> dict[str, int]:
  return dict(sorted(words.items(), key=lambda item: (-item[1], item[0]))[:MOST_WORDS])


def _name(source: PictureSource, number: int) -> str:
  try:
    return printable(source.entries.name(number))
  except Unreadable:
    return f'number {number}'


def with_class(entry: Entry, options: SourceOptions) -> Entry:
  """An entry, if asked for with the first folder in its name as its class where it has none."""
  folders = key_of(entry.name).split('/')[:-1]
  if options.classes and entry.label is None and folders:
    return entry._replace(label=folders[0])
  return entry


def keep(entry: Entry, options: SourceOptions) -> Kept:
  """The picture of an entry, decoded to its end, as it is to be written. Unreadable."""
  data = _bytes_of(entry)
  pixels = read_pixels(io.BytesIO(data), entry.where)
  height, width = read_size(io.BytesIO(data), entry.where)
  wanted, edge = options.picture_format.upper(), options.max_edge or max(height, width)
  if wanted == 'STORED' or (wanted == format_of(data) and max(height, width) <= edge):
    return Kept(data, height, width, pixels)
  scale = min(edge / max(height, width), 1)
  size = max(1, round(height * scale)), max(1, round(width * scale))
  small = pixels if pixels.shape[:2] == size else resize(pixels, *size)
  return Kept(_encoded(small, wanted, options.quality), *size, pixels)


def _bytes_of(entry: Entry) -> bytes:
  try:
    if isinstance(entry.picture, Path) and entry.picture.stat().st_size > MOST_BYTES:
      raise Unreadable(
        f'the picture {entry.where} has more than {MOST_BYTES:,} bytes; leave it out.', 'too large'
      )
    return entry.data()
  except OSError as error:
    cause = 'missing' if isinstance(error, FileNotFoundError) else 'not readable'
    raise Unreadable(
      f'the picture {entry.where} cannot be read ({error.strerror}); leave it out.', cause
    ) from error


def _encoded(pixels: np.ndarray, kind: str, quality: int) -> bytes:
  buffer = io.BytesIO()
  how: dict[str, Any] = {
    'PNG': {}, 'JPEG': {'quality': quality, 'optimize': True},
    'WEBP': {'lossless': True} if quality == 100 else {'quality': quality},
  }[kind]
  Image.fromarray(pixels).save(buffer, kind, **how)
  return buffer.getvalue()
