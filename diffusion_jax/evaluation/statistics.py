"""Mean and covariance of features, as sums that merge over batches, hosts and restarts.

Deviations from the running mean are summed (Chan, Golub and LeVeque 1979, "Updating formulae and a
pairwise algorithm for computing sample variances"), as raw second moments lose digits until
eigenvalues turn negative: in float64 on the host, or in float32 on devices, one sum for each shard
of a batch. There deviations are from an origin near the data, and rounding errors are carried along
(Kahan 1965), so that the error does not grow with the number of batches.

Files are those of other tools, known by their content:
- npz of clean-fid and pytorch-fid: mu and sigma.
- npz of ADM (guided-diffusion): mu, sigma of pool3 and mu_s, sigma_s of spatial features; its
  reference batches also hold images, uint8 [n h w 3], as arr_0 (see `data.image_sets`).
- torch-fidelity's cache: a dictionary of mu and sigma as numpy arrays, saved by torch.

Ours add two entries that those tools ignore: n, the number of samples, and features, the
extractor's name. A file without n gives a `FittedGaussian`. Nothing in a file is executed: pickles
are refused, torch's files are read with `weights_only`.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int, UInt8

from diffusion_jax.errors import UserError
from diffusion_jax.files import atomic_write, reading
from diffusion_jax.formats.npz import MOST_TEXT, opened, read_arrays
from diffusion_jax.parallel.layout import BATCH, EXAMPLES
from diffusion_jax.parallel.mesh import to_host

PART = 4096
"""Rows of features in memory at a time, so that it does not grow with their number."""


@dataclasses.dataclass(frozen=True, eq=False)
class Statistics:
  """Sums of n feature vectors of width d, n 0 or more: their mean [d], and
  m2 [d d] = sum (x - mean)(x - mean)^T, both float64.
  """

  n: int
  mean: Float[np.ndarray, 'd']
  m2: Float[np.ndarray, 'd d']

  @classmethod
  def empty(cls, d: int) -> Statistics:
    """Return those of no vectors: the neutral element of `merge`."""
    return cls(0, np.zeros(d), np.zeros((d, d)))

  @classmethod
  def from_features(cls, features: Float[np.ndarray, 'n d']) -> Statistics:
    """Return those of all rows, of any float type. UserError if one is not finite."""
    features = np.asarray(features)
    if features.ndim != 2:
      raise UserError(
        f'Features must have the shape [n d], not {list(features.shape)}: flatten or pool them.'
      )
    if len(features) == 0:
      return cls.empty(features.shape[1])
    parts = (features[i : i + PART] for i in range(0, len(features), PART))
    return merge_all(cls._at_once(part.astype(np.float64)) for part in parts)

  @classmethod
  def _at_once(cls, features: Float[np.ndarray, 'n d']) -> Statistics:
    if not np.isfinite(features).all():
      raise UserError(
        'The features hold NaN or infinite values: check the images and the extractor weights.'
      )
    mean = features.mean(0)
    centred = features - mean
    return cls(len(features), mean, centred.T @ centred)

  def merge(self, other: Moments) -> Statistics:
    """The statistics of both sets (Chan et al. 1979, eq. 2.1); UserError: other width, no n."""
    check_same_width(self, other)
    if other.n is None:
      other.merge(self)
    n = self.n + other.n
    if n == 0:
      return self
    delta = other.mean - self.mean
    mean = self.mean + delta * (other.n / n)
    between = np.outer(delta, delta) * (self.n * other.n / n)
    return Statistics(n, mean, self.m2 + other.m2 + between)

  @property
  def covariance(self) -> Float[np.ndarray, 'd d']:
    """Unbiased covariance [d d], m2 / (n - 1). UserError if n is below 2."""
    if self.n < 2:
      raise UserError(
        f'A covariance needs at least 2 samples and there are {self.n}: evaluate more images.'
      )
    return self.m2 / (self.n - 1)


@dataclasses.dataclass(frozen=True, eq=False)
class FittedGaussian:
  """Mean and covariance (unbiased) alone, float64, as other tools publish them.

  Without the number of samples they cannot be merged, nor serve what depends on it.
  """

  mean: Float[np.ndarray, 'd']
  covariance: Float[np.ndarray, 'd d']

  @property
  def n(self) -> None:
    return None

  def merge(self, other: Moments) -> NoReturn:
    raise UserError(
      'Statistics whose file does not say the number of samples cannot be merged with others: '
      'compute them again from the images.'
    )


Moments = Statistics | FittedGaussian
"""`mean` and `covariance` of a Gaussian, and `n`, None where it is not known."""


def merge_all(parts: Iterable[Statistics]) -> Statistics:
  """Return those of all parts together, one at least. UserError as in `merge`."""
  return functools.reduce(lambda a, b: a.merge(b), parts)


def check_same_width(a: Moments, b: Moments) -> None:
  """Raise a UserError if the two are of features of different widths."""
  if a.mean.shape != b.mean.shape:
    raise UserError(
      f'Features of width {len(a.mean)} and {len(b.mean)} cannot be put together or compared: '
      'compute both statistics with the same feature extractor.'
    )


class DeviceStatistics(NamedTuple):
  """Sums of s shards, each on its own device: a pytree for a jitted step to carry and donate.

  Attributes:
    origin: a point near the features; zeros before the first vector. mean: less the origin.
    m2: d rows for each shard. (With an axis for shards XLA copies a donated matrix on a CPU, in
      twice the time.)
    rounded: rounding errors of additions to m2.
  """

  n: Int[Array, 's']
  origin: Float[Array, 's d']
  mean: Float[Array, 's d']
  m2: Float[Array, 's*d d']
  rounded: Float[Array, 's*d d']


def empty(d: int, mesh: Mesh) -> DeviceStatistics:
  """Return those of no vectors of width d, a shard on each device that has rows of a batch."""
  s = mesh.shape['data'] * mesh.shape['fsdp']
  make = lambda: DeviceStatistics(
    jnp.zeros(s, jnp.int32), *(jnp.zeros(shape) for shape in ((s, d),) * 2 + ((s * d, d),) * 2)
  )
  return jax.jit(make, out_shardings=NamedSharding(mesh, BATCH))()


def update(
  statistics: DeviceStatistics, features: Float[Array, 'b d'], valid: Bool[Array, 'b'], *,
  mesh: Mesh,
) -> DeviceStatistics:
  """Add the rows of a batch where `valid` is true; pure, to be jitted with the extractor.

  b is a multiple of the mesh's data x fsdp; other rows may hold anything.
  """
  add = jax.shard_map(_add, mesh=mesh, in_specs=BATCH, out_specs=BATCH)
  return add(statistics, features.astype(jnp.float32), valid)


def _add(statistics: DeviceStatistics, features: Array, valid: Array) -> DeviceStatistics:
  n, origin, mean = (x[0] for x in statistics[:3])
  m2, rounded = statistics[3:]
  rows = valid[:, None]
  added = valid.sum(dtype=jnp.int32)
  count = jnp.maximum(added, 1)
  average = lambda x: jnp.where(rows, x, 0).sum(axis=0) / count
  origin = jnp.where(n == 0, average(features), origin)
  shifted = jnp.where(rows, features - origin, 0)
  mean_added = average(shifted)
  centred = jnp.where(rows, shifted - mean_added, 0)
  total = n + added
  fraction = added / jnp.maximum(total, 1)
  delta = mean_added - mean
  # Chan's term between the two sets, as one more row: it then costs no pass over a matrix.
  centred = jnp.concatenate([centred, (delta * jnp.sqrt(n * fraction))[None]])
  increment = jnp.matmul(centred.T, centred, precision='highest') - rounded
  m2_total = m2 + increment
  rounded = (m2_total - m2) - increment
  mean = mean + delta * fraction
  return DeviceStatistics(total[None], origin[None], mean[None], m2_total, rounded)


def collect(statistics: DeviceStatistics, *, mesh: Mesh) -> Statistics:
  """All shards together, on the host in float64, by every process; UserError: NaN or infinity."""
  n, origin, mean, m2 = to_host(_collector(mesh)(statistics))
  if not np.isfinite(m2).all():
    raise UserError(
      'The features hold NaN or infinite values: check the images and the extractor weights.'
    )
  m2 = m2.astype(np.float64)
  return Statistics(int(n), origin.astype(np.float64) + mean, (m2 + m2.T) / 2)


@functools.lru_cache(maxsize=8)
def _collector(mesh: Mesh):
  return jax.jit(jax.shard_map(_reduce, mesh=mesh, in_specs=BATCH, out_specs=PartitionSpec()))


def _reduce(statistics: DeviceStatistics) -> tuple[Array, Array, Array, Array]:
  """Sums over shards: (n, origin, mean less the origin, m2), Chan's rule for many sets at once."""
  n, origin, mean = (x[0] for x in statistics[:3])
  m2, rounded = statistics[3:]
  over = functools.partial(jax.lax.psum, axis_name=EXAMPLES)
  used = (n > 0).astype(jnp.float32)
  centre = over(origin * used) / jnp.maximum(over(used), 1)
  total = over(n)
  offset = jnp.where(n > 0, (origin - centre) + mean, 0)
  overall = over(offset * (n / jnp.maximum(total, 1)))
  between = (offset - overall) * jnp.sqrt(n.astype(jnp.float32))
  return total, centre, overall, over(m2 - rounded + jnp.outer(between, between))


