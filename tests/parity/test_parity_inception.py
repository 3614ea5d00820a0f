"""The FID Inception against PyTorch: every feature, and each resize rule end to end.

reference/inception.py was found bitwise equal to torch-fidelity 0.4.0's own class on the same
weights, for all that both compute.
"""

import numpy as np
import pytest

torch = pytest.importorskip('torch')

from diffusion_jax.evaluation.extractors import compiled, load_extractor  # noqa: E402
from diffusion_jax.evaluation.extractors.resize import OF_INCEPTION, prepare  # noqa: E402
from diffusion_jax.models.features.inception import SIZE, InceptionConfig  # noqa: E402
from tests.parity.reference import resizers  # noqa: E402
from tests.parity.reference.inception import random_inception  # noqa: E402


@pytest.fixture(scope='module')
def reference():
  return random_inception()


@pytest.fixture(scope='module')
def weights(reference, tmp_path_factory):
  path = tmp_path_factory.mktemp('inception') / 'pt_inception.pth'
  torch.save(reference.state_dict(), path)
  return path


@pytest.fixture(scope='module')
def images():
  """Waves and noise: uint8 [2 180 240 3]."""
  rng = np.random.default_rng(0)
  y, x = np.mgrid[:180, :240] / 40
  waves = np.stack([np.sin(x + k * y) for k in range(3)], -1) * 127 + 128
  return np.stack([waves.astype(np.uint8), rng.integers(0, 256, (180, 240, 3), np.uint8)])


def assert_same(found, wanted):
  """Within 1e-4 of how far the entries of a feature lie apart."""
  assert found.keys() == wanted.keys()
  for name, value in wanted.items():
    value, got = value.numpy(), np.asarray(found[name])
    assert got.shape == value.shape and got.dtype == np.float32, name
    spread = np.abs(value - value.mean()).mean()
    assert spread > 0.1 * np.abs(value).mean() > 0, name
    assert np.abs(got - value).max() < 1e-4 * spread, name


def test_every_feature(reference, weights, images):
  state = reference.state_dict()
  assert (len(state), sum(tensor.numel() for tensor in state.values())) == (566, 23_885_486)
  widths = InceptionConfig().widths
  assert widths == {
    '64': 64, '192': 192, 'spatial': 2023, '768': 768, 'pool3': 2048, 'logits_unbiased': 1008,
    'logits': 1008,
  }
  extractor = load_extractor('inception/tensorflow', weights, outputs=tuple(widths))
  assert extractor.name == 'inception/pt_inception/tensorflow' and extractor.widths == widths
  found = compiled(extractor)(extractor.params, images)
  with torch.no_grad():
    assert_same(found, reference(resizers.feed('tensorflow', images)))


@pytest.mark.parametrize('name', OF_INCEPTION)
def test_each_rule_end_to_end(name, reference, weights, images):
  """Of the first feature alone, which is quick, as nothing after it is computed."""
  extractor = load_extractor(f'inception/{name}', weights, outputs=('64',))
  found = compiled(extractor)(extractor.params, images)
  with torch.no_grad():
    stem = reference.stem(resizers.feed(name, images))
  assert_same(found, {'64': stem.mean((2, 3))})
  others = [prepare(images, SIZE, other) for other in OF_INCEPTION if other != name]
  mine = prepare(images, SIZE, name)
  assert all(np.abs(other - mine).max() > 1e-3 for other in others)
