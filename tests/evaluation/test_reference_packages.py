"""Metrics against figures of torch-fidelity, pytorch-fid, clean-fid and prdc on the same features.

The figures are in golden/, with the script that recorded them and the versions.
"""

import json
from pathlib import Path

import numpy as np
import pytest

from diffusion_jax.evaluation.metrics.gaussians import frechet_distance
from diffusion_jax.evaluation.metrics.images import inception_score
from diffusion_jax.evaluation.metrics.kernel import kernel_distance
from diffusion_jax.evaluation.metrics.manifold import density_coverage, precision_recall
from diffusion_jax.evaluation.statistics import Statistics
from tests.evaluation.golden.features import draw

GOLDEN = json.loads((Path(__file__).parent / 'golden' / 'figures.json').read_text())
FIDELITY, PRDC = GOLDEN['torch-fidelity'], GOLDEN['prdc']
# Small enough that several blocks meet, the last of them padded.
BLOCK = 96


@pytest.fixture(scope='module')
def features():
  return draw()


def test_fid_is_that_of_the_three_packages(features):
  a, b = (Statistics.from_features(features[name]) for name in ('samples', 'reference'))
  found = frechet_distance(a, b)
  for package in ('torch-fidelity', 'pytorch-fid', 'clean-fid'):
    assert found == pytest.approx(GOLDEN[package]['fid'], rel=1e-9), package


def test_kid_is_torch_fidelitys_draw_for_draw(features):
  draws = {'subsets': 20, 'subset_size': 100, 'seed': 2020}
  samples, reference = features['samples'], features['reference']
  found = kernel_distance(samples, reference, **draws)
  assert found == pytest.approx(tuple(FIDELITY['kid']), rel=1e-9)
  rounded = kernel_distance(samples.astype(np.float32), reference.astype(np.float32), **draws)
  assert rounded == pytest.approx(tuple(FIDELITY['kid_of_float32']), rel=2e-5)


def test_kid_is_clean_fids_draw_for_draw(features):
  found, _ = kernel_distance(
    features['samples'], features['reference'], subsets=20, subset_size=100, seed=7
  )
  assert found == pytest.approx(GOLDEN['clean-fid']['kid_seed_7'], rel=1e-9)


def test_inception_score_is_torch_fidelitys(features):
  logits = features['logits']
  assert inception_score(logits) == pytest.approx(tuple(FIDELITY['inception_score']), rel=1e-9)
  found = inception_score(logits, splits=7, seed=None)
  assert found == pytest.approx(tuple(FIDELITY['inception_score_7_splits_unshuffled']), rel=1e-9)


@pytest.mark.parametrize('dtype', [np.float32, np.float64])
@pytest.mark.parametrize('k', [1, 3, 5])
def test_precision_and_recall_are_torch_fidelitys(features, k, dtype):
  sets = [features[name].astype(dtype) for name in ('samples', 'reference')]
  found = precision_recall(*sets, k=k, block=BLOCK)
  # They are float32 there.
  assert tuple(found) == pytest.approx(
    tuple(FIDELITY['precision_recall_f_score'][str(k)])[:2], rel=1e-6
  )


@pytest.mark.parametrize('k', [1, 3, 5])
def test_all_four_of_prdc(features, k):
  sets = features['samples'], features['reference']
  found = {
    **precision_recall(*sets, k=k, closed=False, block=BLOCK)._asdict(),
    **density_coverage(*sets, k=k, block=BLOCK)._asdict(),
  }
  assert found == pytest.approx(PRDC[str(k)], rel=1e-12)