SUFFIXES = ('.npz', '.pt')
"""Suffixes of files that are written: npz, or torch-fidelity's cache."""
MOST_FEATURES = 8192
"""Four times as many as any extractor has."""
_MOST_BYTES = {
  'mu': 8 * MOST_FEATURES, 'sigma': 8 * MOST_FEATURES**2, 'mu_s': 8 * MOST_FEATURES,
  'sigma_s': 8 * MOST_FEATURES**2, 'n': 8, 'features': MOST_TEXT,
}


def load_statistics(path: str | os.PathLike, *, spatial: bool = False) -> Moments:
  """Statistics of any of the formats; spatial: ADM's spatial features (for sFID); or UserError."""
  arrays = _read(Path(path))
  names = ('mu_s', 'sigma_s') if spatial else ('mu', 'sigma')
  if spatial and not {*names} <= {*arrays}:
    raise UserError(
      f"{path} holds no spatial features (mu_s and sigma_s): take ADM's file, or leave out sFID."
    )
  return _checked(Path(path), arrays.get('n'), *(arrays[name] for name in names))


def described(path: str | os.PathLike) -> tuple[str, bool]:
  """Return (name of the features, '' where the file does not say it, whether it has spatial ones).
  """
  arrays = _read(Path(path))
  return str(arrays.get('features', '')), {'mu_s', 'sigma_s'} <= {*arrays}


def _read(path: Path) -> dict[str, Any]:
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
  """Write statistics, as npz or torch-fidelity's cache by the suffix; atomic.

  features: the extractor's name, by which values compare. spatial: of ADM's spatial features, for
  sFID. images: makes it one of ADM's reference batches. UserError: another suffix, a cache of more
  than statistics, or no torch to write it.
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
  """Return the path. UserError where its suffix is none of SUFFIXES."""
  path = Path(path)
  if path.suffix not in SUFFIXES:
    known = ' or '.join(f'NAME{suffix}' for suffix in SUFFIXES)
    raise UserError(f'Statistics cannot be written to {path}; name it {known}.')
  return path
