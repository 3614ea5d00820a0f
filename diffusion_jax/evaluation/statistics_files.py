"""Statistics in the files of FID tools, read and written.

A file is known by what it holds:
- npz of clean-fid and pytorch-fid: mu and sigma; for KID clean-fid keeps all features, feats.
- npz of ADM (guided-diffusion): mu, sigma of pool3 and mu_s, sigma_s of spatial features; its
  reference batches hold the images too, uint8 [n h w 3], as arr_0 (see `data.image_batch`).
- torch-fidelity's cache: a dictionary of mu and sigma as numpy arrays, saved by torch.

We write the same, and two entries more that those tools pass over: n, the number of samples, and
features, the name of the extractor. A file without n gives a `FittedGaussian`. Nothing in a file is
ever executed: pickles are refused, torch's files are read with `weights_only`.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from diffusion_jax.errors import UserError
from diffusion_jax.evaluation.statistics import FittedGaussian, Moments, Statistics
from diffusion_jax.files import atomic_write, reading
from diffusion_jax.formats.npz import MOST_TEXT, opened, read_arrays

SUFFIXES = ('.npz', '.pt')
"""Of the files that are written: npz, or torch-fidelity's cache."""
MOST_FEATURES = 8192
"""Of one sample: four times as many as any extractor has."""
_MOST_BYTES = {
  'mu': 8 * MOST_FEATURES, 'sigma': 8 * MOST_FEATURES**2, 'mu_s': 8 * MOST_FEATURES,
  'sigma_s': 8 * MOST_FEATURES**2, 'n': 8, 'features': MOST_TEXT,
}
_MOST_SAMPLES_BYTES = 2**36
"""Of all features of a reference."""


def load_statistics(path: str | os.PathLike, *, spatial: bool = False) -> Moments:
  """Reads statistics of any of the formats.

  Args:
    spatial: takes ADM's spatial features (for sFID), which only its files hold.

  Raises:
    UserError: the file is missing, damaged, of another kind, or without what is asked for.
  """
  arrays = _read(Path(path))
  names = ('mu_s', 'sigma_s') if spatial else ('mu', 'sigma')
  if spatial and not {*names} <= {*arrays}:
    raise UserError(
      f"{path} holds no spatial features (mu_s and sigma_s): take ADM's file, or leave out sFID."
    )
  return _checked(Path(path), arrays.get('n'), *(arrays[name] for name in names))


def described(path: str | os.PathLike) -> tuple[str, bool]:
  """(name of the features or '' where the file does not say it, whether it has spatial ones).

  UserError as `load_statistics`.
  """
  arrays = _read(Path(path))
  return str(arrays.get('features', '')), {'mu_s', 'sigma_s'} <= {*arrays}


def _read(path: Path) -> dict[str, Any]:
  """mu and sigma, and what else of _KEYS a file has. UserError where it has not both."""
  if not path.is_file():
    raise UserError(f'There are no statistics at {path}: compute them first or correct the path.')
  fault = "is not a whole statistics file, npz with mu and sigma or torch-fidelity's cache"
  with reading(path, fault, remedy='compute it again or fetch it again'):
    with opened(path) as archive:
      members = archive.infolist()
    if any(info.filename.endswith('data.pkl') for info in members):
      # Packed ones PyTorch does not write, and would unpack to any size.
      if any(info.compress_type != zipfile.ZIP_STORED for info in members):
        raise ValueError('it is packed')
      arrays = _read_torch(path)
    else:
      arrays = read_arrays(path, _MOST_BYTES)
    if 'n' in arrays:
      arrays['n'] = int(arrays['n'])
    if 'features' in arrays:
      arrays['features'] = str(arrays['features'])[:MOST_TEXT]
    return {'mu': arrays['mu'], 'sigma': arrays['sigma'], **arrays}


def _torch(path: Path):
  try:
    import torch
  except ImportError:
    raise UserError(
      f"{path} has torch-fidelity's format, which needs torch: install torch, or choose an npz."
    ) from None
  return torch


