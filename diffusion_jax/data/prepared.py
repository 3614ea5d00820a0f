"""The images of any data set that TFDS has prepared as ArrayRecord, from its folder alone."""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from diffusion_jax.data.images import read_pixels
from diffusion_jax.errors import UserError

METADATA = 'dataset_info.json'


class PreparedImages(Sequence):
  """The feature 'image' of one split, by a folder with dataset_info.json and ArrayRecord files.

  Args:
    split: a name, or a TFDS slice such as 'train[:100]'; '' where there is only one split.

  Raises:
    UserError: a folder that cannot be read, another split, or records without images.
  """

  def __init__(self, folder: str | Path, split: str = ''):
    import tensorflow_datasets as tfds

    self.folder = Path(folder)
    try:
      builder = tfds.builder_from_directory(str(folder))
      splits, features = sorted(builder.info.splits), builder.info.features
      has_images = 'image' in features
    except Exception as error:  # TFDS lets through whatever its parsers raise.
      raise self._unreadable(error) from error
    if not has_images:
      raise UserError(
        f"the data set in {folder} has no feature 'image', but {', '.join(features)}."
      )
    if not split and len(splits) > 1:
      raise UserError(f'{folder} has the splits {", ".join(splits)}; give {folder}:{splits[-1]}.')
    self.split = split or splits[0]
    try:
      builder.info.splits[self.split]
    except (KeyError, ValueError) as error:
      raise UserError(f'{folder} has no split {split!r}, but {", ".join(splits)}.') from error
    try:
      # Pillow decodes: TFDS would ask for OpenCV, and damaged images must be named.
      self._records = builder.as_data_source(
        split=self.split, decoders={'image': tfds.decode.SkipDecoding()}
      )
      self._length = len(self._records)
    except Exception as error:  # Such as missing files, or ones that are no ArrayRecord.
      raise self._unreadable(error) from error

  def __len__(self) -> int:
    return self._length

  def __getitem__(self, index: int) -> np.ndarray:
    """Image `index`, uint8 [h w 3]. UserError, naming it, where it cannot be read."""
    where = f'{index} of {self.split} in {self.folder}'
    try:
      data = self._records[index]['image']
    except Exception as error:  # ArrayRecord raises bare ones from C++.
      raise UserError(
        f'the image {where} cannot be read ({_first_line(error)}); prepare the data set again.'
      ) from error
    return read_pixels(io.BytesIO(data), where)

  def _unreadable(self, error: Exception) -> UserError:
    return UserError(
      f'the data set in {self.folder} cannot be read ({_first_line(error)}); prepare it again.'
    )


def _first_line(error: BaseException) -> str:
  return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
