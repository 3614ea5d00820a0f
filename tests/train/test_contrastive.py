"""The losses of all pairs: known values, and the plain matrix on one device and on eight."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from diffusion_jax.parallel.layout import BATCH
from diffusion_jax.parallel.mesh import MeshConfig, make_mesh
from diffusion_jax.train.contrastive import contrastive_loss, pair_sums, sigmoid_loss

SIZE, WIDTH = 24, 5
LOSSES = {
  'softmax': lambda a, b, scale, bias, chunk: contrastive_loss(a, b, scale, 0.2, chunk),
  'sigmoid': sigmoid_loss,
}


def _embeddings():
  rng = np.random.default_rng(0)
  return (jnp.asarray(rng.normal(size=(SIZE, WIDTH)), jnp.float32) for _ in range(2))


def _plain(kind, a, b, scale, bias):
  """(mean loss, accuracy) by the whole matrix."""
  unit = lambda x: x / jnp.linalg.norm(x, axis=-1, keepdims=True)
  cosines = unit(a) @ unit(b).T
  if kind == 'sigmoid':
    logits = jnp.exp(scale) * cosines + bias
    signs = 2 * jnp.eye(len(a)) - 1
    return -jax.nn.log_sigmoid(signs * logits).sum() / len(a), (
      (logits.argmax(axis=-1) == jnp.arange(len(a))).mean()
    )
  logits = jnp.exp(scale) * cosines
  targets = 0.8 * jnp.eye(len(a)) + 0.2 / len(a)
  cross_entropy = lambda x: -(targets * jax.nn.log_softmax(x)).sum(axis=-1).mean()
  accuracy = (logits.argmax(axis=-1) == jnp.arange(len(a))).mean()
  return (cross_entropy(logits) + cross_entropy(logits.T)) / 2, accuracy


def _gradients(function):
  return jax.value_and_grad(function, argnums=(0, 1, 2, 3), has_aux=True)


def _check(found, wanted):
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-4, atol=3e-7), found, wanted)


def _in_chunks(kind, chunk):
  def function(a, b, scale, bias):
    loss, accuracy = LOSSES[kind](a, b, scale, bias, chunk)
    assert loss.shape == (len(a),)
    return loss.mean(), accuracy

  return _gradients(function)


@pytest.mark.parametrize('kind', LOSSES)
def test_chunks_and_rings_give_the_loss_and_the_gradients_of_the_plain_matrix(kind):
  """In chunks that divide the batch and that do not, on one device and on rings of eight, of four
  beside a tensor axis, and of 2 x 2."""
  inputs = (*_embeddings(), jnp.float32(1.3), jnp.float32(-2.0))
  wanted = jax.jit(_gradients(lambda *x: _plain(kind, *x)))(*inputs)
  for chunk in (1024, 8, 7):
    _check(jax.jit(_in_chunks(kind, chunk))(*inputs), wanted)
  for axes, chunk in (({}, 1024), ({'tensor': 2}, 2), ({'fsdp': 2, 'spatial': 2}, 5)):
    mesh = make_mesh(MeshConfig(**axes))
    split = [jax.device_put(x, NamedSharding(mesh, BATCH)) for x in inputs[:2]]
    with jax.set_mesh(mesh):
      found = jax.jit(_in_chunks(kind, chunk))(*split, *inputs[2:])
    _check(found, wanted)
    own = mesh.shape['data'] * mesh.shape['fsdp']
    assert found[1][0].addressable_shards[0].data.shape == (SIZE // own, WIDTH)


def _largest(jaxpr):
  """Elements of the largest array that a program makes, with those within it."""
  found = [v.aval.size for step in jaxpr.eqns for v in step.outvars]
  for step in jaxpr.eqns:
    for part in jax.tree.leaves(step.params, is_leaf=lambda x: hasattr(x, 'eqns')):
      part = getattr(part, 'jaxpr', part)
      found += [_largest(part)] if hasattr(part, 'eqns') else []
  return max(found, default=0)


@pytest.mark.parametrize('kind', LOSSES)
def test_no_matrix_of_all_pairs_is_anywhere(kind):
  """The largest array of loss and gradients is a chunk of one device's logits, or the features."""
  b = 4096
  inputs = jnp.zeros((b, 4)), jnp.zeros((b, 4)), jnp.float32(1), jnp.float32(0)
  alone = jax.make_jaxpr(_in_chunks(kind, 64))(*inputs)
  assert _largest(alone.jaxpr) == 64 * b
  with jax.set_mesh(make_mesh(MeshConfig())):
    on_eight = jax.make_jaxpr(_in_chunks(kind, 64))(*inputs)
  assert _largest(on_eight.jaxpr) == 64 * b // 8


def test_the_first_of_equal_texts_is_the_nearest():
  """As argmax: also across chunks, whichever comes first on the ring."""
  texts = jnp.ones((16, 3))
  nearest = lambda chunk: pair_sums('softmax', chunk, texts, texts, jnp.ones(()), jnp.zeros(()))[2]
  one = nearest(4)
  with jax.set_mesh(make_mesh(MeshConfig())):
    many = jax.jit(lambda: nearest(1))()
  np.testing.assert_array_equal(one, np.zeros(16))
  np.testing.assert_array_equal(many, np.zeros(16))


def test_siglip_is_the_papers_formula():
  """By numpy in float64, with the paper's initial temperature and bias."""
  a, b = _embeddings()
  scale, bias = math.log(10), -10.0
  loss, _ = sigmoid_loss(a, b, jnp.float32(scale), jnp.float32(bias))
  x, y = (np.asarray(e, np.float64) / np.linalg.norm(e, axis=1)[:, None] for e in (a, b))
  total = 0.0
  for i in range(SIZE):
    for j in range(SIZE):
      z = (1 if i == j else -1) * (math.exp(scale) * x[i] @ y[j] + bias)
      total += math.log1p(math.exp(-z))
  assert float(loss.mean()) == pytest.approx(total / SIZE, rel=1e-5)


def test_orthogonal_pairs_have_the_known_loss():
  """-ln(e^s / (e^s + b - 1)) with a scale of s, whatever the embeddings' lengths."""
  eye = jnp.eye(4)
  loss, accuracy = contrastive_loss(3 * eye, 0.5 * eye, jnp.log(2.0))
  np.testing.assert_allclose(loss, [-math.log(math.e**2 / (math.e**2 + 3))] * 4, rtol=1e-6)
  assert accuracy == 1


def test_wrong_pairs_have_the_known_loss():
  loss, accuracy = contrastive_loss(jnp.eye(2), jnp.eye(2)[::-1], jnp.log(2.0))
  np.testing.assert_allclose(loss, [math.log(1 + math.e**2)] * 2, rtol=1e-6)
  assert accuracy == 0


def test_label_smoothing_has_the_known_loss():
  loss, _ = contrastive_loss(jnp.eye(2), jnp.eye(2), jnp.log(2.0), label_smoothing=0.2)
  right, wrong = math.log(1 + math.e**-2), math.log(1 + math.e**2)
  np.testing.assert_allclose(loss, [0.9 * right + 0.1 * wrong] * 2, rtol=1e-6)


def test_images_and_texts_may_change_places():
  a, b = _embeddings()
  one, other = contrastive_loss(a, b, 1.0)[0], contrastive_loss(b, a, 1.0)[0]
  np.testing.assert_allclose(one, other, rtol=1e-6)
  assert not np.allclose(one, contrastive_loss(a, b[::-1], 1.0)[0])
