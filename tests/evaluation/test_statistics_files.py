"""Statistics in the files of other tools: read as those wrote them, refused where damaged."""

import io
import pickle

import numpy as np
import pytest
import torch

from diffusion_jax.data.image_batch import ImageBatch
from diffusion_jax.errors import UserError
from diffusion_jax.evaluation.metrics.frechet import frechet_distance
from diffusion_jax.evaluation.statistics import Statistics
from diffusion_jax.evaluation.statistics_files import (
  described,
  load_features,
  load_statistics,
  save_statistics,
)


def _features(d=7, seed=0):
  rng = np.random.default_rng(seed)
  return 5 + rng.normal(size=(101, d)) @ rng.normal(size=(d, d))


def _statistics(**kwargs):
  return Statistics.from_features(_features(**kwargs))


@pytest.mark.parametrize('suffix', ['npz', 'pt'])
def test_our_file_knows_its_samples_and_its_features(tmp_path, suffix):
  statistics, path = _statistics(), tmp_path / 'new' / f'reference.{suffix}'
  save_statistics(path, statistics, features='inception/w/clean')
  loaded = load_statistics(path)
  assert loaded.n == 101 and described(path) == ('inception/w/clean', False)
  np.testing.assert_array_equal(loaded.mean, statistics.mean)
  np.testing.assert_allclose(loaded.m2, statistics.m2, rtol=1e-15)
  both = loaded.merge(_statistics(seed=3))
  everything = np.concatenate([_features(), _features(seed=3)])
  assert both.n == 202
  np.testing.assert_allclose(both.covariance, np.cov(everything, rowvar=False), rtol=1e-12)
  if suffix == 'npz':
    with np.load(path, allow_pickle=False) as file:
      assert set(file) == {'mu', 'sigma', 'n', 'features'}
      assert file['n'] == 101 and file['features'] == 'inception/w/clean'
  assert list(path.parent.iterdir()) == [path]


# Each as the tool writes it; features are float32 there.
def _clean_fid(path, mu, sigma):
  np.savez(path, mu=mu, sigma=sigma)


def _pytorch_fid(path, mu, sigma):
  np.savez_compressed(path, mu=mu, sigma=sigma)


def _adm(path, mu, sigma):
  np.savez(path, mu=mu, sigma=sigma, mu_s=mu[:3], sigma_s=sigma[:3, :3],
           arr_0=np.zeros((2, 8, 8, 3), np.uint8))


def _torch_fidelity(path, mu, sigma):
  torch.save({'mu': mu, 'sigma': sigma}, path)


@pytest.mark.parametrize('dtype', [np.float32, np.float64])
@pytest.mark.parametrize('write', [_clean_fid, _pytorch_fid, _adm, _torch_fidelity])
def test_files_of_other_tools_are_read_but_do_not_know_n(tmp_path, write, dtype):
  features = _features().astype(dtype)
  mu, sigma = features.mean(axis=0), np.cov(features, rowvar=False)
  path = tmp_path / 'published.npz'
  with path.open('wb') as file:
    write(file, mu, sigma)
  found, own = load_statistics(path), Statistics.from_features(features)
  assert found.n is None
  np.testing.assert_array_equal(found.mean, mu)
  np.testing.assert_array_equal(found.covariance, sigma)
  other = _statistics(seed=3)
  assert frechet_distance(found, other) == pytest.approx(frechet_distance(own, other), rel=1e-5)
  for merge in (found.merge, other.merge):
    with pytest.raises(UserError, match='number of samples cannot be merged'):
      merge(found)
  assert described(path) == ('', write is _adm)
  save_statistics(tmp_path / 'copy.npz', found)
  assert load_statistics(tmp_path / 'copy.npz').n is None


@pytest.mark.parametrize('spatial', [None, _statistics(d=3, seed=1)])
def test_what_is_written_is_what_the_tools_read(tmp_path, spatial):
  """mu and sigma of pytorch-fid and clean-fid, mu_s, sigma_s and arr_0 of ADM."""
  statistics, path = _statistics(), tmp_path / 'file.npz'
  images = np.arange(5 * 4 * 6 * 3, dtype=np.uint8).reshape(5, 4, 6, 3) if spatial else None
  save_statistics(path, statistics, spatial=spatial, images=images)
  file = np.load(path, allow_pickle=False)
  assert set(file) == {'n', 'mu', 'sigma'} | ({'mu_s', 'sigma_s', 'arr_0'} if spatial else set())
  np.testing.assert_array_equal(file['mu'], statistics.mean)
  np.testing.assert_allclose(file['sigma'], np.cov(_features(), rowvar=False), rtol=1e-9)
  assert file['mu'].dtype == file['sigma'].dtype == np.float64
  if spatial:
    np.testing.assert_array_equal(file['mu_s'], spatial.mean)
    np.testing.assert_array_equal(file['sigma_s'], spatial.covariance)
    np.testing.assert_array_equal(load_statistics(path, spatial=True).mean, spatial.mean)
    np.testing.assert_array_equal(list(ImageBatch(path)), images)


