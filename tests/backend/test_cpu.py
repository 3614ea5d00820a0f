"""Sums as products: their values, and what XLA for CPUs makes of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from diffusion_jax.backend import cpu

RNG = np.random.default_rng(0)
X = RNG.normal(3.0, 1.0, (2, 50, 24)).astype(np.float32)

KINDS = {
  'leading': (cpu.over_leading, lambda x: x.sum((0, 1))),
  'positions': (cpu.over_positions, lambda x: x.sum(1)),
  'features': (cpu.along_features, lambda x: x.sum(-1, keepdims=True)),
  'groups': (
    lambda x: cpu.over_groups(x[0], 6),
    lambda x: np.repeat(x[0].reshape(50, 6, 4).mean(-1), 4, axis=-1),
  ),
}


@pytest.mark.parametrize('platform', ['cpu', 'tpu'])
@pytest.mark.parametrize('kind', KINDS)
def test_sums(kind, platform, monkeypatch):
  monkeypatch.setattr(cpu, 'on_cpu', lambda: platform == 'cpu')
  ours, wanted = KINDS[kind]
  np.testing.assert_allclose(ours(jnp.asarray(X)), wanted(np.float64(X)), rtol=2e-6)


@pytest.mark.parametrize('platform', ['cpu', 'tpu'])
def test_squares_and_weighted_features(platform, monkeypatch):
  monkeypatch.setattr(cpu, 'on_cpu', lambda: platform == 'cpu')
  arrays = [X, X[0, 0], X[0, 0, 0], X[:, :, :5], X[:0]]  # Wide, vector, scalar, narrow, empty.
  wanted = sum(np.square(np.float64(x)).sum() for x in arrays)
  np.testing.assert_allclose(cpu.sum_of_squares(map(jnp.asarray, arrays)), wanted, rtol=2e-6)
  assert cpu.sum_of_squares([]) == 0.0
  weight = np.linspace(-1, 1, 24, dtype=np.float32)
  wanted = (np.float64(X) * weight).sum(-1, keepdims=True)
  np.testing.assert_allclose(cpu.along_features(jnp.asarray(X), weight), wanted, atol=2e-5)


def test_the_gradient_of_a_bias_is_summed_in_float32():
  x, bias = jnp.zeros((64, 64, 3), jnp.bfloat16), jnp.zeros(3)
  y, back = jax.vjp(cpu.add_bias, x, bias + 2)
  assert y.dtype == jnp.bfloat16 and (y == 2).all()
  dx, db = back(jnp.ones_like(y))
  # A sum in bfloat16 of ones would have stopped at 256.
  assert (dx == 1).all() and dx.dtype == jnp.bfloat16 and (db == 4096).all()


@pytest.mark.parametrize('axes', [('data', None), (None, 'tensor'), ('data', 'tensor')])
def test_squares_of_what_is_split_over_devices_are_right_and_not_gathered(axes):
  mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ('data', 'tensor'))
  x = jax.device_put(X[0, :48, :16], NamedSharding(mesh, PartitionSpec(*axes)))
  with jax.set_mesh(mesh):
    run = jax.jit(lambda x: cpu.sum_of_squares([x, x[0, :1]])).lower(x).compile()
  np.testing.assert_allclose(run(x), np.square(np.float64(x)).sum() + x[0, 0] ** 2, rtol=2e-6)
  assert 'all-gather' not in run.as_text()
