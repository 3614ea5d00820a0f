"""Statistics in the files of FID tools, read and written.

A file is known by what it holds:
- ours: npz with n, mean and m2. Nothing is lost, and statistics can be merged after reading.
- clean-fid and pytorch-fid: npz with mu and sigma; for KID clean-fid keeps all features, feats.
- ADM (guided-diffusion): npz with mu, sigma of pool3 and mu_s, sigma_s of spatial features; its
  reference batches hold the images too, uint8 [n h w 3], as arr_0.
- torch-fidelity's cache: a dictionary of mu and sigma as numpy arrays, saved by torch.

All but ours leave out the number of samples, so reading them gives a `FittedGaussian`. Nothing in a
file is ever executed: pickles are refused, torch's files are read with `weights_only`.
"""

from __future__ import annotations

import os
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from jaxtyping import Float, UInt8

from diffusion_jax.errors import UserError
from diffusion_jax.evaluation.statistics import FittedGaussian, Moments, Statistics
from diffusion_jax.io.whole import replacing

FORMATS = ('ours', 'clean-fid', 'adm', 'torch-fidelity')

_DAMAGE = (
  KeyError, IndexError, TypeError, ValueError, EOFError, OSError, NotImplementedError,
  zipfile.BadZipFile, zlib.error,
)


def load_statistics(path: str | os.PathLike, *, spatial: bool = False) -> Moments:
  """Reads statistics of any of the formats.

  Args:
    spatial: takes ADM's spatial features (for sFID), which only its files hold.

  Raises:
    UserError: the file is missing, damaged, of another kind, or without what is asked for.
  """
  path = Path(path)
  if not path.is_file():
    raise UserError(f'There are no statistics at {path}: compute them first or correct the path.')
  try:
    with zipfile.ZipFile(path) as archive:
      names = archive.namelist()
    if any(name.endswith('data.pkl') for name in names):
      arrays = _load_torch(path)
    else:
      arrays = _load_npz(path, [name.removesuffix('.npy') for name in names], spatial)
  except _DAMAGE as error:
    raise UserError(
      f'{path} is not a whole statistics file (npz with n, mean and m2, or mu and sigma; or '
      "torch-fidelity's cache): compute it again or fetch it again."
    ) from error
  return _checked(path, *arrays)


def _load_npz(path: Path, names: list[str], spatial: bool) -> tuple:
  if spatial and not {'mu_s', 'sigma_s'} <= set(names):
    raise UserError(
      f"{path} holds no spatial features (mu_s and sigma_s): take ADM's file, or leave out sFID."
    )
  with np.load(path, allow_pickle=False) as file:
    if spatial:
      return None, file['mu_s'], file['sigma_s']
    if 'm2' in names:
      return int(file['n']), file['mean'], file['m2']
    return None, file['mu'], file['sigma']


def _torch(path: Path):
  try:
    import torch
  except ImportError:
    raise UserError(
      f"{path} has torch-fidelity's format, which needs torch: install torch, or choose an npz."
    ) from None
  return torch


def _load_torch(path: Path) -> tuple:
  torch = _torch(path)
  from pickle import UnpicklingError

  # What numpy arrays are rebuilt by; their kinds of numbers are classes of their own.
  kinds = [type(np.dtype(kind)) for kind in (np.float16, np.float32, np.float64)]
  rebuild = np.zeros(0).__reduce__()[0]
  try:
    with torch.serialization.safe_globals([rebuild, np.ndarray, np.dtype, *kinds]):
      found = torch.load(path, map_location='cpu', weights_only=True)
  except (UnpicklingError, RuntimeError, AttributeError) as error:
    raise ValueError('no plain arrays') from error
  return None, np.asarray(found['mu']), np.asarray(found['sigma'])


def _checked(path: Path, n: int | None, mean: np.ndarray, second: np.ndarray) -> Moments:
  """Statistics of those arrays; `second` is m2 where n is known, otherwise the covariance."""
  numbers = all(np.issubdtype(x.dtype, np.floating) for x in (mean, second))
  if (n or 0) < 0 or mean.ndim != 1 or not mean.size or second.shape != mean.shape * 2:
    raise UserError(f'The arrays in {path} do not fit each other: compute the file again.')
  if not numbers or not (np.isfinite(mean).all() and np.isfinite(second).all()):
    raise UserError(f'{path} holds values that are no finite numbers: compute the file again.')
  mean, second = mean.astype(np.float64), second.astype(np.float64)
  largest = np.diagonal(second).max(initial=0)
  if np.diagonal(second).min() < 0 or not np.allclose(second, second.T, 1e-3, 1e-3 * largest):
    raise UserError(f'The covariance in {path} is not one of real data: compute the file again.')
  return FittedGaussian(mean, second) if n is None else Statistics(n, mean, second)


