"""The contrastive loss and the temperature."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from diffusion_jax.parallel.layout import BATCH
from diffusion_jax.parallel.mesh import MeshConfig, make_mesh
from diffusion_jax.train.tasks.clip import CLIPTask, CLIPTaskConfig, contrastive_loss
from tests import tiny


def _embeddings():
  rng = np.random.default_rng(0)
  return (jnp.asarray(rng.normal(size=(16, 5)), jnp.float32) for _ in range(2))


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


def test_loss_and_gradients_are_those_of_the_global_batch_on_eight_devices():
  a, b = _embeddings()
  function = jax.jit(jax.value_and_grad(
    lambda a, b, s: contrastive_loss(a, b, s)[0].mean(), argnums=(0, 1, 2)
  ))
  scale = jnp.float32(2.0)
  one = function(a, b, scale)
  sharding = NamedSharding(make_mesh(MeshConfig()), BATCH)
  split = [jax.device_put(x, sharding) for x in (a, b)]
  assert len({shard.device for shard in split[0].addressable_shards}) == 8
  many = function(*split, scale)
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-7), many, one)


@pytest.mark.parametrize(('given', 'wanted'), [
  (-0.5, 0.0), (2.0, 2.0), (9.0, math.log(100)),
])
def test_the_temperature_is_clamped(given, wanted):
  task = CLIPTask(CLIPTaskConfig(tiny.CLIP), None, None)
  other = jnp.full((2, 2), 50.0)
  params = task.constrain({'logit_scale': jnp.float32(given), 'other.kernel': other}, {})
  assert float(params['logit_scale']) == pytest.approx(wanted)
  np.testing.assert_array_equal(params['other.kernel'], other)


def test_gradient_reaches_every_parameter():
  task = CLIPTask(CLIPTaskConfig(tiny.CLIP), None, None)
  params = jax.jit(task.initialize)(jax.random.key(0))
  rng = np.random.default_rng(0)
  tokens = rng.integers(2, 300, (4, tiny.LENGTH), np.int32)
  tokens[:, -1] = 1  # Pooled at the end, so that every position counts.
  batch = {
    'image': rng.uniform(-1, 1, (4, tiny.SIZE, tiny.SIZE, 3)).astype(np.float32), 'tokens': tokens
  }
  gradients = jax.jit(jax.grad(task.loss, has_aux=True))(params, {}, {}, batch, None, 0)[0]
  dead = [n for n, g in gradients.items() if not np.abs(g).max() > 1e-9]
  # A bias of all keys shifts each row of attention logits, which softmax forgets.
  assert all(name.endswith('k_proj.bias') for name in dead), dead
