"""Sums as products: their values, and what XLA for CPUs makes of them."""

import re

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


@pytest.mark.parametrize(('stride', 'padding'), [(1, ((1, 1), (0, 2))), (2, ((0, 1), (1, 1)))])
def test_a_convolution_and_its_derivatives_of_both_orders_and_modes(stride, padding, monkeypatch):
  x, kernel = jnp.asarray(X.reshape(2, 10, 10, 12)), jnp.asarray(RNG.normal(0, 0.1, (3, 3, 12, 5)))
  kernel = kernel.astype(jnp.float32)
  one = lambda x, kernel: jnp.sin(cpu.convolve(x, kernel, stride, padding)).sum()
  both = jax.grad(one, (0, 1))
  forward = lambda x, kernel: jax.jvp(both, (x, kernel), (x**2, kernel * 3))[1]
  backward = jax.grad(lambda x, kernel: sum((g**2).sum() for g in both(x, kernel)), (0, 1))
  run = jax.jit(lambda *at: (one(*at), both(*at), forward(*at), backward(*at)))
  found = run(x, kernel)
  monkeypatch.setattr(cpu, 'on_cpu', lambda: False)
  wanted = jax.jit(lambda *at: (one(*at), both(*at), forward(*at), backward(*at)))(x, kernel)
  for ours, plain in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
    np.testing.assert_allclose(ours, plain, rtol=1e-4, atol=1e-3 * float(jnp.abs(plain).max()))


@pytest.mark.parametrize('here', [True, False])
@pytest.mark.parametrize('by', [0, 1])
def test_gradients_of_a_convolution_are_of_a_kind_that_libraries_know_in_a_loop(
  by, here, monkeypatch
):
  """It is why `convolve` is there: XLA does not put axes in order within loops."""
  monkeypatch.setattr(cpu, 'on_cpu', lambda: here)
  convolve = lambda *at: jnp.sin(cpu.convolve(*at, 1, ((1, 1), (1, 1)))).sum()

  def step(_, at):
    gradient = jax.grad(convolve, by)(*at)
    return (at[0] - gradient, at[1]) if by == 0 else (at[0], at[1] - gradient)

  loop = jax.jit(lambda *at: jax.lax.fori_loop(0, 4, step, at))
  text = loop.lower(jnp.ones((2, 8, 8, 4)), jnp.ones((3, 3, 4, 4))).compile().as_text()
  orders = set(re.findall(r'dim_labels=(\w+->\w+)', text))
  known = {'b01f_01io->b01f'}
  assert orders == known if here else orders > known


@pytest.mark.parametrize('axes', [('data', None), (None, 'tensor'), ('data', 'tensor')])
def test_squares_of_what_is_split_over_devices_are_right_and_not_gathered(axes):
  mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ('data', 'tensor'))
  x = jax.device_put(X[0, :48, :16], NamedSharding(mesh, PartitionSpec(*axes)))
  with jax.set_mesh(mesh):
    run = jax.jit(lambda x: cpu.sum_of_squares([x, x[0, :1]])).lower(x).compile()
  np.testing.assert_allclose(run(x), np.square(np.float64(x)).sum() + x[0, 0] ** 2, rtol=2e-6)
  assert 'all-gather' not in run.as_text()
