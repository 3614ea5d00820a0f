"""The features that golden figures were taken of: drawn here again, never stored."""

import numpy as np


def draw() -> dict[str, np.ndarray]:
  """reference [500 64], samples [400 64], logits [430 50], in float64.

  The two sets overlap in part, as a model's samples and real images do: other scales, a shifted
  mean, directions mixed, and values that are not negative, like pooled activations.
  """
  rng = np.random.default_rng(20)
  mix = rng.normal(size=(64, 64)) / 8
  scales = np.geomspace(2.0, 0.05, 64)
  reference = np.abs((rng.normal(size=(500, 64)) * scales) @ mix + 0.5)
  samples = np.abs((rng.normal(size=(400, 64)) * scales * 0.9) @ mix + 0.55)
  logits = rng.normal(size=(430, 50)) * 2
  return {'reference': reference, 'samples': samples, 'logits': logits}
