"""FLOPs by formula: products counted by hand, and XLA's own count."""

import jax
import jax.numpy as jnp
import pytest

from diffusion_jax.models.attention import attend
from diffusion_jax.models.dit import DiT, DiTConfig
from diffusion_jax.models.network import Network
from diffusion_jax.models.unet import UNet, UNetConfig
from diffusion_jax.planning.flops import count_flops
from diffusion_jax.types import Condition

CROSS = 'CrossAttnDownBlock2D'
SMALL_UNET = UNetConfig(
  sample_size=16, block_out_channels=(64,), layers_per_block=1, cross_attention_dim=64,
  attention_head_dim=4, down_block_types=(CROSS,), up_block_types=('CrossAttnUpBlock2D',),
)
SMALL_DIT = DiTConfig(num_attention_heads=4, attention_head_dim=32, in_channels=4, out_channels=4,
                      num_layers=3, sample_size=16, num_embeds_ada_norm=3)


def shape(*sizes):
  return jax.ShapeDtypeStruct(sizes, jnp.float32)


def test_products_and_what_their_gradients_take():
  """x W1 W2 with x given: of the first product no gradient for x is needed."""
  function = lambda weights, x: (x @ weights[0]) @ weights[1]
  found = count_flops(function, (shape(5, 7), shape(7, 11)), shape(3, 5), trained=0)
  first, second = 2 * 3 * 5 * 7, 2 * 3 * 7 * 11
  assert (found.forward, found.backward) == (first + second, first + 2 * second)
  assert count_flops(function, (shape(5, 7), shape(7, 11)), shape(3, 5)).backward == 0


def test_what_is_frozen_is_forward_only():
  frozen = lambda trained, frozen, x: (x @ frozen) @ trained
  found = count_flops(frozen, shape(7, 11), shape(5, 7), shape(3, 5), trained=0)
  assert found.backward == 2 * 3 * 7 * 11
  stopped = lambda trained, frozen, x: jax.lax.stop_gradient(x @ trained) @ frozen
  assert count_flops(stopped, shape(5, 7), shape(7, 11), shape(3, 5), trained=0).backward == 0
  through = lambda trained, frozen, x: (x @ trained) @ frozen  # As below an adapter.
  found = count_flops(through, shape(5, 7), shape(7, 11), shape(3, 5), trained=0)
  assert found.backward == 2 * 3 * 5 * 7 + 2 * 3 * 7 * 11


def test_convolutions():
  """[2 8 8 3] to 5 channels by 3 x 3, with stride 2, in groups, and transposed."""
  conv = lambda x, k, **kw: jax.lax.conv_general_dilated(
    x, k, kw.pop('strides', (1, 1)), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC'), **kw
  )
  x, k = shape(2, 8, 8, 6), shape(3, 3, 6, 10)
  assert count_flops(conv, x, k).total == 2 * 2 * 64 * 10 * 9 * 6
  strided = lambda x, k: conv(x, k, strides=(2, 2))
  assert count_flops(strided, x, k).total == 2 * 2 * 16 * 10 * 9 * 6
  grouped = lambda x, k: conv(x, k, feature_group_count=2)
  assert count_flops(grouped, x, shape(3, 3, 3, 10)).total == 2 * 2 * 64 * 10 * 9 * 3
  transposed = lambda x, k: jax.lax.conv_transpose(x, k, (2, 2), 'SAME')
  assert count_flops(transposed, x, k).total == 2 * 2 * 64 * 10 * 9 * 6


def test_loops_branches_and_dead_ends():
  product = 2 * 4**3
  body = lambda carry, w: (carry @ w, None)
  loop = lambda x, ws: jax.lax.scan(body, x, ws)[0]
  found = count_flops(loop, shape(4, 4), shape(6, 4, 4), trained=1)
  # The first of six knows its carry; what the compiler sees is one body for all.
  assert (found.forward, found.backward) == (6 * product, 2 * 6 * product)
  branch = lambda x, flag: jax.lax.cond(flag > 0, lambda: x @ x @ x, lambda: x @ x)
  assert count_flops(branch, shape(4, 4), shape()).forward == 2 * product
  dead = lambda x: (x @ x, (x @ x @ x).sum())[0]
  assert count_flops(dead, shape(4, 4)).forward == product
  endless = lambda x: jax.lax.while_loop(lambda c: c.sum() < 9, lambda c: c @ c, x)
  assert count_flops(endless, shape(4, 4)).unseen == {'while'}


def test_nothing_is_counted_twice_for_memory():
  network = Network.of(DiT, SMALL_DIT)
  plain = of_network(network, *dit_inputs(2))
  again = of_network(network.with_compute(remat='block'), *dit_inputs(2))
  assert plain == again and plain.total > 0


def test_attention_in_chunks_counts_as_attention():
  """On CPUs so many logits have their queries taken a few at a time."""
  q, k = shape(2, 1024, 4, 32), shape(2, 1024, 4, 32)
  text = str(jax.make_jaxpr(attend)(q, k, k))
  found = count_flops(lambda qkv: attend(*qkv), (q, k, k), trained=0)
  assert 'scan[' in text
  assert found.forward == 2 * 2 * 2 * 4 * 1024**2 * 32 and found.backward == 2 * found.forward


def dit_inputs(b):
  return shape(b, 16, 16, 4), shape(b), Condition(labels=jax.ShapeDtypeStruct((b,), jnp.int32))


def unet_inputs(edge, width, b=2):
  return shape(b, edge, edge, 4), shape(b), Condition(shape(b, 5, width))


def of_network(network, *inputs):
  loss = lambda params, *inputs: jnp.square(network.bind(params)(*inputs)).mean()
  return count_flops(loss, network.shapes, *inputs, trained=0)


@pytest.mark.parametrize(('module', 'config', 'inputs', 'again', 'within'), [
  # XLA leaves out what lies in the padding, and counts elementwise work.
  (UNet, SMALL_UNET, unet_inputs(16, 64), 0, 0.06),
  # And logits that are computed again: of 3 layers, 2 images of 64 positions, width 128.
  (DiT, SMALL_DIT, dit_inputs(2), 3 * 2 * 2 * 64**2 * 128, 0.03),
])
def test_networks_as_xla_counts_them(module, config, inputs, again, within):
  network = Network.of(module, config)
  loss = lambda params, *inputs: jnp.square(network.bind(params)(*inputs)).mean()
  found = of_network(network, *inputs)
  forward = jax.jit(loss).lower(network.shapes, *inputs).cost_analysis()['flops']
  whole = jax.jit(jax.grad(loss)).lower(network.shapes, *inputs).cost_analysis()['flops']
  assert found.forward == pytest.approx(forward, rel=within)
  assert found.total == pytest.approx(whole - again, rel=within)
  assert found.total == pytest.approx(3 * found.forward, rel=0.05) and not found.unseen
