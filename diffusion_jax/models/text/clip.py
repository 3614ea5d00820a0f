"""CLIP (Radford et al. 2021): a text tower and a vision tower with one embedding space.

Names and computation follow transformers' CLIPModel. The text tower is causal and does not mask
padding, as OpenAI's. Initialisation is that of the paper's code: residual branches shrink with
depth. Softmax and norms are in float32.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from diffusion_jax.models.checks import require
from diffusion_jax.models.layers import Conv, Linear, layer_norm
from diffusion_jax.models.text.clip_config import CLIPConfig, CLIPTextConfig, CLIPVisionConfig
from diffusion_jax.types import Images, Text, Tokens

__all__ = ['CLIP', 'CLIPConfig', 'CLIPTextConfig', 'CLIPTextModel', 'CLIPVisionConfig']


def _dense(i: int, o: int, std: float, **kw) -> Linear:
  return Linear(i, o, init=nnx.initializers.normal(std), **kw)


def _embed(count: int, features: int, std: float, **kw) -> nnx.Embed:
  return nnx.Embed(count, features, embedding_init=nnx.initializers.normal(std), **kw)


def activation(name: str, x: jax.Array) -> jax.Array:
  """'gelu' (exact) or 'quick_gelu', x sigmoid(1.702 x) (Hendrycks & Gimpel 2016, sec. 2)."""
  return jax.nn.gelu(x, approximate=False) if name == 'gelu' else x * jax.nn.sigmoid(1.702 * x)


class CLIPAttention(nnx.Module):
  """Multi-head self-attention with biases: [b l d] -> [b l d]."""

  def __init__(self, features: int, heads: int, depth: int, *, causal: bool, **kw):
    std = features**-0.5 * (2 * depth) ** -0.5
    self.q_proj = _dense(features, features, std, **kw)
    self.k_proj = _dense(features, features, std, **kw)
    self.v_proj = _dense(features, features, std, **kw)
    self.out_proj = _dense(features, features, features**-0.5, **kw)
    self.heads, self.causal = heads, causal

  def __call__(self, x: jax.Array) -> jax.Array:
    split = lambda y: y.reshape(*y.shape[:-1], self.heads, -1)
    q, k, v = split(self.q_proj(x)), split(self.k_proj(x)), split(self.v_proj(x))
    y = jax.nn.dot_product_attention(q, k, v, is_causal=self.causal)
    return self.out_proj(y.reshape(x.shape))


class CLIPMLP(nnx.Module):
  """Two dense layers around the config's activation: [b l d] -> [b l d]."""

  def __init__(self, config: CLIPTextConfig | CLIPVisionConfig, **kw):
    d, hidden, depth = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    self.fc1 = _dense(d, hidden, (2 * d) ** -0.5, **kw)
    self.fc2 = _dense(hidden, d, d**-0.5 * (2 * depth) ** -0.5, **kw)
    self.hidden_act = config.hidden_act

  def __call__(self, x: jax.Array) -> jax.Array:
    return self.fc2(activation(self.hidden_act, self.fc1(x)))


class CLIPEncoderLayer(nnx.Module):
  """Pre-norm transformer block: [b l d] -> [b l d]."""

  def __init__(self, config: CLIPTextConfig | CLIPVisionConfig, *, causal: bool, **kw):
    d, eps = config.hidden_size, config.layer_norm_eps
    heads, depth = config.num_attention_heads, config.num_hidden_layers
    self.self_attn = CLIPAttention(d, heads, depth, causal=causal, **kw)
    self.layer_norm1 = layer_norm(d, eps, **kw)
    self.mlp = CLIPMLP(config, **kw)
    self.layer_norm2 = layer_norm(d, eps, **kw)

  def __call__(self, x: jax.Array) -> jax.Array:
    x = x + self.self_attn(self.layer_norm1(x))
    return x + self.mlp(self.layer_norm2(x))


class CLIPEncoder(nnx.Module):
  """The stack of blocks: [b l d] -> [b l d]."""

  def __init__(self, config: CLIPTextConfig | CLIPVisionConfig, *, causal: bool, **kw):
    self.layers = nnx.List([
      CLIPEncoderLayer(config, causal=causal, **kw) for _ in range(config.num_hidden_layers)
    ])

  def __call__(self, x: jax.Array) -> jax.Array:
    for layer in self.layers:
      x = layer(x)
    return x


class CLIPTextEmbeddings(nnx.Module):
  """Token plus learned position embedding: ids [b l] -> [b l d]."""

  def __init__(self, config: CLIPTextConfig, **kw):
    d = config.hidden_size
    self.token_embedding = _embed(config.vocab_size, d, 0.02, **kw)
    self.position_embedding = _embed(config.max_position_embeddings, d, 0.02, **kw)

  def __call__(self, ids: Tokens) -> Text:
    return self.token_embedding(ids) + self.position_embedding(jnp.arange(ids.shape[1]))


