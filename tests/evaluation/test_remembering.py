"""What is learned by heart is found, and how far a model has gone from the one it began with."""

import dataclasses
import types

import jax
import numpy as np
import pytest

from diffusion_jax.config import MeshConfig
from diffusion_jax.errors import UserError
from diffusion_jax.evaluation import remembering
from diffusion_jax.evaluation.remembering import Drift, Memorisation, nearest, unit
from diffusion_jax.parallel.mesh import make_mesh


def test_the_nearest_is_found_across_parts(monkeypatch):
  monkeypatch.setattr(remembering, '_PART', 3)
  rng = np.random.default_rng(0)
  rows, others = (unit(rng.normal(size=(n, 5))) for n in (6, 11))
  distance, which = nearest(rows, others)
  wanted = 1 - rows.astype(np.float64) @ others.T.astype(np.float64)
  np.testing.assert_array_equal(which, wanted.argmin(axis=1))
  np.testing.assert_allclose(distance, wanted.min(axis=1), atol=1e-6)


@dataclasses.dataclass
class Drawer:
  """A model that draws the pictures that it is given as its weights, in order."""

  size: tuple[int, int] = (32, 32)

  @property
  def trained_size(self):
    return self.size

  def prompt(self, record):
    return record['captions'][0]

  def generate(self, weights, captions, config, *, seed, mesh, batch_size):
    for start in range(0, len(captions), batch_size):
      yield weights[start : min(start + batch_size, len(captions))]


@pytest.fixture(scope='module')
def mesh():
  return make_mesh(MeshConfig(), jax.devices()[:1])


def test_planted_copies_of_training_pictures_are_found(sources, parts, mesh):
  train, test = sources
  held_out = np.stack([test[i]['image'] for i in range(len(test))])
  one = Memorisation(
    train=train, test=test, mesh=mesh, sample=None, features=f'clip:{parts["clip"]}', pictures=16,
    training_pictures=64, held_out_pictures=len(test),
  )
  assert one.metrics == ['memorised_fraction', 'nearest_training', 'nearest_training_ratio']
  own = list(range(0, len(test), max(len(test) // 16, 1)))[:16]
  honest = dict(one.run(Drawer(), held_out[own], jax.random.key(0)))
  # Pictures of the held-out split itself lie as they do.
  assert honest['memorised_fraction'] <= 0.2
  assert honest['nearest_training_ratio'] == pytest.approx(1, rel=0.5)

  order = np.random.default_rng(0).permutation(len(train))
  drawn = held_out[own].copy()
  copies = [2, 5, 7, 11]
  for place in copies:
    drawn[place] = np.clip(train[order[place + 20]]['image'].astype(int) + 1, 0, 255)
  found = dict(one.run(Drawer(), drawn, jax.random.key(0)))
  assert found['memorised_fraction'] >= len(copies) / 16
  (warning,) = found['warnings']
  assert sum(f'picture {place + 20} of the training' in warning for place in copies) >= 2


def test_drift_is_the_distance_of_pairs(sources, parts, mesh, monkeypatch):
  images = np.stack([sources[0][i]['image'] for i in range(4)])
  part = types.SimpleNamespace(load=lambda mesh: images)
  reads = []

  def read_model(path):
    reads.append(path)
    return Drawer(), {'denoiser': part}, None

  monkeypatch.setattr(remembering, 'read_model', read_model)
  monkeypatch.setattr(Drawer, 'generate', lambda self, weights, captions, *a, **k: iter(
    [weights['denoiser'] if isinstance(weights, dict) else weights]
  ))
  one = Drift(
    mesh=mesh, sample=None, features=f'clip:{parts["clip"]}', base='base', captions=['a'] * 4
  )
  same = dict(one.run(Drawer(), images, jax.random.key(0)))
  assert same['drift'] == pytest.approx(0, abs=1e-6)
  other = images.copy()
  other[1] = 255 - other[1]
  moved = dict(one.run(Drawer(), other, jax.random.key(0)))
  assert moved['drift_most'] == pytest.approx(4 * moved['drift'], rel=0.05) and moved['drift'] > 0
  assert reads == ['base']  # The base draws once.


@pytest.mark.parametrize(('kind', 'options', 'words'), [
  (Memorisation, {'quantile': 1.5}, 'quantile of memorisation is 1.5'),
  (Memorisation, {'pictures': 0}, 'pictures of memorisation is 0'),
  (Memorisation, {'features': 'vgg'}, 'features of memorisation vgg is not of the form KIND:PATH'),
  (Drift, {'captions': ()}, 'captions of drift'),
])
def test_what_does_not_make_sense(sources, mesh, kind, options, words):
  given = {'train': sources[0], 'test': sources[1]} if kind is Memorisation else {'base': 'base'}
  with pytest.raises(UserError, match=words):
    kind(mesh=mesh, sample=None, **given, **options)
