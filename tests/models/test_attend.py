"""Attention in pieces against its formula, forwards and backwards, on one device and on eight."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.models import attend_chunked
from diffusion_jax.models.attend import attend
from diffusion_jax.parallel.mesh import MeshConfig, make_mesh


def draw(b, n, h, d, keys):
  """(q, k, v, weights of a loss); logits reach beyond 30."""
  shapes = (b, n, h, d), (b, keys, h, d), (b, keys, h, d), (b, n, h, d)
  rng = np.random.default_rng(0)
  return [scale * rng.normal(size=shape).astype(np.float32)
          for shape, scale in zip(shapes, (3, 3, 1, 1), strict=True)]


def exact(q, k, v, w):
  """The loss (attention * w).sum() and its gradients for q, k and v, by hand in float64."""
  q, k, v, w = (np.asarray(x, np.float64) for x in (q, k, v, w))
  logits = np.einsum('bnhd,blhd->bhnl', q, k) / np.sqrt(q.shape[-1])
  p = np.exp(logits - logits.max(-1, keepdims=True))
  p /= p.sum(-1, keepdims=True)
  dp = np.einsum('bnhd,blhd->bhnl', w, v)
  ds = p * (dp - (p * dp).sum(-1, keepdims=True)) / np.sqrt(q.shape[-1])
  return (
    np.einsum('bhnl,blhd,bnhd->', p, v, w), np.einsum('bhnl,blhd->bnhd', ds, k),
    np.einsum('bhnl,bnhd->blhd', ds, q), np.einsum('bhnl,bnhd->blhd', p, w),
  )


def found(q, k, v, w):
  """The same by `attend`."""
  loss = lambda q, k, v: (attend(q, k, v) * w).sum()
  value, grads = jax.jit(jax.value_and_grad(loss, (0, 1, 2)))(q, k, v)
  return value, *grads


def assert_near(found, wanted):
  for a, b in zip(found, wanted, strict=True):
    np.testing.assert_allclose(a, b, atol=2e-5 * np.abs(b).max(), rtol=0)


@pytest.mark.parametrize(('logits', 'rows', 'pieces'), [
  (2**20, 256, (1, 1)),  # All in one.
  (2**20, 4, (1, 3)),  # Rows by fours: the last piece is filled up.
  (44, 4, (6, 3)),  # One head at a time.
  (20, 256, (6, 10)),  # Less than two rows of one head.
])
def test_pieces_make_the_whole(logits, rows, pieces, monkeypatch):
  monkeypatch.setattr(attend_chunked, 'LOGITS', logits)
  monkeypatch.setattr(attend_chunked, 'ROWS', rows)
  jax.clear_caches()  # What was traced with other sizes.
  args = draw(2, 10, 3, 4, keys=11)
  heads, parts = pieces
  taken, count = attend_chunked._rows(10, 11)
  assert (6 // attend_chunked._heads(6, taken * 11), count) == (heads, parts)
  assert_near(found(*args), exact(*args))


@pytest.mark.parametrize('mesh', [
  MeshConfig(data=2, fsdp=2, spatial=2), MeshConfig(data=2, fsdp=2, tensor=2),
  MeshConfig(tensor=8),  # Three heads, which eight do not divide.
])
def test_on_eight_devices_it_is_the_same(mesh, monkeypatch):
  monkeypatch.setattr(attend_chunked, 'LOGITS', 64)
  jax.clear_caches()
  args = draw(4, 8, 3 if mesh.tensor == 8 else 2, 4, keys=16)
  loss = lambda q, k, v: (attend(q, k, v) * args[3]).sum()
  with jax.set_mesh(make_mesh(mesh)):
    value, grads = jax.jit(jax.value_and_grad(loss, (0, 1, 2)))(*args[:3])
  assert_near((value, *grads), exact(*args))


def test_logits_and_softmax_are_float32_in_bfloat16_too():
  noise = jax.random.normal(jax.random.key(0), (3, 1, 6, 1, 8))
  # Large logits that differ little, so that it matters that bfloat16 has steps of 2 beyond 256.
  q, k, v = (y.astype(jnp.bfloat16) for y in (12 + noise[0], 12 + noise[1] / 20, noise[2]))
  exact = lambda y: np.asarray(y, np.float64)[0, :, 0]
  logits = exact(q) @ exact(k).T / np.sqrt(8)
  assert np.abs(logits).min() > 256
  weights = np.exp(logits - logits.max(-1, keepdims=True))
  wanted = weights / weights.sum(-1, keepdims=True) @ exact(v)
  found = attend(q, k, v)
  assert found.dtype == jnp.bfloat16
  np.testing.assert_allclose(exact(found), wanted, atol=0.03)


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
