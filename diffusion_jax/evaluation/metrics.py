"""Scores of generated images, from statistics, features, embeddings or pixels.

Host numpy in float64: features are small, and a distance is a difference of large numbers.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from diffusion_jax.errors import UserError
from diffusion_jax.evaluation.statistics import Statistics

# Two captions with one embedding score alike only up to the order in which products are summed.
_TIE = 1e-12


def frechet_distance(a: Statistics, b: Statistics) -> float:
  """Fréchet distance of two Gaussians, |m_a - m_b|^2 + Tr(S_a + S_b - 2 (S_a S_b)^(1/2)), >= 0.

  Heusel et al. 2017, eq. 6; called FID when the features are Inception's pool3. The trace of the
  root is the sum of the roots of the eigenvalues of H^T S_b H, with S_a = H H^T: symmetric, so
  that a rank-deficient covariance (n < d) neither fails nor turns complex.

  Raises:
    UserError: fewer than 2 samples on a side, or features of different widths.
  """
  if a.mean.shape != b.mean.shape:
    raise UserError(
      f'Features of width {len(a.mean)} and {len(b.mean)} cannot be compared: compute both '
      'statistics with the same feature extractor.'
    )
  covariance_a, covariance_b = a.covariance, b.covariance
  values, vectors = np.linalg.eigh(covariance_a)
  # Rounding makes zero eigenvalues slightly negative.
  half = vectors * np.sqrt(np.clip(values, 0, None))
  product = half.T @ covariance_b @ half
  eigenvalues = np.linalg.eigvalsh((product + product.T) / 2)
  trace_of_root = np.sqrt(np.clip(eigenvalues, 0, None)).sum()
  distance = np.sum((a.mean - b.mean) ** 2)
  distance += np.trace(covariance_a) + np.trace(covariance_b) - 2 * trace_of_root
  return max(float(distance), 0.0)


def kernel_distance(
  x: Float[np.ndarray, 'n d'],
  y: Float[np.ndarray, 'm d'],
  *,
  subsets: int,
  subset_size: int,
  seed: int,
) -> tuple[float, float]:
  """Kernel distance (KID): mean and standard deviation of the unbiased MMD^2 over random subsets.

  Binkowski et al. 2018: the kernel is (x.y/d + 1)^3. Each subset draws `subset_size` rows from x
  and from y without replacement. Its expectation is 0 for equal distributions, so that values
  below 0 occur. The paper uses 100 subsets of 1000.

  Raises:
    UserError: widths differ, or subset_size is below 2 or above n or m, or subsets below 1.
  """
  x, y = _matrix(x, 'features'), _matrix(y, 'features')
  if x.shape[1] != y.shape[1]:
    raise UserError(
      f'Features of width {x.shape[1]} and {y.shape[1]} cannot be compared: compute both with '
      'the same feature extractor.'
    )
  if not 2 <= subset_size <= min(len(x), len(y)) or subsets < 1:
    raise UserError(
      f'The kernel distance cannot draw {subsets} subsets of {subset_size} from {len(x)} and '
      f'{len(y)} samples: choose a subset size from 2 to the smaller count.'
    )
  rng = np.random.default_rng(seed)
  values = [
    _unbiased_mmd2(
      x[rng.choice(len(x), subset_size, replace=False)],
      y[rng.choice(len(y), subset_size, replace=False)],
    )
    for _ in range(subsets)
  ]
  return float(np.mean(values)), float(np.std(values))


def _unbiased_mmd2(x: Float[np.ndarray, 'n d'], y: Float[np.ndarray, 'n d']) -> float:
  """Binkowski et al. 2018, eq. 4: pairs of a sample with itself are left out within x and y."""
  n, d = x.shape
  kernel = lambda a, b: (a @ b.T / d + 1) ** 3
  within = sum(k.sum() - np.trace(k) for k in (kernel(x, x), kernel(y, y)))
  return float(within / (n * (n - 1)) - 2 * kernel(x, y).mean())


def energy_distance(x: Float[np.ndarray, 'n d'], y: Float[np.ndarray, 'm d']) -> float:
  """2 E|x - y| - E|x - x'| - E|y - y'|, unbiased (Szekely & Rizzo 2013, eq. 5).

  0 only where both have the same distribution; estimates of 0 may be a little below it.
  """
  from scipy.spatial.distance import cdist, pdist  # Takes long to import.

  x, y = _matrix(x, 'x'), _matrix(y, 'y')
  between = cdist(x, y).mean()
  within = sum(pdist(points).mean() for points in (x, y))
  return float(2 * between - within)


def clip_score(
  image_embeddings: Float[np.ndarray, 'n p'], text_embeddings: Float[np.ndarray, 'n p']
) -> float:
  """Mean over pairs of 100 * max(cos(image, text), 0), in [0, 100].

  Hessel et al. 2021, eq. 1, with the weight 100 that later work reports instead of 2.5.
  UserError if there are no pairs, the shapes differ or a value is not finite.
  """
  images, texts = _unit_pairs(image_embeddings, text_embeddings)
  return float(100 * np.clip(np.sum(images * texts, axis=1), 0, None).mean())


def retrieval_recall(
  image_embeddings: Float[np.ndarray, 'n p'],
  text_embeddings: Float[np.ndarray, 'n p'],
  *,
  k: int,
  candidates: int = 100,
  seed: int,
) -> float:
  """Share of images, in [0, 1], whose own caption is among the k most similar candidates.

  For each image the candidates are its own caption and `candidates - 1` others, drawn without
  replacement; the draw depends on `seed` and n alone. With fewer than `candidates` captions all n
  are ranked, which makes the task easier: report n beside the number. A caption that ties with
  the own one, such as a copy of it, ranks before it, so that a constant model scores 0. This is
  R-precision of Xu et al. 2018 (AttnGAN) for k = 1 and 100 candidates. Chance is k / candidates.

  Raises:
    UserError: no pairs, shapes differ, values not finite, or k outside 1 <= k <= candidates.
  """
  if not 1 <= k <= candidates:
    raise UserError(f'Retrieval needs 1 <= k <= candidates, not k={k} of {candidates}: change k.')
  images, texts = _unit_pairs(image_embeddings, text_embeddings)
  n = len(images)
  others = min(candidates, n) - 1
  rng = np.random.default_rng(seed)
  hits = 0
  for i in range(n):
    drawn = rng.choice(n - 1, others, replace=False) if others else np.zeros(0, np.int64)
    drawn = drawn + (drawn >= i)  # Skips the own caption.
    ahead = np.sum(texts[drawn] @ images[i] >= texts[i] @ images[i] - _TIE)
    hits += bool(ahead < k)
  return hits / n


def psnr(x: Float[np.ndarray, 'b h w c'], y: Float[np.ndarray, 'b h w c']) -> float:
  """Peak signal-to-noise ratio in dB of images in [-1, 1] (peak 2.0), averaged over images.

  10 log10(2^2 / mean squared error) per image; infinite as soon as one image is reproduced
  exactly. UserError if there are no images or the shapes differ.
  """
  x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
  if x.shape != y.shape or x.ndim < 2 or x.size == 0:
    raise UserError(
      f'PSNR compares two equal, non-empty batches of images, not {list(x.shape)} with '
      f'{list(y.shape)}: give originals and reconstructions in pairs.'
    )
  error = np.mean((x - y) ** 2, axis=tuple(range(1, x.ndim)))
  with np.errstate(divide='ignore'):
    return float(np.mean(10 * np.log10(4.0 / error)))


def _matrix(x: np.ndarray, name: str) -> Float[np.ndarray, 'n d']:
  x = np.asarray(x, np.float64)
  if x.ndim != 2 or x.size == 0:
    raise UserError(f'The {name} must be a non-empty [n d] array, not {list(x.shape)}: check them.')
  if not np.isfinite(x).all():
    raise UserError(f'The {name} hold NaN or infinite values: check the images and the weights.')
  return x


def _unit_pairs(
  images: np.ndarray, texts: np.ndarray
) -> tuple[Float[np.ndarray, 'n p'], Float[np.ndarray, 'n p']]:
  images, texts = _matrix(images, 'image embeddings'), _matrix(texts, 'text embeddings')
  if images.shape != texts.shape:
    raise UserError(
      f'Image embeddings {list(images.shape)} and text embeddings {list(texts.shape)} do not pair '
      'up: give one caption for each image, from both towers of one model.'
    )
  # A zero vector stays zero, similar to nothing, instead of becoming NaN.
  unit = lambda x: x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-30)
  return unit(images), unit(texts)
