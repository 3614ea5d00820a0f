"""Metrics of images: against originals in [-1, 1], against captions, by a classifier's logits."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from diffusion_jax.errors import UserError
from diffusion_jax.evaluation.metrics.metric import (
  HIGHER,
  LOWER,
  Compared,
  Metric,
  MetricValues,
  Value,
  matrix,
  of_each,
)

_WINDOW, _SIGMA = 11, 1.5
_PEAK = 2.0  # The range of the values.


def psnr_of_each(
  x: Float[np.ndarray, 'b h w c'], y: Float[np.ndarray, 'b h w c']
) -> Float[np.ndarray, 'b']:
  """Peak signal-to-noise ratio of each pair of images in dB, 10 log10(2^2 / mean squared error).

  Infinite for equal images. UserError: no images, or different shapes.
  """
  x, y = (np.asarray(v, np.float64) for v in _pairs(x, y, 'PSNR'))
  error = np.mean((x - y) ** 2, axis=tuple(range(1, x.ndim)))
  with np.errstate(divide='ignore'):
    return 10 * np.log10(_PEAK**2 / error)


def l1_of_each(
  x: Float[np.ndarray, 'b h w c'], y: Float[np.ndarray, 'b h w c']
) -> Float[np.ndarray, 'b']:
  """Mean absolute difference of each pair of images, of values in [-1, 1]. UserError as in PSNR."""
  x, y = (np.asarray(v, np.float64) for v in _pairs(x, y, 'L1'))
  return np.abs(x - y).mean(axis=tuple(range(1, x.ndim)))


def ssim_of_each(
  x: Float[np.ndarray, 'b h w c'], y: Float[np.ndarray, 'b h w c']
) -> Float[np.ndarray, 'b']:
  """Structural similarity of each pair of images, in [-1, 1] (Wang et al. 2004, eq. 13).

  Gaussian windows of sigma 1.5 over 11 x 11 pixels, per channel, K1 = 0.01, K2 = 0.03, averaged
  over the windows within the image and channels: scikit-image's structural_similarity with
  gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=2. UserError as in PSNR,
  or for images below 11 pixels.
  """
  x, y = _pairs(x, y, 'SSIM')
  if x.ndim != 4 or min(x.shape[1:3]) < _WINDOW:
    raise UserError(
      f'SSIM needs images [b h w c] of {_WINDOW} pixels or more, not {list(x.shape)}.'
    )
  return np.asarray(_ssim(jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.float32)), np.float64)


@jax.jit
def _ssim(x: Float[Array, 'b h w c'], y: Float[Array, 'b h w c']) -> Float[Array, 'b']:
  c1, c2 = (0.01 * _PEAK) ** 2, (0.03 * _PEAK) ** 2
  # Variances are differences of squares: near the channel's mean those lose few digits.
  centre = x.mean(axis=(1, 2), keepdims=True)
  x, y = x - centre, y - centre
  blur = lambda v: _along(_along(v, 1), 2)
  mean_x, mean_y = blur(x), blur(y)
  variances = blur(x * x + y * y) - mean_x**2 - mean_y**2
  covariance = blur(x * y) - mean_x * mean_y
  mean_x, mean_y = mean_x + centre, mean_y + centre
  luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
  structure = (2 * covariance + c2) / (variances + c2)
  return (luminance * structure).mean(axis=(1, 2, 3))


def _along(x: Float[Array, 'b h w c'], axis: int) -> Float[Array, 'b h w c']:
  """Weighted sums over windows along an axis, as a product with a banded matrix."""
  size = x.shape[axis]
  offsets = np.arange(_WINDOW) - _WINDOW // 2
  weights = np.exp(-(offsets**2) / (2 * _SIGMA**2))
  band = np.zeros((size - _WINDOW + 1, size), np.float32)
  for i in range(len(band)):
    band[i, i : i + _WINDOW] = weights / weights.sum()
  out = jnp.tensordot(x, band, axes=((axis,), (1,)), precision='highest')
  return jnp.moveaxis(out, -1, axis)


def _pairs(x: np.ndarray, y: np.ndarray, name: str) -> tuple[np.ndarray, np.ndarray]:
  if x.shape != y.shape or x.ndim < 2 or x.size == 0:
    raise UserError(
      f'{name} compares two equal, non-empty batches of images, not {list(x.shape)} with '
      f'{list(y.shape)}: give originals and reconstructions in pairs.'
    )
  return x, y


DISCRETE_BITS = 'latent_bits_per_dim_discrete'
_OF_REFERENCE = ('reference', 'reference_images')


def _of_pairs(name: str, title: str, better: str, source: str = 'an autoencoder') -> Metric:
  return Metric(name, of_each, (name,), (), title, better, _OF_REFERENCE, source=source)


PSNR = _of_pairs('psnr', 'PSNR, dB', HIGHER)
SSIM = _of_pairs('ssim', 'SSIM', HIGHER)
L1 = _of_pairs('l1', 'L1 distance, pixels in [-1, 1]', LOWER)
LPIPS = _of_pairs('lpips', 'LPIPS', LOWER, 'an autoencoder, and --lpips')
BITS_PER_DIM = Metric(
  'bits_per_dim', of_each, (DISCRETE_BITS,), (), comparable_on=(),
  source='a diffusion model and captions of images', values=(
    Value(DISCRETE_BITS, 'Bits per dimension of latents, discrete bound', LOWER),
  ),
)


# Two captions with one embedding score alike only up to the order in which products are summed.
_TIE = 1e-12


def clip_score(
  image_embeddings: Float[np.ndarray, 'n p'], text_embeddings: Float[np.ndarray, 'n p']
) -> float:
  """Mean over pairs of `clip_score_of_each`."""
  return float(clip_score_of_each(image_embeddings, text_embeddings).mean())


def clip_score_of_each(
  image_embeddings: Float[np.ndarray, 'n p'], text_embeddings: Float[np.ndarray, 'n p']
) -> Float[np.ndarray, 'n']:
  """100 * max(cos(image, text), 0) of each pair, in [0, 100] (Hessel et al. 2021, eq. 1).

  UserError: no pairs, different shapes, or a value that is not finite.
  """
  images, texts = _unit_pairs(image_embeddings, text_embeddings)
  return 100 * np.clip(np.sum(images * texts, axis=1), 0, None)


def retrieval_recall(
  image_embeddings: Float[np.ndarray, 'n p'],
  text_embeddings: Float[np.ndarray, 'n p'],
  *,
  k: int,
  candidates: int = 100,
  seed: int,
) -> float:
  """Return the fraction of images, in [0, 1], that `retrieval_hits` counts."""
  hits = retrieval_hits(image_embeddings, text_embeddings, k=k, candidates=candidates, seed=seed)
  return float(hits.mean())


def retrieval_hits(
  image_embeddings: Float[np.ndarray, 'n p'],
  text_embeddings: Float[np.ndarray, 'n p'],
  *,
  k: int,
  candidates: int = 100,
  seed: int,
) -> Float[np.ndarray, 'n']:
  """1.0 for each image whose own caption is among the k most similar candidates, else 0.0.

  R-precision (Xu et al. 2018, AttnGAN, k = 1, 100 candidates): the own caption and `candidates - 1`
  others, without replacement, by `seed` and n alone; with fewer captions all n, which is easier:
  report n. A tie, such as a copy, ranks before the own caption, so a constant model scores 0.
  Chance is k / candidates. UserError: no pairs, different shapes, values not finite, or k outside 1
  to candidates.
  """
  if not 1 <= k <= candidates:
    raise UserError(f'Retrieval needs 1 <= k <= candidates, not k={k} of {candidates}: change k.')
  images, texts = _unit_pairs(image_embeddings, text_embeddings)
  n = len(images)
  others = min(candidates, n) - 1
  rng = np.random.default_rng(seed)
  hits = np.zeros(n)
  for i in range(n):
    drawn = rng.choice(n - 1, others, replace=False) if others else np.zeros(0, np.int64)
    drawn = drawn + (drawn >= i)  # Skips the own caption.
    ahead = np.sum(texts[drawn] @ images[i] >= texts[i] @ images[i] - _TIE)
    hits[i] = ahead < k
  return hits


def _unit_pairs(
  images: np.ndarray, texts: np.ndarray
) -> tuple[Float[np.ndarray, 'n p'], Float[np.ndarray, 'n p']]:
  images, texts = matrix(images, 'image embeddings'), matrix(texts, 'text embeddings')
  if images.shape != texts.shape:
    raise UserError(
      f'Image embeddings {list(images.shape)} and text embeddings {list(texts.shape)} do not pair '
      'up: give one caption for each image, from both towers of one model.'
    )
  # A zero vector stays zero, similar to nothing, instead of becoming NaN.
  unit = lambda x: x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-30)
  return unit(images), unit(texts)


def _clip_score(of: Compared, values: MetricValues, seed: int) -> None:
  each = clip_score_of_each(of.samples, of.texts)
  values.add_mean('clip_score', each, seed)


def _retrieval(of: Compared, values: MetricValues, seed: int) -> None:
  hits = retrieval_hits(of.samples, of.texts, k=1, seed=seed)
  values.add_mean('retrieval_r1', hits, seed)
  if len(hits) < 100:
    values.warnings.append(f'retrieval_r1 ranks {len(hits)} captions instead of 100: it is easier.')


CLIP_SCORE = Metric('clip_score', _clip_score, ('embedding',), ('texts',), values=(
  Value('clip_score', 'CLIP score', HIGHER, ('features',), 'clip'),
))
RETRIEVAL = Metric('retrieval', _retrieval, ('embedding',), ('texts',), values=(
  Value('retrieval_r1', 'Own caption ranked first', HIGHER, ('features', 'samples'), 'clip'),
))


def inception_score(
  logits: Float[np.ndarray, 'n c'], *, splits: int = 10, seed: int | None = 2020
) -> tuple[float, float]:
  """Inception score (Salimans et al. 2016): mean and standard deviation over splits, 1 to c.

  exp of the mean KL divergence of p(class | image) from the split's p(class), as torch-fidelity:
  shuffled by RandomState(seed), in `splits` nearly equal parts, logits without bias
  ('logits_unbiased', 1008). ADM and others do not shuffle (seed None), in parts of 5000. UserError:
  splits outside 1 to n, or logits that are empty or not finite.
  """
  logits = matrix(logits, 'logits')
  n = len(logits)
  if not 1 <= splits <= n:
    raise UserError(f'{n} samples cannot be cut into {splits} splits: choose 1 to {n}.')
  if seed is not None:
    logits = logits[np.random.RandomState(seed).permutation(n)]
  shifted = logits - logits.max(axis=1, keepdims=True)
  log_p = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
  scores = []
  for i in range(splits):
    part = log_p[i * n // splits : (i + 1) * n // splits]
    p = np.exp(part)
    # A class that underflows everywhere adds 0, not 0 * -inf.
    log_q = np.log(np.maximum(p.mean(axis=0), np.finfo(np.float64).tiny))
    scores.append(np.exp((p * (part - log_q)).sum(axis=1).mean()))
  return float(np.mean(scores)), float(np.std(scores))


def class_hits(
  logits: Float[np.ndarray, 'n c'], labels: Int[np.ndarray, 'n'], *, top: int = 1
) -> Float[np.ndarray, 'n']:
  """1.0 for each image whose label is among its `top` highest logits, 0.0 otherwise.

  The mean is class accuracy. Ties rank before the label, so a constant classifier scores 0.
  UserError: labels do not fit the logits, or top is outside 1 to c.
  """
  logits, labels = matrix(logits, 'logits'), np.asarray(labels)
  n, c = logits.shape
  if labels.shape != (n,) or not np.issubdtype(labels.dtype, np.integer):
    raise UserError(f'{n} rows of logits need {n} whole labels, not {list(labels.shape)}.')
  if labels.min() < 0 or labels.max() >= c or not 1 <= top <= c:
    raise UserError(
      f'Labels from {labels.min()} to {labels.max()} and the top {top} do not fit a classifier of '
      f'{c} classes: give the one that was trained on these labels.'
    )
  own = np.take_along_axis(logits, labels[:, None], axis=1)
  return ((logits >= own).sum(axis=1) <= top).astype(np.float64)


def _inception_score(of: Compared, values: MetricValues, seed: int) -> None:
  value, std = inception_score(of.samples, splits=min(10, len(of.samples)))
  values.add('inception_score', value)
  values.add('inception_score_std', std)


def _class_accuracy(of: Compared, values: MetricValues, seed: int) -> None:
  hits = class_hits(of.samples, of.labels)
  values.add_mean('class_accuracy', hits, seed)


INCEPTION_SCORE = Metric('inception_score', _inception_score, ('logits_unbiased',), (), values=(
  Value('inception_score', 'Inception score', HIGHER, ('features', 'samples')),
  Value('inception_score_std', 'Inception score, deviation over parts', '',
        ('features', 'samples')),
))
CLASS_ACCURACY = Metric('class_accuracy', _class_accuracy, ('logits',), ('labels',), values=(
  Value('class_accuracy', 'Fraction found to be of their class', HIGHER, ('features',),
        'classifier'),
))
