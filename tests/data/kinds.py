"""The same pictures, with the same texts, in every kind of source."""

import io
import itertools

import numpy as np
from PIL import Image

from diffusion_jax.config import DataConfig
from diffusion_jax.data.sources import open_data
from diffusion_jax.data.sources.entries import Entry
from diffusion_jax.data.sources.records import Shard, ShardWriter, shard_name, write_header


def openmoji(sources, count=48):
  """[(name, PNG or JPEG bytes, captions)], by name: drawings that are wide, tall and square."""
  found = []
  for i in range(count):
    record = sources[0][i]
    height, width = [(32, 32), (24, 32), (32, 20)][i % 3]
    picture = io.BytesIO()
    Image.fromarray(record['image'][:height, :width]).save(picture, ['PNG', 'JPEG'][i % 2])
    found.append((f'{record["id"]}', picture.getvalue(), record['captions']))
  return sorted(found)


def suffix(picture):
  return '.png' if picture.startswith(b'\x89PNG') else '.jpg'


def as_folder(path, pictures):
  path.mkdir(parents=True)
  for name, picture, captions in pictures:
    (path / f'{name}{suffix(picture)}').write_bytes(picture)
    (path / f'{name}.txt').write_text('\n'.join(captions))
  return f'folder:{path}'


def in_parts(pictures, count):
  """Parts of about one length, in order."""
  ends = np.linspace(0, len(pictures), count + 1).astype(int)
  return [pictures[a:b] for a, b in itertools.pairwise(ends)]


def as_records(path, pictures, shards=2, split='train'):
  written = []
  for number, part in enumerate(in_parts(pictures, shards)):
    with ShardWriter(path / shard_name(split, number, shards)) as writer:
      for name, picture, captions in part:
        with Image.open(io.BytesIO(picture)) as image:
          writer.add(Entry(name, name, picture, captions), image.size[::-1])
    written.append(Shard(writer.path.name, len(writer)))
  write_header(path, {split: written})
  return f'records:{path}'


def opened(dataset, size=16, **options):
  """(train, test)."""
  return open_data(DataConfig(dataset, size, **options))
