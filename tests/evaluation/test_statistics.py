"""Statistics against numpy on all rows at once.

Sums on 2, 4 and 8 devices against the single pass in float64 on the host.

Statistics in the files of other tools: read as those wrote them, refused where damaged.
"""

import functools
import io
import itertools
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from diffusion_jax.data.image_sets import ImageBatch
from diffusion_jax.errors import UserError
from diffusion_jax.evaluation import statistics
from diffusion_jax.evaluation.metrics.gaussians import frechet_distance
from diffusion_jax.evaluation.statistics import (
  Statistics,
  described,
  load_statistics,
  merge_all,
  save_statistics,
)
from diffusion_jax.parallel.mesh import MeshConfig, make_mesh


def _features(n=101, d=7, seed=0):
  # A mean far from zero is where raw second moments lose their digits.
  rng = np.random.default_rng(seed)
  return 1e4 + rng.normal(size=(n, d)) @ rng.normal(size=(d, d))


def test_from_features_is_numpys_mean_and_unbiased_covariance():
  features = _features()
  statistics = Statistics.from_features(features)
  assert statistics.n == 101
  np.testing.assert_allclose(statistics.mean, features.mean(0), rtol=1e-14)
  np.testing.assert_allclose(statistics.covariance, np.cov(features.T), rtol=1e-9)


def test_many_rows_are_taken_in_parts():
  features = _features(n=20_000, d=3).astype(np.float32)
  statistics = Statistics.from_features(features)
  assert statistics.n == 20_000
  np.testing.assert_allclose(statistics.covariance, np.cov(features.T.astype(float)), rtol=1e-9)


@pytest.mark.parametrize('cuts', [[1], [0, 3, 4, 99], [50], [100, 101]])
def test_merging_uneven_parts_equals_all_at_once(cuts):
  features = _features()
  merged = Statistics.empty(7)
  for part in np.split(features, cuts):
    merged = merged.merge(Statistics.from_features(part))
  whole = Statistics.from_features(features)
  assert merged.n == whole.n
  np.testing.assert_allclose(merged.mean, whole.mean, rtol=1e-13)
  np.testing.assert_allclose(merged.m2, whole.m2, rtol=1e-8, atol=1e-6)


def test_merge_by_hand_in_both_orders():
  a = Statistics.from_features(np.array([[0.0]]))
  b = Statistics.from_features(np.array([[3.0], [6.0]]))
  for merged in (a.merge(b), b.merge(a)):
    assert (merged.n, merged.mean[0], merged.m2[0, 0]) == (3, 3.0, 18.0)


def test_empty_is_neutral_on_both_sides():
  whole, empty = Statistics.from_features(_features()), Statistics.empty(7)
  for merged in (whole.merge(empty), empty.merge(whole)):
    assert merged.n == 101
    np.testing.assert_array_equal(merged.mean, whole.mean)
    np.testing.assert_array_equal(merged.m2, whole.m2)
  assert empty.merge(empty).n == 0


def test_float16_features_are_summed_in_float64():
  features = np.full((5000, 1), 100.0, np.float16)
  assert Statistics.from_features(features).mean[0] == 100.0


def test_mistakes_are_refused():
  with pytest.raises(UserError, match='NaN'):
    Statistics.from_features(np.array([[1.0, np.nan]]))
  with pytest.raises(UserError, match=r'\[n d\]'):
    Statistics.from_features(np.zeros((2, 3, 4)))
  with pytest.raises(UserError, match='same feature extractor'):
    Statistics.empty(3).merge(Statistics.empty(4))
  with pytest.raises(UserError, match='at least 2'):
    _ = Statistics.from_features(np.zeros((1, 3))).covariance


ROWS, WIDTH, BATCH = 1000, 24, 64


def _mesh(devices, **sizes):
  return make_mesh(MeshConfig(**sizes), jax.devices()[:devices])


def _shifted(rows=ROWS, width=WIDTH, seed=0, shift=0.0):
  rng = np.random.default_rng(seed)
  mixed = rng.normal(size=(rows, width)) @ rng.normal(size=(width, width)) / width**0.5
  return (mixed + shift).astype(np.float32)


@functools.cache
def _step(mesh):
  return jax.jit(functools.partial(statistics.update, mesh=mesh), donate_argnums=0)


def _on_devices(features, mesh, batch=BATCH, start=None):
  """Sums in batches of one size; padding is filled with what must never count."""
  step = _step(mesh)
  state = statistics.empty(features.shape[1], mesh) if start is None else start
  for i in range(0, len(features), batch):
    rows = features[i : i + batch]
    padded = np.full((batch, features.shape[1]), np.nan, np.float32)
    padded[: len(rows)] = rows
    state = step(state, padded, np.arange(batch) < len(rows))
  return state


def _error(found, features):
  """Relative, of the sum of products, against float64."""
  wanted = Statistics.from_features(features)
  assert found.n == wanted.n
  scale = np.sqrt(np.diagonal(wanted.covariance)).max()
  np.testing.assert_allclose(found.mean, wanted.mean, rtol=2e-7, atol=3e-7 * scale)
  return np.linalg.norm(found.m2 - wanted.m2) / np.linalg.norm(wanted.m2)


