"""CLIP's embeddings of pictures, kept on the disk by what is in the files, and of classes."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from diffusion_jax.data.finding import SUFFIXES, Left, find_files, with_suffixes
from diffusion_jax.data.images import read_pixels
from diffusion_jax.errors import UserError
from diffusion_jax.evaluation.extract import READERS, Extraction, checksum, column, reader
from diffusion_jax.evaluation.extractors.clip import CLIPFeatures
from diffusion_jax.evaluation.images import ImageSet, Picture
from diffusion_jax.files import say
from diffusion_jax.formats.tensors import open_tensors, write_tensors
from diffusion_jax.models.text.clip import unit
from diffusion_jax.types import Source

CACHE = Path.home() / '.cache' / 'diffusion_jax' / 'embeddings'
PIECE = 256
"""Pictures that are read, embedded and kept at a time."""
_DIGEST = 32


class PictureFiles:
  """Pictures in files, at their own sizes; labels: names of their folders below the one given."""

  def __init__(self, paths: Sequence[str | Path]):
    """Take files, and all pictures below folders. UserError where there are none."""
    self.files: list[Path] = []
    self.labels: list[str] = []
    left = Left()
    for path in map(Path, paths):
      if path.is_dir():
        found = with_suffixes(find_files(path, left))
        names = (file.relative_to(path).parts for file in found)
        self.labels += [parts[0] if len(parts) > 1 else '' for parts in names]
      else:
        found = [path]
        self.labels.append('')
      if not found:
        raise UserError(f'the folder {path} has no picture ({", ".join(SUFFIXES)}); add some.')
      self.files += found
    self.name, self.names = ' '.join(map(str, paths)), [str(file) for file in self.files]
    self.stamp, self.notes = '', left.notes(self.name)

  def __len__(self) -> int:
    return len(self.files)

  def __getitem__(self, index: int) -> Picture:
    return Picture(read_pixels(self.files[index]))

  def digests(self) -> list[bytes]:
    """Return SHA-256 of each file's bytes; of one that cannot be read, that of nothing."""
    def one(path: Path) -> bytes:
      try:
        with path.open('rb') as file:
          return hashlib.file_digest(file, 'sha256').digest()
      except OSError:  # Reading its pixels says what is wrong.
        return hashlib.sha256().digest()

    with concurrent.futures.ThreadPoolExecutor(READERS) as pool:
      return list(pool.map(one, self.files))


class LabelledRecords:
  """Records of a data set; names and labels, '' without one, of those that have been read."""

  def __init__(self, source: Source, name: str):
    self.source, self.name, self.stamp, self.notes = source, name, '', ()
    self.names, self.labels = [''] * len(source), [''] * len(source)

  def __len__(self) -> int:
    return len(self.source)

  def __getitem__(self, index: int) -> Picture:
    record = self.source[index]
    self.names[index], self.labels[index] = record['id'], record.get('label') or ''
    return Picture(record['image'])


@dataclasses.dataclass(frozen=True)
class Embedded:
  """embeddings: float32 [m p] of length 1, of the pictures `rows`; errors: on each of the others.
  computed: how many were not on the disk already."""

  embeddings: np.ndarray
  rows: np.ndarray
  errors: list[str]
  computed: int


class Cache:
  """Embeddings [p] of one network by the digest [32] of a picture's file, in a folder.

  Files are added and never changed, so that several processes can share a folder. One that is
  damaged is left out, and its pictures are embedded again.
  """

  def __init__(self, features: CLIPFeatures, folder: Path = CACHE):
    extractor = features.extractor
    key = f'{extractor.name} {checksum(extractor.params):08x} {extractor.pixels}'
    self.folder = folder / hashlib.sha256(key.encode()).hexdigest()[:16]
    self.width = extractor.widths['embedding']

  def read(self) -> dict[bytes, np.ndarray]:
    """Return all embeddings by digest."""
    found: dict[bytes, np.ndarray] = {}
    for path in sorted(self.folder.glob('*.safetensors')):
      try:
        tensors = open_tensors(path)
        digests, rows = (np.asarray(tensors[name]) for name in ('digests', 'embeddings'))
        if digests.dtype != np.uint8 or digests.shape != (len(rows), _DIGEST) or (
          rows.dtype != np.float32 or rows.shape[1:] != (self.width,)
        ):
          raise UserError('other arrays')
      except (UserError, KeyError):
        say(f'note: {path} is no whole file of embeddings and is left out.', 'diffusion_jax: ')
        continue
      found |= {digest.tobytes(): row for digest, row in zip(digests, rows, strict=True)}
    return found

  def add(self, digests: Sequence[bytes], embeddings: np.ndarray) -> None:
    """Keep embeddings [n p]. UserError where the folder cannot be written."""
    name = hashlib.sha256(b''.join(digests)).hexdigest()[:16]
    tensors = {
      'digests': np.frombuffer(b''.join(digests), np.uint8).reshape(-1, _DIGEST),
      'embeddings': np.asarray(embeddings, np.float32),
    }
    try:
      self.folder.mkdir(parents=True, exist_ok=True)
      write_tensors(self.folder / f'{name}.safetensors', tensors)
    except OSError as error:
      raise UserError(
        f'embeddings cannot be kept in {self.folder} ({error.strerror}); give another --cache.'
      ) from error


def embed(images: ImageSet, features: CLIPFeatures, cache: Cache | None = None) -> Embedded:
  """Embed pictures of any sizes; a `cache` holds those of `PictureFiles`."""
  extraction = Extraction([features.extractor], features.mesh, features.batch_size)
  name, read = column(features.extractor, 'embedding'), reader(images)
  digests = images.digests() if cache else [str(i).encode() for i in range(len(images))]
  known = cache.read() if cache else {}
  first = {digest: i for i, digest in reversed([*enumerate(digests)]) if digest not in known}
  missing, errors = sorted(first.values()), {}
  with tqdm(total=len(missing), desc='embedding', unit='img', leave=False) as bar:
    for start in range(0, len(missing), PIECE):
      numbers = missing[start : start + PIECE]
      made = read(numbers)
      errors |= {digests[i]: text for i, text in zip(numbers, made.errors, strict=True) if text}
      there = [digests[i] for i in numbers if digests[i] not in errors]
      rows = extraction([image for image in made.images if image is not None])[name]
      rows = np.asarray(unit(rows)) if len(rows) else rows
      if cache and there:
        cache.add(there, rows)
      known |= dict(zip(there, rows, strict=True))
      bar.update(len(numbers))
  rows = np.flatnonzero([digest in known for digest in digests])
  found = [known[digests[i]] for i in rows]
  if not found:
    raise UserError(f'none of the pictures can be read, such as: {next(iter(errors.values()))}')
  return Embedded(np.stack(found), rows, list(errors.values()), len(missing) - len(errors))


def class_embeddings(
  features: CLIPFeatures, classes: Mapping[str, Sequence[str]], templates: Sequence[str]
) -> np.ndarray:
  """Return [k p] of length 1: the mean over templates (Radford et al. 2021, section 3.1.4).

  classes: the words of each, over which the mean is taken, too. templates: texts with {} in the
  place of the words.
  """
  texts = [
    [template.replace('{}', word) for word in words for template in templates]
    for words in classes.values()
  ]
  each = np.asarray(unit(features.texts([text for some in texts for text in some])))
  ends = np.cumsum([len(some) for some in texts])
  means = np.stack([part.mean(axis=0) for part in np.split(each, ends[:-1])])
  return np.asarray(unit(means))
