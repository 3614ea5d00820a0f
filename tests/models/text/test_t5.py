"""T5: published sizes, masks, half precision, layout, errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.errors import UserError
from diffusion_jax.formats.networks import format_of
from diffusion_jax.formats.t5 import T5_ENCODERS
from diffusion_jax.models import network
from diffusion_jax.models.network import Compute
from diffusion_jax.models.text.t5 import T5Config, T5EncoderModel
from diffusion_jax.parallel.layout import parameter_spec


@pytest.mark.parametrize(('config', 'scalars', 'tensors'), [
  (T5_ENCODERS['t5_v1_1_xxl'], 4_762_310_656, 219),  # 220 in files, where one is stored twice.
  (T5_ENCODERS['t5_v1_1_small'], 35_332_800, 75),
])
def test_published_sizes(config, scalars, tensors):
  shapes = format_of(config).shapes(config)
  assert (network.count(shapes), len(shapes)) == (scalars, tensors)


T5 = T5Config(
  d_model=16, d_kv=4, d_ff=32, num_layers=2, num_heads=2, vocab_size=20,
  feed_forward_proj='gated-gelu',
)


def build(module, config, random_params, **kw):
  graphdef, shapes = network.abstract(lambda rngs: module(config, rngs=rngs, **kw))
  return graphdef, random_params(shapes)


def test_padding_changes_nothing(random_params, quick_jit):
  graphdef, params = build(T5EncoderModel, T5, random_params)
  run = quick_jit(lambda *args: network.merge(graphdef, params).encode_text(*args)[0])
  a, b = (jnp.array([[5, 6, 7, pad, pad]]) for pad in (0, 9))
  mask = jnp.array([[1, 1, 1, 0, 0]])
  seen = [run(ids, mask)[:, :3] for ids in (a, b)]
  np.testing.assert_allclose(*seen, atol=1e-6)
  np.testing.assert_allclose(seen[0], run(a[:, :3]), atol=1e-6)
  assert np.abs(seen[0] - run(a)[:, :3]).max() > 1e-3


@pytest.mark.parametrize('feed_forward', ['relu', 'gated-gelu'])
def test_survives_large_activations(feed_forward, random_params, quick_jit):
  """The states of published T5s leave float16's range (65504) in their feed-forwards."""
  config = T5Config(**{**vars(T5), 'feed_forward_proj': feed_forward})
  params = build(T5EncoderModel, config, random_params)[1]
  scale = {'wi.kernel': 1000.0, 'wi_0.kernel': 300.0, 'wi_1.kernel': 300.0, 'wo.kernel': 300.0}
  large = lambda name: next((s for end, s in scale.items() if name.endswith(end)), 1.0)
  params = {name: p * large(name) for name, p in params.items()}
  ids, states = jnp.arange(12).reshape(2, 6), 1e5 * jax.random.normal(jax.random.key(0), (5, 16))

  def run(dtype):
    def both(params):
      graphdef = build(T5EncoderModel, config, random_params, compute=Compute(dtype))[0]
      t5 = network.merge(graphdef, params)
      # Attention in float16 is not to be had on CPUs, so there only the feed-forward.
      hidden = None if dtype == jnp.float16 else t5.encode_text(ids)[0]
      return hidden, t5.encoder.block[0].layer[1](states)

    return quick_jit(both)(params)

  def error(found, wanted):
    difference = jnp.square(found.astype(jnp.float32) - wanted).mean()
    return float(jnp.sqrt(difference / jnp.square(wanted).mean()))

  (hidden, out), (half, brain_out), (_, half_out) = map(
    run, (jnp.float32, jnp.bfloat16, jnp.float16)
  )
  assert float(jnp.abs(out).max()) > 2 * 65504
  assert half.dtype == jnp.bfloat16 and 0 < error(half, hidden) < 0.03
  assert half_out.dtype == brain_out.dtype == jnp.float32
  assert 0 < error(half_out, out) < 0.005 and 0 < error(brain_out, out) < 0.03


def test_adds_to_its_states_in_float32(random_params):
  graphdef, params = build(T5EncoderModel, T5, random_params, compute=Compute(jnp.bfloat16))
  silent = ('.o.kernel', '.wo.kernel')
  params = {name: p * (not name.endswith(silent)) for name, p in params.items()}
  block = network.merge(graphdef, params).encoder.block[1]
  states = 4097 + jnp.arange(16.0).reshape(1, 1, 16)  # bfloat16 has no 4097.
  np.testing.assert_array_equal(block(states, jnp.zeros((1, 2, 1, 1)), None), states)


def test_is_split_over_the_tensor_axis_in_pairs(random_params):
  from diffusion_jax.parallel.mesh import MeshConfig, make_mesh
  mesh = make_mesh(MeshConfig())
  _, params = build(T5EncoderModel, T5, random_params)
  axes = {name: tuple(parameter_spec(name, p.shape, mesh.shape)) for name, p in params.items()}
  columns = {n for n, a in axes.items() if a == ('fsdp', 'tensor')}
  rows = {n for n, a in axes.items() if a == ('tensor', 'fsdp') and n.endswith('kernel')}
  assert {n.split('.')[-2] for n in columns} == {'q', 'k', 'v', 'wi_0', 'wi_1'}
  assert {n.split('.')[-2] for n in rows} == {'o', 'wo'}


@pytest.mark.parametrize(('make', 'words'), [
  (lambda: T5Config(feed_forward_proj='gelu'), "feed_forward_proj is 'gelu'; did you mean"),
  (lambda: T5Config(num_heads=0), 'num_heads is 0; give'),
  (lambda: T5Config(relative_attention_num_buckets=6), 'multiple of 4'),
  (lambda: T5Config(relative_attention_max_distance=8), 'max_distance=8'),
])
def test_wrong_configs_say_what_is_wrong(make, words):
  with pytest.raises(UserError, match=words):
    make()


@pytest.mark.parametrize(('module', 'config', 'call', 'words'), [
  (T5EncoderModel, T5, lambda n: n.encode_text(jnp.ones(3, int)), r'ids \[b l\]'),
  (T5EncoderModel, T5, lambda n: n.encode_text(
    jnp.ones((1, 3), int), jnp.ones((1, 4))), r'mask must be \[1, 3\]'),
])
def test_wrong_inputs_say_what_is_wrong(module, config, call, words):
  graphdef, shapes = network.abstract(lambda rngs: module(config, rngs=rngs))
  with pytest.raises(UserError, match=words):
    jax.eval_shape(lambda params: call(network.merge(graphdef, params)), shapes)