class CLIPTextTransformer(nnx.Module):
  """ids [b l] -> (hidden states [b l d] after the final norm, the pooled one [b d])."""

  def __init__(self, config: CLIPTextConfig, **kw):
    self.config = config
    self.embeddings = CLIPTextEmbeddings(config, **kw)
    self.encoder = CLIPEncoder(config, causal=True, **kw)
    self.final_layer_norm = layer_norm(config.hidden_size, config.layer_norm_eps, **kw)

  def __call__(self, ids: Tokens) -> tuple[Text, jax.Array]:
    longest, eos = self.config.max_position_embeddings, self.config.eos_token_id
    require(
      ids.ndim == 2 and ids.shape[1] <= longest,
      f'The text encoder takes token ids [b l] with l <= {longest}, not {list(ids.shape)}.',
    )
    hidden = self.final_layer_norm(self.encoder(self.embeddings(ids)))
    end = jnp.argmax(ids if eos == 2 else ids == eos, axis=-1)
    return hidden, jnp.take_along_axis(hidden, end[:, None, None], axis=1)[:, 0]


class CLIPVisionEmbeddings(nnx.Module):
  """Class token, patches and learned positions: pixels [b s s c] -> [b 1+(s/p)^2 d]."""

  def __init__(self, config: CLIPVisionConfig, *, dtype, param_dtype, rngs: nnx.Rngs):
    kw = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
    d, p = config.hidden_size, config.patch_size
    init = nnx.initializers.normal(d**-0.5)
    self.class_embedding = nnx.Param(init(rngs.params(), (d,), param_dtype))
    self.patch_embedding = Conv(
      config.num_channels, d, p, stride=p, padding=0, use_bias=False, **kw
    )
    self.position_embedding = _embed((config.image_size // p) ** 2 + 1, d, 0.02, **kw)

  def __call__(self, pixels: Images) -> jax.Array:
    patches = self.patch_embedding(pixels)
    b, d = patches.shape[0], patches.shape[-1]
    first = jnp.broadcast_to(self.class_embedding[...].astype(patches.dtype), (b, 1, d))
    x = jnp.concatenate([first, patches.reshape(b, -1, d)], axis=1)
    return x + self.position_embedding(jnp.arange(x.shape[1]))


class CLIPVisionTransformer(nnx.Module):
  """Normalised pixels [b s s c] -> the class token after the last norm [b d]."""

  def __init__(self, config: CLIPVisionConfig, **kw):
    d, eps = config.hidden_size, config.layer_norm_eps
    self.config = config
    self.embeddings = CLIPVisionEmbeddings(config, **kw)
    self.pre_layrnorm = layer_norm(d, eps, **kw)  # Spelt so in every published checkpoint.
    self.encoder = CLIPEncoder(config, causal=False, **kw)
    self.post_layernorm = layer_norm(d, eps, **kw)

  def __call__(self, pixels: Images) -> jax.Array:
    size = self.config.image_size
    expected = (size, size, self.config.num_channels)
    require(
      pixels.shape[1:] == expected,
      f'The vision tower takes images {list(expected)}, not {list(pixels.shape[1:])}; resize them.',
    )
    return self.post_layernorm(self.encoder(self.pre_layrnorm(self.embeddings(pixels)))[:, 0])


class CLIPTextModel(nnx.Module):
  """The text tower alone, as the Stable Diffusion checkpoints ship it."""

  def __init__(
    self, config: CLIPTextConfig, *, dtype=jnp.float32, param_dtype=jnp.float32, rngs: nnx.Rngs
  ):
    self.config = config
    self.text_model = CLIPTextTransformer(config, dtype=dtype, param_dtype=param_dtype, rngs=rngs)

  def encode_text(self, ids: Tokens) -> tuple[Text, jax.Array]:
    """ids [b l] -> (last hidden states after the final norm [b l d], the pooled one [b d])."""
    return self.text_model(ids)


class CLIP(nnx.Module):
  """Both towers with their projections; `logit_scale` is the log of 1/temperature, a scalar."""

  def __init__(
    self, config: CLIPConfig, *, dtype=jnp.float32, param_dtype=jnp.float32, rngs: nnx.Rngs
  ):
    kw = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
    text, vision, p = config.text_config, config.vision_config, config.projection_dim
    project = lambda d: _dense(d, p, d**-0.5, use_bias=False, **kw)
    self.config = config
    self.text_model = CLIPTextTransformer(text, **kw)
    self.vision_model = CLIPVisionTransformer(vision, **kw)
    self.text_projection = project(text.hidden_size)
    self.visual_projection = project(vision.hidden_size)
    self.logit_scale = nnx.Param(jnp.asarray(config.logit_scale_init_value, param_dtype))

  def encode_text(self, ids: Tokens) -> tuple[Text, jax.Array]:
    """ids [b l] -> (last hidden states after the final norm [b l d], embedding [b p]).

    The embedding is projected but not normalised. Padding is not masked.
    """
    hidden, pooled = self.text_model(ids)
    return hidden, self.text_projection(pooled)

  def encode_image(self, pixels: Images) -> jax.Array:
    """Pixels [b s s c], already normalised -> embedding [b p], projected but not normalised."""
    return self.visual_projection(self.vision_model(pixels))
