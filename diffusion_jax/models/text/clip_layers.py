"""The transformer that both towers of CLIP are made of, with the names of transformers.

Initialisation is that of the paper's code: residual branches shrink with depth. Softmax and norms
are in float32.
"""

import jax
from flax import nnx

from diffusion_jax.layout import constrain
from diffusion_jax.models.attend import Attends
from diffusion_jax.models.layers import Linear
from diffusion_jax.models.norms import LayerNorm
from diffusion_jax.models.remat import Blocks
from diffusion_jax.models.text.clip_config import CLIPTextConfig, CLIPVisionConfig


def dense(i: int, o: int, std: float, **kw) -> Linear:
  """A dense layer whose kernel starts normal with that standard deviation."""
  return Linear(i, o, init=nnx.initializers.normal(std), **kw)


def embed(count: int, features: int, std: float, **kw) -> nnx.Embed:
  """A table of `count` rows that start normal with that standard deviation."""
  return nnx.Embed(count, features, embedding_init=nnx.initializers.normal(std), **kw)


def activation(name: str, x: jax.Array) -> jax.Array:
  """'quick_gelu' is x sigmoid(1.702 x) and 'gelu_new' the tanh (Hendrycks & Gimpel 2016, sec. 2).

  'gelu' is exact; 'gelu_pytorch_tanh' is another name of 'gelu_new'.
  """
  if name == 'quick_gelu':
    return x * jax.nn.sigmoid(1.702 * x)
  return jax.nn.gelu(x, approximate=name != 'gelu')


class CLIPAttention(Attends):
  """Multi-head self-attention with biases: [b l d] -> [b l d]."""

  def __init__(self, features: int, heads: int, depth: int, *, causal: bool, **kw):
    std = features**-0.5 * (2 * depth) ** -0.5
    self.q_proj = dense(features, features, std, **kw)
    self.k_proj = dense(features, features, std, **kw)
    self.v_proj = dense(features, features, std, **kw)
    self.out_proj = dense(features, features, features**-0.5, **kw)
    self.heads, self.causal = heads, causal

  def __call__(self, x: jax.Array) -> jax.Array:
    split = lambda y: y.reshape(*y.shape[:-1], self.heads, -1)
    q, k, v = split(self.q_proj(x)), split(self.k_proj(x)), split(self.v_proj(x))
    y = _attend_before(q, k, v) if self.causal else self.attend(q, k, v)
    return constrain(self.out_proj(y.reshape(x.shape)), 'tokens')


def _attend_before(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
  """Attention of each query to keys up to its own place: all [b l h d]."""
  q, k, v = constrain(q, 'queries'), constrain(k, 'keys'), constrain(v, 'keys')
  return jax.nn.dot_product_attention(q, k, v, is_causal=True)


class CLIPMLP(nnx.Module):
  """Two dense layers around the config's activation: [b l d] -> [b l d]."""

  def __init__(self, config: CLIPTextConfig | CLIPVisionConfig, **kw):
    d, hidden, depth = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    self.fc1 = dense(d, hidden, (2 * d) ** -0.5, **kw)
    self.fc2 = dense(hidden, d, d**-0.5 * (2 * depth) ** -0.5, **kw)
    self.hidden_act = config.hidden_act

  def __call__(self, x: jax.Array) -> jax.Array:
    hidden = activation(self.hidden_act, constrain(self.fc1(x), 'hidden'))
    return constrain(self.fc2(hidden), 'tokens')


class CLIPEncoderLayer(nnx.Module):
  """Pre-norm transformer block: [b l d] -> [b l d]."""

  def __init__(self, config: CLIPTextConfig | CLIPVisionConfig, *, causal: bool, **kw):
    d, eps = config.hidden_size, config.layer_norm_eps
    heads, depth = config.num_attention_heads, config.num_hidden_layers
    self.self_attn = CLIPAttention(d, heads, depth, causal=causal, **kw)
    self.layer_norm1 = LayerNorm(d, eps, **kw)
    self.mlp = CLIPMLP(config, **kw)
    self.layer_norm2 = LayerNorm(d, eps, **kw)

  def __call__(self, x: jax.Array) -> jax.Array:
    x = x + self.self_attn(self.layer_norm1(x))
    return x + self.mlp(self.layer_norm2(x))


class CLIPEncoder(Blocks):
  """The stack of blocks: [b l d] -> the states before the last `skip` blocks and after all."""

  def __init__(self, config: CLIPTextConfig | CLIPVisionConfig, *, causal: bool, **kw):
    self.layers = nnx.List([
      CLIPEncoderLayer(config, causal=causal, **kw) for _ in range(config.num_hidden_layers)
    ])

  def __call__(self, x: jax.Array, skip: int = 0) -> tuple[jax.Array, jax.Array]:
    return self.run_all(lambda x: self._states(x, skip), x)

  def _states(self, x: jax.Array, skip: int) -> tuple[jax.Array, jax.Array]:
    early = x
    for number, layer in enumerate(self.layers, 1):
      x = self.run(layer, x)
      early = x if number == len(self.layers) - skip else early
    return early, x