def test_the_distance_by_what_pytorch_fid_and_clean_fid_open(tmp_path):
  """Both take the arrays mu and sigma of np.load, and the distance as it is computed here."""
  path, other = tmp_path / 'a.npz', _statistics(seed=3)
  save_statistics(path, _statistics(), features='inception/w/pytorch')
  wanted = frechet_distance(_statistics(), other)
  file = np.load(path)
  mu, sigma = file['mu'][:], file['sigma'][:]
  root = np.linalg.eigvals(sigma @ other.covariance).astype(complex)
  distance = np.sum((mu - other.mean) ** 2) + np.trace(sigma + other.covariance)
  assert distance - 2 * np.sqrt(root).real.sum() == pytest.approx(wanted, rel=1e-9)


def test_torch_fidelity_s_cache(tmp_path):
  statistics, path = _statistics(), tmp_path / 'file.pt'
  save_statistics(path, statistics)
  with torch.serialization.safe_globals(
    [np._core.multiarray._reconstruct, np.ndarray, np.dtype, np.dtypes.Float64DType]
  ):
    file = torch.load(path, weights_only=True)
  np.testing.assert_array_equal(file['mu'], statistics.mean)
  np.testing.assert_array_equal(file['sigma'], statistics.covariance)


def test_writing_refuses_what_a_file_cannot_hold(tmp_path):
  statistics = _statistics()
  with pytest.raises(UserError, match=r'written to .*x\.txt; name it NAME\.npz or NAME\.pt'):
    save_statistics(tmp_path / 'x.txt', statistics)
  with pytest.raises(UserError, match='a cache of torch-fidelity, cannot hold more'):
    save_statistics(tmp_path / 'x.pt', statistics, spatial=statistics)
  with pytest.raises(UserError, match='at least 2 samples and there are 1'):
    save_statistics(tmp_path / 'x.npz', Statistics.from_features(np.ones((1, 3))))
  assert not list(tmp_path.iterdir())


def _bytes(write):
  file = io.BytesIO()
  write(file)
  return file.getvalue()


def _flipped(data, at):
  return data[:at] + bytes([data[at] ^ 255]) + data[at + 1 :]


def _npz(**arrays):
  return _bytes(lambda file: np.savez(file, **arrays))


class _Evil:
  def __reduce__(self):
    return (eval, ('open("executed", "w")',))


MU, SIGMA = np.zeros(9), np.eye(9)
OURS = _npz(n=3, mu=MU, sigma=SIGMA)
CACHE = _bytes(lambda file: torch.save({'mu': MU, 'sigma': SIGMA}, file))
DAMAGED = {
  'empty': b'',
  'text': b'not an archive',
  'truncated': OURS[:200],
  'flipped': _flipped(OURS, 700),
  'compressed and flipped': _flipped(
    _bytes(lambda file: np.savez_compressed(file, mu=MU + 0.1, sigma=SIGMA + 0.1)), 90
  ),
  'truncated cache': CACHE[: len(CACHE) // 2],
  'flipped cache': _flipped(CACHE, CACHE.index(b'reconstruct') + 3),
  'cache of another kind': _bytes(lambda file: torch.save([1, 2], file)),
  'other arrays': _npz(arr_0=MU),
  'no sigma': _npz(mu=MU),
  'objects': _bytes(lambda file: np.savez(file, mu=np.array([_Evil()], object), sigma=SIGMA)),
  'code': _bytes(lambda file: torch.save({'mu': _Evil(), 'sigma': SIGMA}, file)),
  'pickle': pickle.dumps({'mu': MU, 'sigma': SIGMA}),
  'widths': _npz(mu=MU, sigma=np.eye(8)),
  'no vector': _npz(mu=np.zeros(()), sigma=np.zeros(())),
  'count': _npz(n=-1, mu=MU, sigma=SIGMA),
  'NaN': _npz(mu=MU, sigma=SIGMA * np.nan),
  'words': _npz(mu=np.array(['a', 'b']), sigma=np.full((2, 2), 'c')),
  'negative variance': _npz(mu=MU, sigma=-SIGMA),
  'lopsided': _npz(mu=MU, sigma=SIGMA + np.triu(np.ones((9, 9)))),
}


@pytest.mark.parametrize('kind', DAMAGED)
def test_damaged_and_wrong_files_are_named_in_one_sentence(tmp_path, monkeypatch, kind):
  monkeypatch.chdir(tmp_path)
  path = tmp_path / 'reference.npz'
  path.write_bytes(DAMAGED[kind])
  with pytest.raises(UserError, match=r'reference\.npz.* again\.$') as error:
    load_statistics(path)
  assert '\n' not in str(error.value)
  assert not (tmp_path / 'executed').exists()


def test_absent_files_and_absent_spatial_features_are_named(tmp_path):
  path = tmp_path / 'reference.npz'
  with pytest.raises(UserError, match=r'no statistics at .*reference'):
    load_statistics(path)
  save_statistics(path, _statistics())
  with pytest.raises(UserError, match='no spatial features'):
    load_statistics(path, spatial=True)


def test_features_that_clean_fid_keeps_for_kid(tmp_path):
  path = tmp_path / 'reference_kid.npz'
  with pytest.raises(UserError, match='no features'):
    load_features(path)
  features = _features().astype(np.float32)
  np.savez_compressed(path, feats=features)
  np.testing.assert_array_equal(load_features(path), features)
  whole = path.read_bytes()
  for data in (whole[:500], _flipped(whole, 300), OURS, _npz(feats=MU), _npz(feats=[['a']])):
    path.write_bytes(data)
    with pytest.raises(UserError, match=r'reference_kid\.npz.* again\.$'):
      load_features(path)
