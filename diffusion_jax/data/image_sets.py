"""Images in archives: npz with batches, as ADM's, and tar files."""

import io
import math
import threading
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from diffusion_jax.data.finding import SUFFIXES, Left
from diffusion_jax.data.images import MAX_PIXELS, MOST_BYTES, read_pixels
from diffusion_jax.data.tars import members
from diffusion_jax.errors import UserError
from diffusion_jax.files import reading
from diffusion_jax.formats.npz import check_member, fill, opened, read_header

ARRAY = 'arr_0.npy'
_PART = 2**20
_LOCAL_HEADER = 30


def holds_batch(path: str | Path) -> bool:
  """Return whether a file is an npz with an array of the name that batches of images have."""
  if not Path(path).is_file():  # A pipe would wait for a writer for ever.
    return False
  try:
    with reading(path), opened(path) as archive:
      return ARRAY in archive.namelist()
  except UserError:
    return False


class ImageBatch(Sequence):
  """The images arr_0 of an npz, uint8 [n h w 3]; UserError where it has none, or is damaged.

  Read in place, or, if compressed, unpacked into memory at the first access; the checksum is
  compared once, at the start.
  """

  def __init__(self, path: str | Path):
    self.path = Path(path)
    if not self.path.is_file():
      raise UserError(f'There are no images at {path}: correct the path.')
    fault, remedy = 'is not a whole npz with images as arr_0', 'make it or fetch it again'
    with reading(path, fault, remedy), opened(self.path) as archive:
      entry = archive.getinfo(ARRAY)
      check_member(archive, entry)
      with archive.open(entry) as file:
        header = read_header(file, entry)
        while file.read(_PART):  # At the end the archive compares its checksum.
          pass
    self.shape, self._start = header.shape, header.start
    rgb = header.dtype == np.uint8 and len(self.shape) == 4 and self.shape[-1] == 3
    if not rgb or header.fortran or not all(self.shape):
      raise UserError(f'arr_0 in {path} is not uint8 [n h w 3]: give a batch of RGB images.')
    if math.prod(self.shape[1:]) > 3 * MAX_PIXELS:
      raise UserError(
        f'the images in {path} have {self.shape[1]} x {self.shape[2]} pixels; give smaller ones.'
      )
    self._stored = entry.compress_type == zipfile.ZIP_STORED
    self._entry = entry.header_offset
    self._images: np.ndarray | None = None
    self._lock = threading.Lock()

  def __len__(self) -> int:
    return self.shape[0]

  def __getitem__(self, index: int) -> np.ndarray:
    """Return image `index`, uint8 [h w 3]. UserError where the file can no longer be read."""
    index = range(len(self))[index]
    with reading(self.path, 'can no longer be read', 'fetch it again'):
      if self._stored:
        return self._at(index)
      with self._lock:  # Several threads read; only one shall unpack.
        if self._images is None:
          self._images = self._unpacked()
      return self._images[index]

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
    with opened(self.path) as archive, archive.open(ARRAY) as file:
      file.read(self._start)
      images = np.empty(self.shape, np.uint8)
      fill(images, file)
    return images


class TarPictures(Sequence):
  """All pictures of uncompressed tar files, in order. UserError: no tar file, or no picture in any.

  Headers are read once, pixels by offset on access; nothing is written, so names may point
  anywhere. An archive that is cut or damaged ends with one more member, unreadable. notes: what was
  left out.
  """

  def __init__(self, archives: Sequence[Path]):
    left = Left()
    self.members = [
      member for archive in archives for member in members(str(archive), left, SUFFIXES)
    ]
    self.notes = left.notes(archives[0] if len(archives) == 1 else archives[0].parent)
    if not self.members:
      raise UserError(
        f'there is no picture ({", ".join(SUFFIXES)}) in {archives[0]}'
        + (f' and {len(archives) - 1} more tar files.' if len(archives) > 1 else '.')
      )

  def __len__(self) -> int:
    return len(self.members)

  def __getitem__(self, index: int) -> np.ndarray:
    """Return picture `index`, uint8 [h w 3]. UserError, naming it, where it cannot be read."""
    member = self.members[index]
    where = f'{member.name} in {member.archive}'
    if member.damage:
      raise UserError(f'the image {where} cannot be read ({member.damage}); fetch the file again.')
    if member.size > MOST_BYTES:
      raise UserError(f'the image {where} has {member.size:,} bytes; give one of {MOST_BYTES:,}.')
    with reading(f'the image {where}', remedy='fetch the file again'):
      with open(member.archive, 'rb') as file:
        file.seek(member.offset)
        data = file.read(member.size)
    if len(data) < member.size:
      raise UserError(f'the image {where} is cut, and what came behind it; fetch the file again.')
    return read_pixels(io.BytesIO(data), where)
