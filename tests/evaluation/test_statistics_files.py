"""Statistics in the files of other tools: read as those wrote them, refused where damaged."""

import io
import pickle
import zipfile

import numpy as np
import pytest
import torch

from diffusion_jax.errors import UserError
from diffusion_jax.evaluation.metrics.frechet import frechet_distance
from diffusion_jax.evaluation.statistics import FittedGaussian, Statistics
from diffusion_jax.evaluation.statistics_files import (
  FORMATS,
  batch_images,
  load_features,
  load_statistics,
  save_statistics,
)


def _features(d=7, seed=0):
  rng = np.random.default_rng(seed)
  return 5 + rng.normal(size=(101, d)) @ rng.normal(size=(d, d))


def _statistics(**kwargs):
  return Statistics.from_features(_features(**kwargs))


def test_our_file_is_exact_and_the_only_one(tmp_path):
  statistics, path = _statistics(), tmp_path / 'new' / 'reference.npz'
  save_statistics(path, statistics)
  loaded = load_statistics(path)
  assert loaded.n == 101
  np.testing.assert_array_equal(loaded.mean, statistics.mean)
  np.testing.assert_array_equal(loaded.m2, statistics.m2)
  with np.load(path, allow_pickle=False) as file:
    assert set(file) == {'n', 'mean', 'm2'}
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
  with pytest.raises(UserError, match=r'number of samples.*choose clean-fid'):
    save_statistics(tmp_path / 'ours.npz', found)


@pytest.mark.parametrize('format', ['clean-fid', 'adm', 'torch-fidelity'])
def test_what_is_written_is_what_the_tools_read(tmp_path, format):
  statistics, path = _statistics(), tmp_path / 'file'
  spatial = _statistics(d=3, seed=1) if format == 'adm' else None
  images = np.arange(5 * 4 * 6 * 3, dtype=np.uint8).reshape(5, 4, 6, 3) if spatial else None
  save_statistics(path, statistics, format=format, spatial=spatial, images=images)
  if format == 'torch-fidelity':
    with torch.serialization.safe_globals(
      [np._core.multiarray._reconstruct, np.ndarray, np.dtype, np.dtypes.Float64DType]
    ):
      file = torch.load(path, weights_only=True)
  else:
    file = np.load(path, allow_pickle=False)
  np.testing.assert_array_equal(file['mu'], statistics.mean)
  np.testing.assert_allclose(file['sigma'], np.cov(_features(), rowvar=False), rtol=1e-9)
  again = load_statistics(path)
  assert isinstance(again, FittedGaussian)
  np.testing.assert_array_equal(again.covariance, statistics.covariance)
  if spatial:
    np.testing.assert_array_equal(file['mu_s'], spatial.mean)
    np.testing.assert_array_equal(file['sigma_s'], spatial.covariance)
    np.testing.assert_array_equal(load_statistics(path, spatial=True).mean, spatial.mean)
    np.testing.assert_array_equal(file['arr_0'], images)
    found = list(batch_images(path, 2))
    assert [len(batch) for batch in found] == [2, 2, 1]
    np.testing.assert_array_equal(np.concatenate(found), images)


def test_writing_refuses_what_a_format_cannot_hold(tmp_path):
  path, statistics = tmp_path / 'x.npz', _statistics()
  for options in ({'format': 'adm'}, {'spatial': statistics},
                  {'format': 'clean-fid', 'images': np.zeros((1, 4, 4, 3), np.uint8)}):
    with pytest.raises(UserError, match='spatial features belong to adm'):
      save_statistics(path, statistics, **options)
  with pytest.raises(UserError, match='choose of ours, clean-fid, adm'):
    save_statistics(path, statistics, format='fid')
  assert len(FORMATS) == 4 and not list(tmp_path.iterdir())


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
OURS = _npz(n=3, mean=MU, m2=SIGMA)
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
  'count': _npz(n=-1, mean=MU, m2=SIGMA),
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
  with pytest.raises(UserError, match=r'no images at .*reference'):
    next(batch_images(path, 2))
  save_statistics(path, _statistics(), format='clean-fid')
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


def test_damaged_batches_of_images_are_named(tmp_path):
  images = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)
  path = tmp_path / 'batch.npz'
  whole = _npz(arr_0=images)
  compressed = _bytes(lambda file: np.savez_compressed(file, arr_0=images))
  for data in (
    whole[:-100], whole[:300], _flipped(whole, 600), _flipped(compressed, 600), b'',
    _npz(mu=MU, sigma=SIGMA), _npz(arr_0=images.astype(np.float32)), _npz(arr_0=images[..., 0]),
  ):
    path.write_bytes(data)
    with pytest.raises(UserError, match=r'batch\.npz'):
      list(batch_images(path, 4))
  path.write_bytes(compressed)
  np.testing.assert_array_equal(np.concatenate(list(batch_images(path, 4))), images)
  with zipfile.ZipFile(path) as archive:
    assert archive.namelist() == ['arr_0.npy']
