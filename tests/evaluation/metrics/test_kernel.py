"""Kernel distances against double loops, and their bias."""

import numpy as np
import pytest

from diffusion_jax.errors import UserError
from diffusion_jax.evaluation.metrics.kernel import cmmd, kernel_distance


def test_kernel_distance_is_the_double_loop():
  rng = np.random.default_rng(0)
  x, y = rng.normal(size=(5, 3)), rng.normal(size=(5, 3)) + 1
  kernel = lambda a, b: (np.dot(a, b) / 3 + 1) ** 3
  within = sum(kernel(s[i], s[j]) for s in (x, y) for i in range(5) for j in range(5) if i != j)
  across = sum(kernel(a, b) for a in x for b in y)
  mean, std = kernel_distance(x, y, subsets=3, subset_size=5, seed=0)
  assert mean == pytest.approx(within / 20 - 2 * across / 25, rel=1e-12)
  assert std == pytest.approx(0, abs=1e-12)  # Every subset is the whole set.


def test_kernel_distance_is_unbiased():
  rng = np.random.default_rng(1)
  draw = lambda: rng.normal(size=(40, 8))
  values = [
    kernel_distance(draw(), draw(), subsets=1, subset_size=40, seed=i)[0] for i in range(300)
  ]
  error = np.std(values) / np.sqrt(len(values))
  # The biased estimate would add 2 E[k(x,x) - k(x,x')] / 40, hundreds of these errors.
  assert abs(np.mean(values)) < 4 * error
  assert min(values) < 0


def test_kernel_distance_subsets_are_seeded_and_grow_with_the_shift():
  rng = np.random.default_rng(2)
  x, y = rng.normal(size=(200, 8)), rng.normal(size=(150, 8))
  run = lambda shift, seed: kernel_distance(x, y + shift, subsets=20, subset_size=50, seed=seed)
  assert run(1.0, 0) == run(1.0, 0)
  assert run(1.0, 0) != run(1.0, 1)
  assert run(1.0, 0)[1] > 0
  assert run(2.0, 0)[0] > run(1.0, 0)[0] > 0.5


@pytest.mark.parametrize('subsets, size', [(1, 1), (1, 6), (0, 5)])
def test_kernel_distance_refuses_impossible_subsets(subsets, size):
  with pytest.raises(UserError, match='subset size'):
    kernel_distance(np.zeros((5, 2)), np.zeros((9, 2)), subsets=subsets, subset_size=size, seed=0)


def _published_cmmd(x, y):
  """The paper's estimator as its authors write it, in float64."""
  x, y = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in (x, y))
  squared = lambda a, b: (a**2).sum(1)[:, None] + (b**2).sum(1) - 2 * a @ b.T
  mean = lambda a, b: np.exp(-squared(a, b) / (2 * 10**2)).mean()
  return 1000 * (mean(x, x) + mean(y, y) - 2 * mean(x, y))


@pytest.mark.parametrize('block', [4096, 60])
@pytest.mark.parametrize('shift', [0.0, 0.02, 1.0])
def test_cmmd_is_the_published_formula_without_its_rounding(shift, block):
  rng = np.random.default_rng(0)
  x = rng.normal(size=(200, 48)) + 1
  y = rng.normal(size=(170, 48)) * 1.1 + 1 + shift
  wanted = _published_cmmd(x, y)
  assert wanted > 1e-3
  assert cmmd(x * 7, y, block=block) == pytest.approx(wanted, rel=1e-5)
  single = cmmd(x.astype(np.float32), y.astype(np.float32), block=block)
  assert single == pytest.approx(wanted, rel=1e-4)


def test_cmmd_of_equal_sets_is_zero_and_of_equal_distributions_falls_like_one_over_n():
  rng = np.random.default_rng(0)
  draw = lambda n: rng.normal(size=(n, 16))
  x = draw(100)
  assert cmmd(x, x) == pytest.approx(0, abs=1e-6)
  means = [np.mean([cmmd(draw(n), draw(n)) for _ in range(20)]) for n in (50, 200)]
  assert means[0] / means[1] == pytest.approx(4, rel=0.15)
  with pytest.raises(UserError, match='width 16 and 3'):
    cmmd(x, x[:, :3])
