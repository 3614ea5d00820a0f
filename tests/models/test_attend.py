"""Attention in pieces against its formula, forwards and backwards, on one device and on eight."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.models import kernels
from diffusion_jax.models.attention import attend
from diffusion_jax.parallel.mesh import MeshConfig, make_mesh
from tests.models.exact_attention import assert_near, draw, exact, found


@pytest.mark.parametrize(('logits', 'rows', 'pieces'), [
  (2**20, 256, (1, 1)),  # All in one.
  (2**20, 4, (1, 3)),  # Rows by fours: the last piece is filled up.
  (44, 4, (6, 3)),  # One head at a time.
  (20, 256, (6, 10)),  # Less than two rows of one head.
])
def test_pieces_make_the_whole(logits, rows, pieces, monkeypatch):
  monkeypatch.setattr(kernels, 'LOGITS', logits)
  monkeypatch.setattr(kernels, 'ROWS', rows)
  jax.clear_caches()  # What was traced with other sizes.
  args = draw(2, 10, 3, 4, keys=11)
  heads, parts = pieces
  taken, count = kernels._rows(10, 11)
  assert (6 // kernels._heads(6, taken * 11), count) == (heads, parts)
  assert_near(found(*args, attend), exact(*args))


@pytest.mark.parametrize('mesh', [
  MeshConfig(data=2, fsdp=2, spatial=2), MeshConfig(data=2, fsdp=2, tensor=2),
  MeshConfig(tensor=8),  # Three heads, which eight do not divide.
])
def test_on_eight_devices_it_is_the_same(mesh, monkeypatch):
  monkeypatch.setattr(kernels, 'LOGITS', 64)
  jax.clear_caches()
  args = draw(4, 8, 3 if mesh.tensor == 8 else 2, 4, keys=16)
  with jax.set_mesh(make_mesh(mesh)):
    assert_near(found(*args, attend), exact(*args))


def test_logits_and_softmax_are_float32_in_bfloat16_too():
  noise = jax.random.normal(jax.random.key(0), (3, 1, 6, 1, 8))
  # Large logits that differ little, so that it matters that bfloat16 has steps of 2 beyond 256.
  q, k, v = (y.astype(jnp.bfloat16) for y in (12 + noise[0], 12 + noise[1] / 20, noise[2]))
  exact = lambda y: np.asarray(y, np.float64)[0, :, 0]
  logits = exact(q) @ exact(k).T / np.sqrt(8)
  assert np.abs(logits).min() > 256
  weights = np.exp(logits - logits.max(-1, keepdims=True))
  wanted = weights / weights.sum(-1, keepdims=True) @ exact(v)
  y = attend(q, k, v)
  assert y.dtype == jnp.bfloat16
  np.testing.assert_allclose(exact(y), wanted, atol=0.03)


def test_float16_has_gradients():
  q, k, v, _ = (jnp.asarray(x, jnp.float16) for x in draw(1, 4, 1, 4, keys=4))
  grad = jax.grad(lambda q: attend(q, k, v).astype(jnp.float32).sum())(q)
  assert grad.dtype == jnp.float16 and jnp.isfinite(grad).all() and jnp.abs(grad).max() > 0


def test_the_backward_pass_keeps_no_logits():
  q = jax.ShapeDtypeStruct((1, 1024, 8, 8), jnp.float32)
  loss = lambda q, k, v: attend(q, k, v).sum()
  compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(q, q, q).compile()
  logits = 8 * 1024 * 1024 * 4
  assert compiled.memory_analysis().temp_size_in_bytes < logits