def save_statistics(
  path: str | os.PathLike, statistics: Moments, *, format: str = 'ours',
  spatial: Moments | None = None, images: UInt8[np.ndarray, 'n h w 3'] | None = None,
) -> None:
  """Writes statistics in one of FORMATS; the file is either whole or not there.

  Args:
    spatial, images: for 'adm': statistics of the spatial features, which it must have, and the
      images of a reference batch.

  Raises:
    UserError: fewer than 2 samples for a covariance, torch is missing, or the statistics do not
      say what the format needs.
  """
  path = Path(path)
  if format not in FORMATS:
    raise UserError(f'There is no statistics format {format!r}: choose of {", ".join(FORMATS)}.')
  if format == 'ours' and statistics.n is None:
    raise UserError(
      f'{path} cannot be written in our format, which tells the number of samples, and these '
      'statistics do not know it: choose clean-fid.'
    )
  if (format == 'adm') != (spatial is not None) or (images is not None and format != 'adm'):
    raise UserError(
      f'{path} cannot be written as {format}: statistics of spatial features belong to adm, which '
      'needs them, and images to adm alone.'
    )
  if format == 'torch-fidelity':
    torch, arrays = _torch(path), {'mu': statistics.mean, 'sigma': statistics.covariance}
    with replacing(path) as file:
      torch.save(arrays, file)
    return
  if format == 'ours':
    arrays = {'n': np.int64(statistics.n), 'mean': statistics.mean, 'm2': statistics.m2}
  else:
    arrays = {'mu': statistics.mean, 'sigma': statistics.covariance}
  if spatial is not None:
    arrays |= {'mu_s': spatial.mean, 'sigma_s': spatial.covariance}
  if images is not None:
    arrays['arr_0'] = images
  with replacing(path) as file:
    np.savez(file, **arrays)


def load_features(path: str | os.PathLike) -> Float[np.ndarray, 'n d']:
  """Reads all features of a reference, `feats` in the npz that clean-fid keeps for KID.

  UserError if the file is missing, damaged or of another kind.
  """
  path = Path(path)
  if not path.is_file():
    raise UserError(f'There are no features at {path}: correct the path.')
  try:
    with np.load(path, allow_pickle=False) as file:
      features = file['feats']
  except _DAMAGE as error:
    raise UserError(
      f'{path} is not a whole npz with features as feats: compute it again or fetch it again.'
    ) from error
  if features.ndim != 2 or not np.issubdtype(features.dtype, np.floating):
    raise UserError(f'feats in {path} are not features [n d]: compute the file again.')
  return features


def batch_images(
  path: str | os.PathLike, batch_size: int
) -> Iterator[UInt8[np.ndarray, 'b h w 3']]:
  """Yields arr_0 of an ADM batch, samples or reference, by `batch_size`; the last may be smaller.

  Only one batch is in memory, so that 50,000 images of any size can be read.

  Raises:
    UserError: the file is missing or damaged, or arr_0 is missing or holds no images. A file that
      is damaged in its middle is noticed there.
  """
  path = Path(path)
  if not path.is_file():
    raise UserError(f'There are no images at {path}: correct the path.')
  try:
    with zipfile.ZipFile(path) as archive, archive.open('arr_0.npy') as file:
      shape, row = _image_header(file)
      if row is None:
        raise UserError(f'arr_0 in {path} is not uint8 [n h w 3]: give a batch of RGB images.')
      for start in range(0, shape[0], batch_size):
        count = min(batch_size, shape[0] - start)
        yield np.frombuffer(_exactly(file, count * row), np.uint8).reshape(count, *shape[1:])
      file.read(1)  # At the end the archive's checksum is compared.
  except _DAMAGE as error:
    raise UserError(
      f'{path} is not a whole npz with images as arr_0: make it or fetch it again.'
    ) from error


def _image_header(file) -> tuple[tuple[int, ...], int | None]:
  """(shape, bytes of an image), None for what are no images."""
  version = np.lib.format.read_magic(file)
  read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
  shape, fortran, dtype = read[version](file)
  good = dtype == np.uint8 and len(shape) == 4 and shape[-1] == 3 and not fortran
  return shape, int(np.prod(shape[1:])) if good else None


def _exactly(file, size: int) -> bytearray:
  out = bytearray()
  while len(out) < size:
    part = file.read(size - len(out))
    if not part:
      raise EOFError
    out += part
  return out
