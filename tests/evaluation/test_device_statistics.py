"""Sums on 2, 4 and 8 devices against the single pass in float64 on the host."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.errors import UserError
from diffusion_jax.evaluation import device_statistics
from diffusion_jax.evaluation.metrics.frechet import frechet_distance
from diffusion_jax.evaluation.statistics import Statistics, merge_all
from diffusion_jax.parallel.mesh import MeshConfig, make_mesh

ROWS, WIDTH, BATCH = 1000, 24, 64


def _mesh(devices, **sizes):
  return make_mesh(MeshConfig(**sizes), jax.devices()[:devices])


def _features(rows=ROWS, width=WIDTH, seed=0, shift=0.0):
  rng = np.random.default_rng(seed)
  mixed = rng.normal(size=(rows, width)) @ rng.normal(size=(width, width)) / width**0.5
  return (mixed + shift).astype(np.float32)


@functools.cache
def _step(mesh):
  return jax.jit(functools.partial(device_statistics.update, mesh=mesh), donate_argnums=0)


def _on_devices(features, mesh, batch=BATCH, start=None):
  """Sums in batches of one size; padding is filled with what must never count."""
  step = _step(mesh)
  state = device_statistics.empty(features.shape[1], mesh) if start is None else start
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
  features = _features()
  features += np.linspace(-30, 30, ROWS, dtype=np.float32)[:, None] if shift == 'drift' else shift
  mesh = _mesh(devices)
  state = _on_devices(features, mesh)
  assert state.m2.sharding.shard_shape(state.m2.shape) == (WIDTH, WIDTH)
  found = device_statistics.collect(state, mesh=mesh)
  assert _error(found, features) < 3e-7
  np.testing.assert_array_equal(found.m2, found.m2.T)


def test_raw_moments_fail_where_the_mean_is_large():
  features = _features(shift=1e3)
  raw = np.asarray(jnp.matmul(features.T, features, precision='highest'), np.float64)
  mean = np.asarray(features.sum(axis=0, dtype=np.float32) / ROWS, np.float64)
  covariance = (raw - ROWS * np.outer(mean, mean)) / (ROWS - 1)
  assert np.linalg.eigvalsh(covariance).min() < -0.1
  found = device_statistics.collect(_on_devices(features, _mesh(8)), mesh=_mesh(8))
  assert np.linalg.eigvalsh(found.covariance).min() > 0
  assert frechet_distance(found, Statistics.from_features(features)) < 1e-5


def _parts(features, devices):
  """Statistics of what each device saw, as if each were a process of its own."""
  mesh = _mesh(1)
  return [
    device_statistics.collect(_on_devices(part, mesh), mesh=mesh)
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
  features = _features(shift=50.0)
  parts = _parts(features, devices)
  orders = list(itertools.permutations(range(devices)))
  if devices == 8:
    orders = [orders[i] for i in np.random.default_rng(0).choice(len(orders), 300)]
  merged = [merge_all(parts[i] for i in order) for order in orders] + list(_trees(parts))
  # 5 ways to put brackets around 4 parts, 429 around 8.
  assert len(merged) == {2: 2 + 1, 4: 24 + 5, 8: 300 + 429}[devices]
  assert max(_error(each, features) for each in merged) < 3e-7


def test_the_width_of_inception_in_float32():
  features = np.abs(_features(rows=768, width=2048, shift=0.4))
  mesh = _mesh(2)
  found = device_statistics.collect(_on_devices(features, mesh, batch=128), mesh=mesh)
  assert _error(found, features) < 3e-7


def test_meshes_with_other_axes_count_each_row_once():
  features = _features(rows=101)
  mesh = _mesh(8, data=2, fsdp=2, tensor=2)
  state = _on_devices(features, mesh, batch=16)
  assert state.n.shape == (4,)
  assert _error(device_statistics.collect(state, mesh=mesh), features) < 3e-7


def test_few_rows_and_batches_of_padding_alone():
  mesh = _mesh(8)
  for rows in (0, 1, 5):
    features = _features(rows=rows, shift=7.0)
    step = _step(mesh)
    nothing = np.full((8, WIDTH), np.inf, np.float32), np.zeros(8, bool)
    state = step(device_statistics.empty(WIDTH, mesh), *nothing)
    state = step(_on_devices(features, mesh, batch=8, start=state), *nothing)
    found = device_statistics.collect(state, mesh=mesh)
    wanted = Statistics.from_features(features)
    assert found.n == rows
    np.testing.assert_allclose(found.mean, wanted.mean, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(found.m2, wanted.m2, rtol=1e-5, atol=1e-5)


def test_a_feature_that_is_not_finite_is_noticed():
  features = _features(rows=32)
  features[17, 3] = np.inf
  with pytest.raises(UserError, match='NaN or infinite'):
    device_statistics.collect(_on_devices(features, _mesh(4)), mesh=_mesh(4))


def test_sums_of_half_precision_features_are_float32():
  features = _features(rows=320).astype(jnp.bfloat16)
  mesh = _mesh(4)
  state = _step(mesh)(
    device_statistics.empty(WIDTH, mesh), jnp.asarray(features), np.ones(320, bool)
  )
  found = device_statistics.collect(state, mesh=mesh)
  assert _error(found, np.asarray(features, np.float32)) < 3e-7
