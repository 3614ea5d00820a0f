"""Attention in pieces, and products of float8: exact where the numbers fit, else near."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import build
from diffusion_jax.config import parse
from diffusion_jax.errors import UserError
from diffusion_jax.models import kernels
from diffusion_jax.models.attention import attend
from diffusion_jax.models.lora import LoRAConfig, targets, with_lora
from diffusion_jax.models.network import Network
from diffusion_jax.models.unet import UNet, UNetConfig
from diffusion_jax.parallel.mesh import MeshConfig, make_mesh
from diffusion_jax.train.tasks.clip import CLIPTask
from diffusion_jax.types import Condition
from tests import tiny
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


WIDE = UNetConfig(
  sample_size=4, block_out_channels=(32,), layers_per_block=1, norm_num_groups=4,
  cross_attention_dim=16, attention_head_dim=2, down_block_types=('DownBlock2D',),
  up_block_types=('UpBlock2D',),
)


def value_and_slopes(product, x, kernel, dy):
  y, back = jax.vjp(product, x, kernel)
  return y, *back(dy)


def whole(rng, largest, *shape):
  """Whole numbers up to `largest`, which occurs."""
  x = rng.integers(-largest, largest + 1, shape).astype(np.float32)
  x.flat[0] = largest
  return x


def test_numbers_that_fit_give_exact_products():
  """Scaled by powers of two, as 14 * 32 is the largest of E4M3 and 7 * 2^13 that of E5M2."""
  rng = np.random.default_rng(0)
  x, kernel, dy = whole(rng, 14, 2, 3, 32), whole(rng, 14, 32, 16), whole(rng, 7, 2, 3, 16)
  found = value_and_slopes(kernels.product, x, kernel / 1024, dy)
  np.testing.assert_array_equal(found[0], x @ kernel / 1024)
  np.testing.assert_array_equal(found[1], dy @ kernel.T / 1024)
  np.testing.assert_array_equal(found[2], np.einsum('abi,abo->io', x, dy))


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_products_are_as_near_as_the_types_allow(dtype):
  """Rounding to 3 bits errs by 2.6% on the average over all numbers, to 2 by 5.2%."""
  rng = np.random.default_rng(0)
  draw = lambda *shape, scale: (scale * rng.normal(size=shape)).astype(np.float32)
  x, kernel, dy = draw(4, 64, 256, scale=9), draw(256, 128, scale=1e-3), draw(4, 64, 128, scale=1e4)
  given = jnp.asarray(x, dtype), kernel, jnp.asarray(dy, dtype)
  found = value_and_slopes(kernels.product, *given)
  assert [y.dtype for y in found] == [dtype, dtype, jnp.float32]
  wanted = value_and_slopes(jnp.matmul, x, kernel, dy)
  errors = [np.linalg.norm(np.asarray(a - b)) / np.linalg.norm(b)
            for a, b in zip(found, wanted, strict=True)]
  assert 0.03 < errors[0] < 0.045 and all(0.05 < error < 0.065 for error in errors[1:]), errors


@pytest.mark.parametrize('wrong', [np.nan, np.inf])
def test_what_is_not_finite_stays_visible_and_nothing_gives_nothing(wrong):
  x, kernel = np.ones((1, 2, 16), np.float32), np.ones((16, 16), np.float32)
  np.testing.assert_array_equal(kernels.product(0 * x, kernel), np.zeros((1, 2, 16)))
  x[0, 0, 0] = wrong
  assert np.isnan(kernels.product(x, kernel)).all()


def products(network):
  """Types of the operands of each matrix product with weights of float8, and of all."""
  c = network.config
  inputs = jnp.ones((1, 4, 4, 4)), jnp.ones(1), Condition(jnp.ones((1, 5, c.cross_attention_dim)))
  run = lambda params: jnp.square(network.bind(params)(*inputs)).mean()
  exported = jax.export.export(jax.jit(jax.grad(run)), platforms=['cuda'])(network.shapes)
  lines = [line for line in exported.mlir_module().splitlines() if 'dot_general' in line]
  return [line for line in lines if 'f8E' in line], lines


def test_dense_layers_over_tokens_take_them_for_gpus():
  """Ten in one transformer block: seven of attention, to_k and to_v of the text among them, two of
  the feed-forward layer; forward, and two each backward save for the text, which has no gradient.
  """
  narrow, _ = products(Network.of(UNet, WIDE, matmul_precision='float8'))
  forward = [line for line in narrow if line.count('f8E4M3FN') == 2]
  backward = [line for line in narrow if 'f8E5M2' in line and 'f8E4M3FN' in line]
  assert all('xf32>' in line.rpartition('->')[2] for line in narrow)
  assert len(forward) + len(backward) == len(narrow)
  assert len(forward) == 10 and len(backward) == 18
  assert not products(Network.of(UNet, WIDE))[0]


def test_adapters_keep_them_and_the_network_is_the_same_otherwise():
  plain, network = Network.of(UNet, WIDE), Network.of(UNet, WIDE, matmul_precision='float8')
  assert network.shapes == plain.shapes
  adapted = with_lora(network, targets(network, LoRAConfig()))
  (transformer,) = adapted.bind(adapted.shapes).mid_block.attentions
  assert transformer.transformer_blocks[0].attn1.to_q.matmul_precision == 'float8'
  params = jax.jit(plain.initialize)(jax.random.key(0))
  inputs = jnp.ones((1, 4, 4, 4)), jnp.ones(1), Condition(jnp.ones((1, 5, 16)))
  wanted, found = (net.bind(params)(*inputs) for net in (plain, network))
  assert 1e-4 < np.linalg.norm(found - wanted) / np.linalg.norm(wanted) < 0.05
  with pytest.raises(UserError, match="matmul_precision is 'int8'; choose one of plain, float8"):
    Network.of(UNet, WIDE, matmul_precision='int8')


def test_they_are_of_the_loss_alone(parts, sources, tmp_path):
  values = tiny.diffusion_config(parts, {'cache': False}) | {'products': 'float8'}
  task = build.build_task(parse(values), *sources, tmp_path, None)
  said = {role: n.compute.matmul_precision for role, n in task.loss_model.networks.items()}
  assert said.pop('denoiser') == 'float8' and set(said.values()) == {'plain'}
  assert {n.compute.matmul_precision for n in task.model.networks.values()} == {'plain'}
  with pytest.raises(UserError, match='products has no effect on task clip; set plain'):
    CLIPTask.check(parse(tiny.clip_config() | {'products': 'float8'}))


@pytest.mark.parametrize(('chip', 'serves'), [
  (('gpu', (9, 0)), True), (('gpu', (8, 9)), True), (('gpu', (8, 0)), False),
  (('gpu', None), False), (('tpu', None), False), (('cpu', None), False),
])
def test_chips_without_them_are_named(monkeypatch, chip, serves):
  monkeypatch.setattr(kernels, 'chip', lambda mesh: chip)
  kernels.check_matmul_precision('plain')
  if serves:
    return kernels.check_matmul_precision('float8')
  found = '8.0' if chip[1] else chip[0]
  with pytest.raises(UserError, match=f"'float8' cannot serve here.*here is {found}; set products"):
    kernels.check_matmul_precision('float8')
