"""The encoder of T5 and T5 v1.1 (Raffel et al. 2020; Shazeer 2020), named as in transformers.

Its states grow to tens of thousands, past float16's range and where bfloat16 is coarse: the
residual stream, norms, softmax and the last product of each feed-forward are float32, other
products `dtype`.
"""

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from diffusion_jax.errors import require
from diffusion_jax.models.config import Epsilon, Layers, NetworkConfig, Width
from diffusion_jax.models.layers import Linear, embed
from diffusion_jax.models.network import PLAIN, Blocks, Compute
from diffusion_jax.models.norms import RMSNorm
from diffusion_jax.parallel.layout import constrain
from diffusion_jax.types import Text, TextShape, Tokens


@dataclasses.dataclass(frozen=True)
class T5Config(NetworkConfig):
  """T5 (Raffel et al. 2020) has feed_forward_proj 'relu', T5 v1.1 'gated-gelu'; defaults: T5-small.

  `relative_attention_num_buckets` counts both directions; distances from
  `relative_attention_max_distance` on share the last bucket of theirs. `num_decoder_layers` None:
  as many as the encoder has.
  """

  vocab_size: Width = 32128
  d_model: Width = 512
  d_kv: Width = 64
  d_ff: Width = 2048
  num_layers: Layers = 6
  num_decoder_layers: Layers | None = None
  num_heads: Width = 8
  relative_attention_num_buckets: Width = 32
  relative_attention_max_distance: Width = 128
  layer_norm_epsilon: Epsilon = 1e-6
  feed_forward_proj: Literal['relu', 'gated-gelu'] = 'relu'
  pad_token_id: int = 0
  eos_token_id: int = 1

  @property
  def text_shape(self) -> TextShape:
    """Of its texts, which are of any length; it pools nothing."""
    return TextShape(self.d_model)

  def check(self) -> None:
    longest = self.relative_attention_max_distance
    quarter, rest = divmod(self.relative_attention_num_buckets, 4)
    self.require(
      rest == 0 and longest > quarter, 'relative_attention_num_buckets',
      'must be a multiple of 4 whose quarter is below relative_attention_max_distance='
      f'{longest}',
    )


def relative_position_buckets(
  length: int, buckets: int, max_distance: int, causal: bool = False
) -> np.ndarray:
  """The bucket of each (query, key) pair, int32 [l l] in [0, buckets).

  Half of the buckets are for keys after the query; none of them in a causal decoder, where those
  keys are not seen. Of either half, the first half holds one distance each; the others grow
  geometrically up to `max_distance`.
  """
  distance = np.arange(length)[None] - np.arange(length)[:, None]
  half = buckets if causal else buckets // 2
  exact = half // 2
  near = np.maximum(-distance, 0) if causal else np.abs(distance)
  # In float32, as every implementation, so that distances at a border fall on the same side.
  steps = np.log(np.maximum(near, 1).astype(np.float32) / exact) / math.log(max_distance / exact)
  far = np.minimum(exact + (steps * (half - exact)).astype(np.int32), half - 1)
  found = np.where(near < exact, near, far).astype(np.int32)
  return found if causal else found + half * (distance > 0)


def dense(i: int, o: int, std: float, **kw) -> Linear:
  """A layer without bias whose kernel begins with this standard deviation."""
  return Linear(i, o, use_bias=False, init=nnx.initializers.normal(std), **kw)


def _in_float32(*, compute: Compute = PLAIN, rngs: nnx.Rngs) -> dict:
  return dict(compute=dataclasses.replace(compute, dtype=jnp.float32), rngs=rngs)


class T5Attention(nnx.Module):
  """Attention without biases and without the factor 1/sqrt(d): [b l d] -> [b l d].

  Only the first layer has the table of position biases, which all layers use.
  """

  def __init__(self, config: T5Config, *, has_bias: bool, causal: bool = False, **kw):
    d, inner = config.d_model, config.num_heads * config.d_kv
    self.q = dense(d, inner, (d * config.d_kv) ** -0.5, **kw)
    self.k = dense(d, inner, d**-0.5, **kw)
    self.v = dense(d, inner, d**-0.5, **kw)
    self.o = dense(inner, d, inner**-0.5, **kw)
    self.relative_attention_bias = embed(
      config.relative_attention_num_buckets, config.num_heads, nnx.initializers.normal(d**-0.5),
      **_in_float32(**kw),
    ) if has_bias else None
    self.config, self.causal = config, causal

  def position_bias(self, length: int) -> jax.Array:
    """Return what is added to logits by the distance of query and key: float32 [1 h l l]."""
    buckets = relative_position_buckets(
      length, self.config.relative_attention_num_buckets,
      self.config.relative_attention_max_distance, self.causal,
    )
    return self.relative_attention_bias(jnp.asarray(buckets)).transpose(2, 0, 1)[None]

  def __call__(
    self, x: jax.Array, bias: jax.Array | None, mask: jax.Array | None,
    states: jax.Array | None = None,
  ) -> jax.Array:
    """x [b l d] attends to `states` [b m d], or to itself."""
    split = lambda y: y.reshape(*y.shape[:-1], self.config.num_heads, -1)
    states = x if states is None else states
    q = constrain(split(self.q(x)), 'queries')
    k, v = constrain(split(self.k(states)), 'keys'), constrain(split(self.v(states)), 'keys')
    y = jax.nn.dot_product_attention(q, k, v, bias=bias, mask=mask, scale=1.0)
    return constrain(self.o(y.reshape(*y.shape[:-2], -1)), 'tokens')


