"""LoRA: what it computes, what it merges to, and where it sits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from diffusion_jax.config import typed
from diffusion_jax.errors import UserError
from diffusion_jax.models.layers import Conv, Linear
from diffusion_jax.models.lora import LoRAConfig, Rank, is_lora, merge_lora, targets, with_lora
from diffusion_jax.models.network import PLAIN, Network
from diffusion_jax.models.unet import UNet
from diffusion_jax.types import Condition
from tests import tiny

X = np.random.default_rng(1).normal(size=(2, 6, 6, 5)).astype(np.float32)
LAYERS = {
  'dense': lambda rngs: Linear(5, 7, rngs=rngs),
  'pointwise': lambda rngs: Conv(5, 7, 1, padding=0, rngs=rngs),
  'window': lambda rngs: Conv(5, 7, rngs=rngs),
  'halving': lambda rngs: Conv(5, 7, stride=2, padding=((0, 1), (0, 1)), rngs=rngs),
  'patches': lambda rngs: Conv(5, 7, 2, stride=2, padding=0, rngs=rngs),
}


class Holder(nnx.Module):
  def __init__(self, make, rngs):
    self.layer = make(rngs)

  def __call__(self, x):
    return self.layer(x)


def network_of(make):
  return Network.built(None, lambda compute: lambda rngs: Holder(make, rngs), PLAIN)


@pytest.mark.parametrize('name', LAYERS)
def test_an_adapter_starts_as_nothing_and_merges_exactly(name, random_params):
  plain = network_of(LAYERS[name])
  sizes = {'layer': Rank(3, 6.0)}
  adapted = with_lora(plain, sizes)
  fresh = adapted.initialize(jax.random.key(0))
  base = {n: v for n, v in fresh.items() if not is_lora(n)}
  assert base.keys() == plain.shapes.keys() and len(fresh) == len(base) + 2
  np.testing.assert_array_equal(adapted.bind(fresh)(X), plain.bind(base)(X))

  params = random_params(adapted.shapes)
  y = adapted.bind(params)(X)
  merged = plain.bind(merge_lora(params, sizes))(X)
  assert np.abs(y - plain.bind({n: params[n] for n in base})(X)).max() > 0.1
  np.testing.assert_allclose(y, merged, atol=2e-5)


def test_the_dense_adapter_is_the_papers_equation(random_params):
  adapted = with_lora(network_of(LAYERS['dense']), {'layer': Rank(2, 5.0)})
  p = random_params(adapted.shapes)
  wanted = X @ p['layer.kernel'] + p['layer.bias'] + 2.5 * X @ p['layer.lora.a'] @ p['layer.lora.b']
  np.testing.assert_allclose(adapted.bind(p)(X), wanted, atol=1e-5)


def test_targets_are_ends_of_names():
  unet = Network.of(UNet, tiny.UNET)
  found = targets(unet, LoRAConfig(rank=4, targets=('to_q', 'ff.net.2', 'conv1')))
  assert {name.rpartition('.')[2] for name in found} == {'to_q', '2', 'conv1'}
  assert all(size == Rank(4, 8.0) for size in found.values())
  kernels = [n for n in unet.shapes if n.endswith('.kernel')]
  assert len(targets(unet, LoRAConfig(targets=('',)))) == len(kernels)
  with pytest.raises(UserError, match="'o_q'"):
    targets(unet, LoRAConfig(targets=('o_q',)))


def test_only_adapters_have_a_gradient_where_only_they_are_trained(random_params):
  plain = Network.of(UNet, tiny.UNET)
  sizes = targets(plain, LoRAConfig(rank=2))
  adapted = with_lora(plain, sizes)
  params = random_params(adapted.shapes)
  lora = {name: value for name, value in params.items() if is_lora(name)}
  base = {name: value for name, value in params.items() if name not in lora}
  assert len(lora) == 2 * len(sizes)
  inputs = jnp.ones((1, 4, 4, 4)), jnp.zeros(1), Condition(jnp.ones((1, 3, 16)))
  loss = lambda lora: jnp.square(adapted.bind({**base, **lora})(*inputs)).sum()
  gradient = jax.jit(jax.grad(loss))(lora)
  assert all(np.abs(g).max() > 0 for g in gradient.values())


@pytest.mark.parametrize('change', [{'rank': 0}, {'alpha': 0.0}, {'targets': ()}])
def test_impossible_settings_are_refused(change):
  with pytest.raises(UserError, match=f'lora.{next(iter(change))}'):
    typed(LoRAConfig, change, 'lora.')