def _read_torch(path: Path) -> dict[str, Any]:
  torch = _torch(path)
  # What numpy arrays are rebuilt by; their kinds of numbers are classes of their own.
  kinds = [type(np.dtype(kind)) for kind in (np.float16, np.float32, np.float64)]
  rebuild = np.zeros(0).__reduce__()[0]
  with torch.serialization.safe_globals([rebuild, np.ndarray, np.dtype, *kinds]):
    found = torch.load(path, map_location='cpu', weights_only=True)
  if not isinstance(found, Mapping):
    raise ValueError('no dictionary')
  arrays = {name: np.asarray(found[name]) for name in ('mu', 'sigma')}
  return arrays | {name: found[name] for name in ('n', 'features') if name in found}


def _checked(path: Path, n: int | None, mean: np.ndarray, covariance: np.ndarray) -> Moments:
  numbers = all(np.issubdtype(x.dtype, np.floating) for x in (mean, covariance))
  fit = mean.ndim == 1 and mean.size and covariance.shape == mean.shape * 2
  if fit and mean.size > MOST_FEATURES:  # A view of few numbers may claim to be of any size.
    raise UserError(f'{path} is of {mean.size:,} features, where {MOST_FEATURES:,} may be.')
  if not fit or (n is not None and n < 2):
    raise UserError(f'The arrays in {path} do not fit each other: compute the file again.')
  if not numbers or not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
    raise UserError(f'{path} holds values that are no finite numbers: compute the file again.')
  mean, covariance = mean.astype(np.float64), covariance.astype(np.float64)
  largest = np.diagonal(covariance).max(initial=0)
  symmetric = np.allclose(covariance, covariance.T, 1e-3, 1e-3 * largest)
  if np.diagonal(covariance).min() < 0 or not symmetric:
    raise UserError(f'The covariance in {path} is not one of real data: compute the file again.')
  if n is None:
    return FittedGaussian(mean, covariance)
  return Statistics(n, mean, covariance * (n - 1))


def save_statistics(
  path: str | os.PathLike, statistics: Moments, *, features: str = '',
  spatial: Moments | None = None, images: UInt8[np.ndarray, 'n h w 3'] | None = None,
) -> None:
  """Writes statistics, as npz or torch-fidelity's cache by the suffix; whole or not there.

  Args:
    features: name of the extractor, without which nobody knows what they may be compared with.
    spatial: of ADM's spatial features, for sFID.
    images: with them the file is one of ADM's reference batches.

  Raises:
    UserError: another suffix, a cache with more than statistics, or no torch to write it by.
  """
  path = check_suffix(path)
  known = {} if statistics.n is None else {'n': statistics.n}
  known |= {'features': features} if features else {}
  arrays = {'mu': statistics.mean, 'sigma': statistics.covariance}
  if path.suffix == '.pt':
    if spatial is not None or images is not None:
      raise UserError(f'{path}, a cache of torch-fidelity, cannot hold more; write an npz.')
    torch = _torch(path)
    with atomic_write(path) as file:
      torch.save(arrays | known, file)
    return
  if spatial is not None:
    arrays |= {'mu_s': spatial.mean, 'sigma_s': spatial.covariance}
  if images is not None:
    arrays['arr_0'] = images
  with atomic_write(path) as file:
    np.savez(file, **arrays, **known)


def check_suffix(path: str | os.PathLike) -> Path:
  """The path. UserError where its suffix is none of SUFFIXES."""
  path = Path(path)
  if path.suffix not in SUFFIXES:
    known = ' or '.join(f'NAME{suffix}' for suffix in SUFFIXES)
    raise UserError(f'Statistics cannot be written to {path}; name it {known}.')
  return path


def load_features(path: str | os.PathLike) -> Float[np.ndarray, 'n d']:
  """Reads all features of a reference, `feats` in the npz that clean-fid keeps for KID.

  UserError if the file is missing, damaged or of another kind.
  """
  path = Path(path)
  if not path.is_file():
    raise UserError(f'There are no features at {path}: correct the path.')
  fault, remedy = 'is not a whole npz with features as feats', 'compute it again or fetch it again'
  with reading(path, fault, remedy):
    features = read_arrays(path, {'feats': _MOST_SAMPLES_BYTES})['feats']
  if features.ndim != 2 or not np.issubdtype(features.dtype, np.floating):
    raise UserError(f'feats in {path} are not features [n d]: compute the file again.')
  return features