@pytest.mark.parametrize('shift', [0.0, 1e3, 'drift'])
@pytest.mark.parametrize('devices', [1, 2, 4, 8])
def test_shards_equal_the_single_pass(devices, shift):
  features = _shifted()
  features += np.linspace(-30, 30, ROWS, dtype=np.float32)[:, None] if shift == 'drift' else shift
  mesh = _mesh(devices)
  state = _on_devices(features, mesh)
  assert state.m2.sharding.shard_shape(state.m2.shape) == (WIDTH, WIDTH)
  found = statistics.collect(state, mesh=mesh)
  assert _error(found, features) < 3e-7
  np.testing.assert_array_equal(found.m2, found.m2.T)


def test_raw_moments_fail_where_the_mean_is_large():
  features = _shifted(shift=1e3)
  raw = np.asarray(jnp.matmul(features.T, features, precision='highest'), np.float64)
  mean = np.asarray(features.sum(axis=0, dtype=np.float32) / ROWS, np.float64)
  covariance = (raw - ROWS * np.outer(mean, mean)) / (ROWS - 1)
  assert np.linalg.eigvalsh(covariance).min() < -0.1
  found = statistics.collect(_on_devices(features, _mesh(8)), mesh=_mesh(8))
  assert np.linalg.eigvalsh(found.covariance).min() > 0
  assert frechet_distance(found, Statistics.from_features(features)) < 1e-5


def _parts(features, devices):
  """Statistics of what each device saw, as if each were a process of its own."""
  mesh = _mesh(1)
  return [
    statistics.collect(_on_devices(part, mesh), mesh=mesh)
    for part in np.array_split(features, devices)
  ]


def _trees(parts):
  """All results of merging neighbours, in every order of the operations."""
  if len(parts) == 1:
    yield parts[0]
  for i in range(1, len(parts)):
    for a, b in itertools.product(list(_trees(parts[:i])), list(_trees(parts[i:]))):
      yield a.merge(b)


@pytest.mark.parametrize('devices', [2, 4, 8])
def test_every_order_of_merging_equals_the_single_pass(devices):
  features = _shifted(shift=50.0)
  parts = _parts(features, devices)
  orders = list(itertools.permutations(range(devices)))
  if devices == 8:
    orders = [orders[i] for i in np.random.default_rng(0).choice(len(orders), 300)]
  merged = [merge_all(parts[i] for i in order) for order in orders] + list(_trees(parts))
  # 5 ways to put brackets around 4 parts, 429 around 8.
  assert len(merged) == {2: 2 + 1, 4: 24 + 5, 8: 300 + 429}[devices]
  assert max(_error(each, features) for each in merged) < 3e-7


def test_the_width_of_inception_in_float32():
  features = np.abs(_shifted(rows=768, width=2048, shift=0.4))
  mesh = _mesh(2)
  found = statistics.collect(_on_devices(features, mesh, batch=128), mesh=mesh)
  assert _error(found, features) < 3e-7


def test_meshes_with_other_axes_count_each_row_once():
  features = _shifted(rows=101)
  mesh = _mesh(8, data=2, fsdp=2, tensor=2)
  state = _on_devices(features, mesh, batch=16)
  assert state.n.shape == (4,)
  assert _error(statistics.collect(state, mesh=mesh), features) < 3e-7


def test_few_rows_and_batches_of_padding_alone():
  mesh = _mesh(8)
  for rows in (0, 1, 5):
    features = _shifted(rows=rows, shift=7.0)
    step = _step(mesh)
    nothing = np.full((8, WIDTH), np.inf, np.float32), np.zeros(8, bool)
    state = step(statistics.empty(WIDTH, mesh), *nothing)
    state = step(_on_devices(features, mesh, batch=8, start=state), *nothing)
    found = statistics.collect(state, mesh=mesh)
    wanted = Statistics.from_features(features)
    assert found.n == rows
    np.testing.assert_allclose(found.mean, wanted.mean, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(found.m2, wanted.m2, rtol=1e-5, atol=1e-5)


def test_a_feature_that_is_not_finite_is_noticed():
  features = _shifted(rows=32)
  features[17, 3] = np.inf
  with pytest.raises(UserError, match='NaN or infinite'):
    statistics.collect(_on_devices(features, _mesh(4)), mesh=_mesh(4))


def test_sums_of_half_precision_features_are_float32():
  features = _shifted(rows=320).astype(jnp.bfloat16)
  mesh = _mesh(4)
  state = _step(mesh)(statistics.empty(WIDTH, mesh), jnp.asarray(features), np.ones(320, bool))
  found = statistics.collect(state, mesh=mesh)
  assert _error(found, np.asarray(features, np.float32)) < 3e-7


def _rows(d=7, seed=0):
  rng = np.random.default_rng(seed)
  return 5 + rng.normal(size=(101, d)) @ rng.normal(size=(d, d))


def _statistics(**kwargs):
  return Statistics.from_features(_rows(**kwargs))


@pytest.mark.parametrize('suffix', ['npz', 'pt'])
def test_our_file_knows_its_samples_and_its_features(tmp_path, suffix):
  statistics, path = _statistics(), tmp_path / 'new' / f'reference.{suffix}'
  save_statistics(path, statistics, features='inception/w/clean')
  loaded = load_statistics(path)
  assert loaded.n == 101 and described(path) == ('inception/w/clean', False)
  np.testing.assert_array_equal(loaded.mean, statistics.mean)
  np.testing.assert_allclose(loaded.m2, statistics.m2, rtol=1e-15)
  both = loaded.merge(_statistics(seed=3))
  everything = np.concatenate([_rows(), _rows(seed=3)])
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
  features = _rows().astype(dtype)
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
  np.testing.assert_allclose(file['sigma'], np.cov(_rows(), rowvar=False), rtol=1e-9)
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
