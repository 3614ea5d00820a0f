"""Attention and its gradients by hand in float64, and inputs that it is compared on."""

import jax
import numpy as np


def draw(b, n, h, d, keys):
  """(q, k, v, weights of a loss); logits reach beyond 30."""
  shapes = (b, n, h, d), (b, keys, h, d), (b, keys, h, d), (b, n, h, d)
  rng = np.random.default_rng(0)
  return [scale * rng.normal(size=shape).astype(np.float32)
          for shape, scale in zip(shapes, (3, 3, 1, 1), strict=True)]


def exact(q, k, v, w):
  """Attention, and gradients of (attention * w).sum() for q, k and v."""
  q, k, v, w = (np.asarray(x, np.float64) for x in (q, k, v, w))
  logits = np.einsum('bnhd,blhd->bhnl', q, k) / np.sqrt(q.shape[-1])
  p = np.exp(logits - logits.max(-1, keepdims=True))
  p /= p.sum(-1, keepdims=True)
  dp = np.einsum('bnhd,blhd->bhnl', w, v)
  ds = p * (dp - (p * dp).sum(-1, keepdims=True)) / np.sqrt(q.shape[-1])
  return (
    np.einsum('bhnl,blhd->bnhd', p, v), np.einsum('bhnl,blhd->bnhd', ds, k),
    np.einsum('bhnl,bnhd->blhd', ds, q), np.einsum('bhnl,bnhd->blhd', p, w),
  )


def found(q, k, v, w, attend):
  """The same by `attend`."""
  def loss(q, k, v):
    y = attend(q, k, v)
    return (y * w).sum(), y

  grads, y = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(q, k, v)
  return y, *grads


def assert_near(found, wanted):
  for a, b in zip(found, wanted, strict=True):
    np.testing.assert_allclose(a, b, atol=2e-5 * np.abs(b).max(), rtol=0)