class T5FeedForward(nnx.Module):
  """relu(x W_i) W_o (Raffel et al. 2020, sec. 2.1), or (gelu(x W_0) * x W_1) W_o with the tanh
  GELU (Shazeer 2020, eq. 6): [b l d] -> float32 [b l d].
  """

  def __init__(self, config: T5Config, **kw):
    d, hidden = config.d_model, config.d_ff
    self.gated = config.feed_forward_proj == 'gated-gelu'
    for name in ('wi_0', 'wi_1') if self.gated else ('wi',):
      setattr(self, name, dense(d, hidden, d**-0.5, **kw))
    self.wo = dense(hidden, d, hidden**-0.5, **_in_float32(**kw))

  def __call__(self, x: jax.Array) -> jax.Array:
    return constrain(self.wo(self._hidden(x)), 'tokens')

  def _hidden(self, x: jax.Array) -> jax.Array:
    if not self.gated:
      return jax.nn.relu(constrain(self.wi(x), 'hidden'))
    gate, value = self.wi_0(x).astype(jnp.float32), self.wi_1(x).astype(jnp.float32)
    gate, value = constrain(gate, 'hidden'), constrain(value, 'hidden')
    return jax.nn.gelu(gate, approximate=True) * value


class T5Layer(nnx.Module):
  """A layer under its published name, pre-normed, without its residual: [b l d] -> [b l d]."""

  def __init__(self, name: str, layer: nnx.Module, config: T5Config, **kw):
    self.name = name
    setattr(self, name, layer)
    self.layer_norm = RMSNorm(config.d_model, config.layer_norm_epsilon, **kw)

  def __call__(self, x: jax.Array, *args: jax.Array | None) -> jax.Array:
    return getattr(self, self.name)(self.layer_norm(x), *args)


class T5Block(nnx.Module):
  """Attention and feed-forward on a float32 residual stream: [b l d] -> [b l d]."""

  def __init__(self, config: T5Config, *, has_bias: bool, **kw):
    self.layer = nnx.List([
      T5Layer('SelfAttention', T5Attention(config, has_bias=has_bias, **kw), config, **kw),
      # The name is that of T5 v1.0, which the checkpoints of v1.1 kept.
      T5Layer('DenseReluDense', T5FeedForward(config, **kw), config, **kw),
    ])

  def __call__(self, x: jax.Array, bias: jax.Array, mask: jax.Array | None) -> jax.Array:
    x = x + self.layer[0](x, bias, mask).astype(jnp.float32)
    return x + self.layer[1](x)


class T5Stack(Blocks):
  """The blocks and the final norm: float32 [b l d] -> [b l d]."""

  def __init__(self, config: T5Config, **kw):
    super().__init__(**kw)
    self.block = nnx.List([
      T5Block(config, has_bias=number == 0, **kw) for number in range(config.num_layers)
    ])
    self.final_layer_norm = RMSNorm(config.d_model, config.layer_norm_epsilon, **kw)

  def __call__(self, x: jax.Array, mask: jax.Array | None) -> jax.Array:
    return self.run_all(self._states, x, mask)

  def _states(self, x: jax.Array, mask: jax.Array | None) -> jax.Array:
    bias = self.block[0].layer[0].SelfAttention.position_bias(x.shape[1])
    for block in self.block:
      x = self.run(block, x, bias, mask)
    return self.final_layer_norm(x)


class T5EncoderModel(nnx.Module):
  """Token embeddings and the encoder."""

  def __init__(self, config: T5Config, **kw):
    self.config = config
    self.shared = embed(
      config.vocab_size, config.d_model, nnx.initializers.normal(1.0), **_in_float32(**kw)
    )
    self.encoder = T5Stack(config, **kw)

  def encode_text(self, ids: Tokens, mask: jax.Array | None = None) -> tuple[Text, None]:
    """ids [b l] -> (hidden states after the final norm [b l d], None: T5 pools nothing).

    mask: [b l], 1 for tokens and 0 for padding, whose states are meaningless; None: all 1.
    """
    require(ids.ndim == 2, f'T5 takes token ids [b l], not {list(ids.shape)}.')
    if mask is not None:
      require(mask.shape == ids.shape, f'mask must be {list(ids.shape)}, not {list(mask.shape)}.')
      mask = (mask != 0)[:, None, None]
    return self.encoder(self.shared(ids), mask), None
