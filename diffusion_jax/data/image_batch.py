"""Batches of images in npz files, as ADM (guided-diffusion) writes samples and references."""

import math
import threading
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np

from diffusion_jax.errors import UserError
from diffusion_jax.io.whole import ARCHIVE_DAMAGE

ARRAY = 'arr_0.npy'
_PART = 2**20
_LOCAL_HEADER = 30


def holds_batch(path: str | Path) -> bool:
  """Whether a file is an npz with an array of the name that batches of images have."""
  if not Path(path).is_file():  # A pipe would wait for a writer for ever.
    return False
  try:
    with zipfile.ZipFile(path) as archive:
      return ARRAY in archive.namelist()
  except (OSError, zipfile.BadZipFile):
    return False


class ImageBatch(Sequence):
  """The images arr_0 of an npz, uint8 [n h w 3].

  They are read from their places in the file, or, where it is compressed, all unpacked into memory
  when the first is asked for. The array's checksum is compared once, at the start.

  Raises:
    UserError: the file is missing or damaged, or arr_0 is missing or holds no images.
  """

  def __init__(self, path: str | Path):
    self.path = Path(path)
    if not self.path.is_file():
      raise UserError(f'There are no images at {path}: correct the path.')
    try:
      with zipfile.ZipFile(self.path) as archive:
        with archive.open(ARRAY) as file:
          self.shape, self._start = _header(file)
          while file.read(_PART):  # At the end the archive compares its checksum.
            pass
        entry = archive.getinfo(ARRAY)
    except ARCHIVE_DAMAGE as error:
      raise UserError(
        f'{path} is not a whole npz with images as arr_0: make it or fetch it again.'
      ) from error
    if not self.shape:
      raise UserError(f'arr_0 in {path} is not uint8 [n h w 3]: give a batch of RGB images.')
    self._stored = entry.compress_type == zipfile.ZIP_STORED
    self._entry = entry.header_offset
    self._images: np.ndarray | None = None
    self._lock = threading.Lock()

  def __len__(self) -> int:
    return self.shape[0]

  def __getitem__(self, index: int) -> np.ndarray:
    """Image `index`, uint8 [h w 3]. UserError where the file can no longer be read."""
    index = range(len(self))[index]
    try:
      if self._stored:
        return self._at(index)
      with self._lock:  # Several threads read; only one shall unpack.
        if self._images is None:
          self._images = self._unpacked()
      return self._images[index]
    except ARCHIVE_DAMAGE as error:
      raise UserError(f'{self.path} can no longer be read ({error}).') from error

  def _at(self, index: int) -> np.ndarray:
    size = math.prod(self.shape[1:])
    with self.path.open('rb') as file:
      file.seek(self._entry)
      header = file.read(_LOCAL_HEADER)
      # The name and the extra field before the data need not be as long as in the directory.
      before = sum(int.from_bytes(header[at : at + 2], 'little') for at in (26, 28))
      file.seek(self._entry + _LOCAL_HEADER + before + self._start + index * size)
      data = file.read(size)
    if len(data) < size:
      raise EOFError(f'it ends within image {index}')
    return np.frombuffer(data, np.uint8).reshape(self.shape[1:])

  def _unpacked(self) -> np.ndarray:
    with zipfile.ZipFile(self.path) as archive, archive.open(ARRAY) as file:
      file.read(self._start)
      images = np.empty(self.shape, np.uint8)
      into = memoryview(images.reshape(-1))
      while read := file.readinto(into):
        into = into[read:]
      if len(into):
        raise EOFError('it ends too early')
    return images


def _header(file: BinaryIO) -> tuple[tuple[int, ...], int]:
  """(shape, bytes before the data); an empty shape for what are no images."""
  version = np.lib.format.read_magic(file)
  read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
  shape, fortran, dtype = read[version](file)
  good = dtype == np.uint8 and len(shape) == 4 and shape[-1] == 3 and all(shape) and not fortran
  return shape if good else (), file.tell()
