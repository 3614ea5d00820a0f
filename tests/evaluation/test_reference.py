"""Files of statistics as references: of which features they are, with and without spatial ones."""

from types import SimpleNamespace

import numpy as np
import pytest

from diffusion_jax.errors import UserError
from diffusion_jax.evaluation.comparison import compare
from diffusion_jax.evaluation.extract import Features
from diffusion_jax.evaluation.reference import comparable, moments_of, open_reference, write_moments
from diffusion_jax.evaluation.statistics import Statistics, load_statistics

RNG = np.random.default_rng(0)
NAME = 'inception/w/clean'
INCEPTION = SimpleNamespace(name=NAME, widths={'pool3': 6, 'spatial': 4, 'logits_unbiased': 3})
CLIP = SimpleNamespace(name='clip/c/bicubic', widths={'embedding': 5})
COLUMNS = {f'{e.name}:{o}': width for e in (INCEPTION, CLIP) for o, width in e.widths.items()}
OF_INCEPTION = {name: width for name, width in COLUMNS.items() if name.startswith(NAME)}


def _values(shift=0.0):
  return {name: shift + RNG.normal(size=(40, width)) for name, width in COLUMNS.items()}


def _figures(values, moments):
  samples = Features(values, np.arange(40), [])
  return compare(samples, moments, ['fd']).values


def test_inception_with_its_spatial_features(tmp_path):
  """fid and sfid against what was written of other samples; without mu_s there is no sfid."""
  path = tmp_path / 'adm.npz'
  there, here = ({n: v for n, v in _values(s).items() if n in OF_INCEPTION} for s in (0.0, 0.5))
  assert write_moments(path, there, [INCEPTION]) == [path]
  with np.load(path) as file:
    assert set(file) == {'mu', 'sigma', 'mu_s', 'sigma_s', 'n', 'features'}
    arrays = dict(file)
  np.testing.assert_allclose(arrays['sigma_s'], np.cov(there[f'{NAME}:spatial'], rowvar=False))
  name, moments, notes = open_reference(str(path), OF_INCEPTION)
  assert name == str(path) and notes == []
  assert {*moments} == {f'{NAME}:pool3', f'{NAME}:spatial'}
  found = _figures(here, moments)
  assert {*found} == {'fid', 'sfid'}
  direct = {n: Statistics.from_features(v) for n, v in there.items()}
  assert found == pytest.approx(_figures(here, direct), rel=1e-9)
  np.savez(path, mu=arrays['mu'], sigma=arrays['sigma'], features=NAME)
  moments, notes = moments_of(path, OF_INCEPTION)
  assert notes == [f'{path} has no spatial features (mu_s, sigma_s), so that there is no sfid.']
  assert _figures(here, moments) == pytest.approx({'fid': found['fid']}, rel=1e-9)


def test_each_of_several_kinds_of_features_has_a_file(tmp_path):
  values = _values()
  files = write_moments(tmp_path / 'ref.npz', values, [INCEPTION, CLIP])
  assert [file.name for file in files] == ['ref-inception-w-clean.npz', 'ref-clip-c-bicubic.npz']
  clip = load_statistics(files[1])
  np.testing.assert_allclose(clip.mean, values['clip/c/bicubic:embedding'].mean(0), rtol=1e-12)
  with pytest.raises(UserError, match='are in the features inception/w/clean, which cannot be'):
    moments_of(files[0], COLUMNS)
  (cache,) = write_moments(tmp_path / 'ref.pt', values, [INCEPTION])
  assert load_statistics(cache).n == 40
  with pytest.raises(UserError, match='holds no spatial features'):
    load_statistics(cache, spatial=True)


def test_what_may_be_compared():
  assert comparable('f', NAME, NAME) == []
  assert 'f does not say in which features' in comparable('f', '', NAME)[0]
  (note,) = comparable('f', 'inception/pt_inception/clean', NAME)
  assert note.startswith('f is in the features inception/pt_inception/clean')
  for other in ('inception/w/tensorflow', 'inception/w/pytorch', 'dinov2/large/w/clean', 'clip/w'):
    with pytest.raises(UserError, match=f'features {other}, which cannot be compared with {NAME}'):
      comparable('f', other, NAME)
