"""Scores from a classifier's logits."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int

from diffusion_jax.errors import UserError
from diffusion_jax.evaluation.metrics.metric import (
  HIGHER,
  Compared,
  Metric,
  MetricValues,
  Value,
  matrix,
)


def inception_score(
  logits: Float[np.ndarray, 'n c'], *, splits: int = 10, seed: int | None = 2020
) -> tuple[float, float]:
  """Inception score (Salimans et al. 2016): mean and standard deviation over splits, 1 to c.

  exp of the mean KL divergence of p(class | image) from the split's p(class). By torch-fidelity's
  conventions: samples are shuffled by RandomState(seed), cut into `splits` nearly equal parts, and
  the logits are Inception's without the bias ('logits_unbiased', 1008). ADM and others do not
  shuffle (seed None) and cut parts of 5000.

  Raises:
    UserError: splits outside 1 to n, or logits that are empty or not finite.
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

  The mean is the class accuracy of conditional samples. A class that ties with the label ranks
  before it, so that a constant classifier scores 0.

  Raises:
    UserError: numbers of logits and labels differ, a label is outside 0 to c - 1, or top outside
      1 to c.
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
  """inception_score, inception_score_std."""
  value, std = inception_score(of.samples, splits=min(10, len(of.samples)))
  values.add('inception_score', value)
  values.add('inception_score_std', std)


def _class_accuracy(of: Compared, values: MetricValues, seed: int) -> None:
  """class_accuracy: share of images that the classifier finds to be of their own class."""
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
