"""Every kind of source of pictures gives the same stream of examples; what is wrong is named."""

import itertools
import pickle

import numpy as np
import pytest

from diffusion_jax.data.loader import Loader
from diffusion_jax.data.transforms import build_transforms
from tests.data import kinds

KINDS = {'folder': kinds.as_folder, 'records': kinds.as_records}


@pytest.fixture(scope='module')
def pictures(sources):
  return kinds.openmoji(sources)


@pytest.fixture(scope='module')
def written(pictures, tmp_path_factory):
  """Kind -> data.dataset of these pictures."""
  root = tmp_path_factory.mktemp('kinds')
  return {kind: write(root / kind, pictures) for kind, write in KINDS.items()}


def stream(source, count=8):
  transforms = build_transforms(['random_flip', 'choose_caption', 'normalize'])
  loader = Loader(source, transforms, batch_size=6, seed=3, num_threads=0)
  return list(itertools.islice(loader, count))


@pytest.mark.parametrize('kind', [kind for kind in KINDS if kind != 'folder'])
@pytest.mark.parametrize('size', [16, (16, 24)])
def test_the_same_examples(written, pictures, kind, size):
  """In the same order, split alike, with the same sizes and hashes, also of parts and by pickle."""
  theirs, ours = (kinds.opened(written[each], size, test_fraction=0.3)
                  for each in ('folder', kind))
  for expected, found in zip(theirs, ours, strict=True):
    assert len(found) == len(expected) and 0 < len(found) < len(pictures)
    np.testing.assert_array_equal(found.original_sizes(), expected.original_sizes())
    np.testing.assert_array_equal(found.hashes(), expected.hashes())
    assert found.measured == expected.measured
    found = pickle.loads(pickle.dumps(found))
    for a, b in zip(stream(expected), stream(found), strict=True):
      assert a.keys() == b.keys() and a['id'] == b['id'] and a['caption'] == b['caption']
      np.testing.assert_array_equal(a['image'], b['image'])
      np.testing.assert_array_equal(a['sizes'], b['sizes'])
    shapes = np.resize([(8, 16), (16, 8), (12, 12)], (len(found), 2))
    for i in (0, 1, 2, len(found) - 1):
      a, b = (each.at_sizes(shapes)[i] for each in (expected, found))
      np.testing.assert_array_equal(a['image'], b['image'])
      assert a['image'].shape == (*shapes[i], 3)
  print_ = ours[0].fingerprint()
  assert print_ == kinds.opened(written[kind], size, test_fraction=0.3)[0].fingerprint()
  assert print_ != ours[1].fingerprint()
