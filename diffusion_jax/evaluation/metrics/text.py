"""How well images fit their captions, from embeddings of both."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from diffusion_jax.errors import UserError
from diffusion_jax.evaluation.metrics.metric import (
  HIGHER,
  Compared,
  Metric,
  MetricValues,
  Value,
  matrix,
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
  """100 * max(cos(image, text), 0) of each pair, in [0, 100].

  Hessel et al. 2021, eq. 1, with the weight 100 that later work reports instead of 2.5.
  UserError if there are no pairs, the shapes differ or a value is not finite.
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
  """Share of images, in [0, 1], that `retrieval_hits` counts."""
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
  """clip_score, with its interval."""
  each = clip_score_of_each(of.samples, of.texts)
  values.add_mean('clip_score', each, seed)


def _retrieval(of: Compared, values: MetricValues, seed: int) -> None:
  """retrieval_r1: own caption first among 100, with its interval."""
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
