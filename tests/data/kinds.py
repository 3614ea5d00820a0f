"""The same pictures, with the same texts, in every kind of source."""

import io
import itertools
import json
import tarfile
from typing import ClassVar

import numpy as np
import pyarrow
import pyarrow.parquet
import tensorflow_datasets as tfds
from etils import epath
from PIL import Image

from diffusion_jax.config import DataConfig
from diffusion_jax.data.images import read_size
from diffusion_jax.data.sources import open_data
from diffusion_jax.data.sources.entries import Entry
from diffusion_jax.data.sources.records import Shard, ShardWriter, shard_name, write_header
from diffusion_jax.errors import Unreadable


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


def size_of(picture):
  """(height, width), 0 0 of what is no picture."""
  try:
    return read_size(io.BytesIO(picture), 'one of them')
  except Unreadable:
    return 0, 0


def as_records(path, pictures, shards=2):
  write_header(path, {'train': as_shards(path, pictures, shards)})
  return f'records:{path}'


def as_shards(path, pictures, shards=2, split='train'):
  written = []
  for number, part in enumerate(in_parts(pictures, shards)):
    with ShardWriter(path / shard_name(split, number, shards)) as writer:
      for name, picture, captions in part:
        writer.add(Entry(name, name, picture, captions), size_of(picture))
    written.append(Shard(writer.path.name, len(writer)))
  return written


def as_tar(path, pictures, shards=2):
  path.mkdir(parents=True)
  for number, part in enumerate(in_parts(pictures, shards)):
    with tarfile.open(path / f'{number:04d}.tar', 'w') as tar:
      for i, (name, picture, captions) in enumerate(part):
        add(tar, f'{name}{suffix(picture)}', picture)
        text = json.dumps({'captions': captions}) if i % 2 else '\n'.join(captions)
        add(tar, f'{name}.{"json" if i % 2 else "txt"}', text.encode())
  return f'tar:{path}'


def add(tar, name, data, **fields):
  info = tarfile.TarInfo(name)
  info.size = len(data)
  for field, value in fields.items():
    setattr(info, field, value)
  tar.addfile(info, io.BytesIO(data))


def table(pictures, **columns):
  """As Hugging Face's library writes pictures, and texts."""
  info = {'info': {'features': {'image': {'_type': 'Image'}}}}
  found = pyarrow.table({
    'image': pyarrow.array(
      [{'bytes': picture, 'path': f'{name}{suffix(picture)}'} for name, picture, _ in pictures],
      pyarrow.struct([('bytes', pyarrow.binary()), ('path', pyarrow.string())]),
    ),
    'captions': [captions for _, _, captions in pictures], **columns,
  })
  return found.replace_schema_metadata({'huggingface': json.dumps(info)})


def as_parquet(path, pictures, shards=2):
  path.mkdir(parents=True)
  for number, part in enumerate(in_parts(pictures, shards)):
    pyarrow.parquet.write_table(table(part), path / f'data-{number:05d}.parquet', row_group_size=10)
  return f'parquet:{path}'


def as_arrow(path, pictures, shards=2):
  path.mkdir(parents=True)
  for number, part in enumerate(in_parts(pictures, shards)):
    found = table(part)
    with pyarrow.ipc.new_stream(path / f'data-{number:05d}.arrow', found.schema) as stream:
      stream.write_table(found, max_chunksize=10)
  (path / 'state.json').write_text('{}')
  return f'arrow:{path}'


class Drawings(tfds.core.GeneratorBasedBuilder):
  """Pictures with captions."""

  VERSION = tfds.core.Version('1.0.0')
  code_path = epath.Path(__file__)
  splits: ClassVar[dict[str, list]] = {}

  def _info(self):
    f = tfds.features
    return tfds.core.DatasetInfo(builder=self, features=f.FeaturesDict({
      'photo': f.Image(shape=(None, None, 3)), 'id': f.Text(), 'captions': f.Sequence(f.Text()),
    }), disable_shuffling=True)

  def _split_generators(self, dl_manager):
    return {split: self._generate_examples(part) for split, part in self.splits.items()}

  def _generate_examples(self, pictures):
    for i, (name, picture, captions) in enumerate(pictures):
      yield i, {'photo': io.BytesIO(picture), 'id': name, 'captions': captions}


def as_tfds(path, pictures, test=()):
  tfds.disable_progress_bar()
  Drawings.splits = {'train': pictures} | ({'test': test} if test else {})
  builder = Drawings(data_dir=str(path), file_format='array_record')
  builder.download_and_prepare(
    download_config=tfds.download.DownloadConfig(try_download_gcs=False)
  )
  return f'tfds:{builder.data_dir}'


def opened(dataset, size=16, **options):
  """(train, test)."""
  return open_data(DataConfig(dataset, size, **options))
