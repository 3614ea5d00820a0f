"""The images of any data set that TFDS has prepared as ArrayRecord, from its folder alone."""

import contextlib
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from diffusion_jax.data.images import read_pixels
from diffusion_jax.data.prepared_metadata import METADATA, check_metadata, check_shards
from diffusion_jax.errors import UserError
from diffusion_jax.files import reading

__all__ = ['METADATA', 'PreparedImages']


class PreparedImages(Sequence):
  """The feature 'image' of one split, by a folder with dataset_info.json and ArrayRecord files.

  Args:
    split: a name, or a TFDS slice such as 'train[:100]'; '' where there is only one split.

  Raises:
    UserError: a folder that cannot be read, another split, or records without images.
  """

  def __init__(self, folder: str | Path, split: str = ''):
    import tensorflow_datasets as tfds
    from array_record.python.array_record_data_source import ArrayRecordDataSource
    from tensorflow_datasets.proto import tf_example_pb2

    self.folder = Path(folder).absolute()
    check_metadata(self.folder)
    with self._reading():
      builder = tfds.builder_from_directory(str(self.folder))
      splits, features = sorted(builder.info.splits), builder.info.features
      has_images = 'image' in features and isinstance(features['image'], tfds.features.Image)
    if not has_images:
      raise UserError(
        f"the data set in {folder} has no feature 'image', but {', '.join(features)}."
      )
    if not split and len(splits) > 1:
      raise UserError(f'{folder} has the splits {", ".join(splits)}; give {folder}:{splits[-1]}.')
    with self._reading():
      self.split = split or splits[0]
    try:
      chosen = builder.info.splits[self.split]
    except (KeyError, ValueError) as error:
      raise UserError(f'{folder} has no split {split!r}, but {", ".join(splits)}.') from error
    with self._reading():
      check_shards(self.folder, chosen)
      self._records = ArrayRecordDataSource(chosen.file_instructions)
      self._length = len(self._records)
      self._example = tf_example_pb2.Example

  def __len__(self) -> int:
    return self._length

  def __getitem__(self, index: int) -> np.ndarray:
    """Image `index`, uint8 [h w 3]. UserError, naming it, where it cannot be read."""
    index = range(self._length)[index]
    where = f'{index} of {self.split} in {self.folder}'
    with reading(f'the image {where}', remedy='prepare the data set again'):
      # Of the record only the image is decoded, by Pillow: TFDS would ask for OpenCV.
      record = self._example.FromString(self._records[index])
      (data,) = record.features.feature['image'].bytes_list.value
    return read_pixels(io.BytesIO(data), where)

  def _reading(self) -> contextlib.AbstractContextManager:
    return reading(f'the data set in {self.folder}', remedy='prepare it again')
