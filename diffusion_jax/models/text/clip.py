"""CLIP (Radford et al. 2021): a text tower and a vision tower with one embedding space.

Names and computation follow transformers' CLIPModel, config fields its config.json. Initialisation
is the paper's code's: residual branches shrink with depth. Softmax and norms are float32. The text
tower is causal and does not mask padding, as OpenAI's.
"""

import dataclasses
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from diffusion_jax.errors import require
from diffusion_jax.limits import Range
from diffusion_jax.models.attention import MultiHead
from diffusion_jax.models.config import Edge, Epsilon, Layers, NetworkConfig, Width
from diffusion_jax.models.layers import Conv, Linear, embed
from diffusion_jax.models.network import PLAIN, Blocks, Compute
from diffusion_jax.models.norms import LayerNorm
from diffusion_jax.parallel.layout import constrain
from diffusion_jax.types import Images, Text, Tokens

normal = nnx.initializers.normal

Activation = Literal['quick_gelu', 'gelu', 'gelu_new', 'gelu_pytorch_tanh']


@dataclasses.dataclass(frozen=True)
class TowerConfig(NetworkConfig):
  """Common config of both towers."""

  hidden_size: Width = 512
  num_hidden_layers: Layers = 12
  num_attention_heads: Width = 8
  hidden_act: Activation = 'quick_gelu'
  layer_norm_eps: Epsilon = 1e-5

  def check(self) -> None:
    self.require(
      self.hidden_size % self.num_attention_heads == 0, 'num_attention_heads',
      f'must divide hidden_size={self.hidden_size}',
    )


@dataclasses.dataclass(frozen=True)
class CLIPTextConfig(TowerConfig):
  """The text tower; the defaults are those of CLIP ViT-B/32 (hidden 768, 12 heads: ViT-L/14).

  eos_token_id: 2 (an old mistake in checkpoints) pools at the largest id, others at their first
  place.
  """

  intermediate_size: Width = 2048
  vocab_size: Width = 49408
  max_position_embeddings: Width = 77
  bos_token_id: int = 49406
  eos_token_id: int = 49407
  pad_token_id: int = 1


@dataclasses.dataclass(frozen=True)
class CLIPTextProjectionConfig(CLIPTextConfig):
  """The text tower and the width of its projection."""

  projection_dim: Width = 512


@dataclasses.dataclass(frozen=True)
class CLIPVisionConfig(TowerConfig):
  """The vision tower, a ViT over square images of one fixed size; defaults of ViT-B/32."""

  hidden_size: Width = 768
  intermediate_size: Width = 3072
  num_attention_heads: Width = 12
  num_channels: Width = 3
  image_size: Edge = 224
  patch_size: Edge = 32

  def check(self) -> None:
    super().check()
    self.require(
      self.image_size % self.patch_size == 0, 'image_size',
      f'must be a multiple of patch_size={self.patch_size}',
    )


@dataclasses.dataclass(frozen=True)
class CLIPVisionProjectionConfig(CLIPVisionConfig):
  """The vision tower and the width of its projection."""

  projection_dim: Width = 512


@dataclasses.dataclass(frozen=True)
class CLIPConfig(NetworkConfig):
  """Both towers, the width of their common space, and the initial log of 1/temperature."""

  text_config: CLIPTextConfig = CLIPTextConfig()
  vision_config: CLIPVisionConfig = CLIPVisionConfig()
  projection_dim: Width = 512
  logit_scale_init_value: Annotated[float, Range(-1e6, 1e6)] = 2.6592


def dense(i: int, o: int, std: float, **kw) -> Linear:
  """A dense layer whose kernel starts normal with that standard deviation."""
  return Linear(i, o, init=nnx.initializers.normal(std), **kw)


def activation(name: str, x: jax.Array) -> jax.Array:
  """'gelu' exact, 'quick_gelu' x sigmoid(1.702 x), 'gelu_new' = 'gelu_pytorch_tanh' by tanh.

  Hendrycks & Gimpel 2016, sec. 2.
  """
  if name == 'quick_gelu':
    return x * jax.nn.sigmoid(1.702 * x)
  return jax.nn.gelu(x, approximate=name != 'gelu')


class CLIPAttention(MultiHead):
  """Multi-head self-attention with biases: [b l d] -> [b l d]."""

  def __init__(self, features: int, heads: int, depth: int, *, causal: bool, **kw):
    super().__init__(heads, **kw)
    std = features**-0.5 * (2 * depth) ** -0.5
    self.q_proj = dense(features, features, std, **kw)
    self.k_proj = dense(features, features, std, **kw)
    self.v_proj = dense(features, features, std, **kw)
    self.out_proj = dense(features, features, features**-0.5, **kw)
    self.causal = causal

  def __call__(self, x: jax.Array) -> jax.Array:
    q, k, v = (self.by_head(part(x)) for part in (self.q_proj, self.k_proj, self.v_proj))
    y = _attend_before(q, k, v).reshape(x.shape) if self.causal else self.attend(q, k, v)
    return constrain(self.out_proj(y), 'tokens')


def _attend_before(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
  """Attention of each query to keys up to its own place: all [b l h d]."""
  q, k, v = constrain(q, 'queries'), constrain(k, 'keys'), constrain(v, 'keys')
  return jax.nn.dot_product_attention(q, k, v, is_causal=True)


class CLIPMLP(nnx.Module):
  """Two dense layers around the config's activation: [b l d] -> [b l d]."""

  def __init__(self, config: TowerConfig, **kw):
    d, hidden, depth = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    self.fc1 = dense(d, hidden, (2 * d) ** -0.5, **kw)
    self.fc2 = dense(hidden, d, d**-0.5 * (2 * depth) ** -0.5, **kw)
    self.hidden_act = config.hidden_act

  def __call__(self, x: jax.Array) -> jax.Array:
    hidden = activation(self.hidden_act, constrain(self.fc1(x), 'hidden'))
    return constrain(self.fc2(hidden), 'tokens')


class CLIPEncoderLayer(nnx.Module):
  """Pre-norm transformer block: [b l d] -> [b l d]."""

  def __init__(self, config: TowerConfig, *, causal: bool, **kw):
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

  def __init__(self, config: TowerConfig, *, causal: bool, **kw):
    super().__init__(**kw)
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


class CLIPTextEmbeddings(nnx.Module):
  """Token plus learned position embedding: ids [b l] -> [b l d].

  Ids from vocab_size on choose rows of `extra` [n d] (textual inversion); beyond them NaN.
  """

  def __init__(self, config: CLIPTextConfig, **kw):
    d = config.hidden_size
    self.token_embedding = embed(config.vocab_size, d, normal(0.02), **kw)
    self.position_embedding = embed(config.max_position_embeddings, d, normal(0.02), **kw)

  def __call__(self, ids: Tokens, extra: jax.Array | None = None) -> Text:
    positions = self.position_embedding(jnp.arange(ids.shape[1]))
    if extra is None:
      return constrain(self.token_embedding(ids) + positions, 'tokens')
    table = self.token_embedding
    require(
      extra.ndim == 2 and extra.shape[1] == table.features,
      f'Extra token embeddings must be [n {table.features}], not {list(extra.shape)}.',
    )
    # Two lookups: appending the rows would copy the whole table at every call.
    known = table(jnp.minimum(ids, table.num_embeddings - 1))
    added = jnp.take(extra, jnp.maximum(ids - table.num_embeddings, 0), axis=0, mode='fill')
    is_added = (ids >= table.num_embeddings)[..., None]
    states = jnp.where(is_added, added.astype(known.dtype), known) + positions
    return constrain(states, 'tokens')


class CLIPTextTransformer(nnx.Module):
  """ids [b l] -> (hidden states [b l d], pooled [b d] after the final norm)."""

  def __init__(self, config: CLIPTextConfig, **kw):
    self.config = config
    self.embeddings = CLIPTextEmbeddings(config, **kw)
    self.encoder = CLIPEncoder(config, causal=True, **kw)
    self.final_layer_norm = LayerNorm(config.hidden_size, config.layer_norm_eps, **kw)

  def __call__(
    self, ids: Tokens, *, skip: int = 0, normalize: bool = True,
    extra_embeddings: jax.Array | None = None,
  ) -> tuple[Text, jax.Array]:
    longest, depth = self.config.max_position_embeddings, self.config.num_hidden_layers
    require(
      ids.ndim == 2 and ids.shape[1] <= longest,
      f'The text encoder takes token ids [b l] with l <= {longest}, not {list(ids.shape)}.',
    )
    require(
      0 <= skip < depth,
      f'skip={skip} must be from 0 to {depth - 1}: the encoder has {depth} layers.',
    )
    early, last = self.encoder(self.embeddings(ids, extra_embeddings), skip)
    place = self._end(ids)[:, None, None]
    pooled = self.final_layer_norm(jnp.take_along_axis(last, place, axis=1)[:, 0])
    return self.final_layer_norm(early) if normalize else early, pooled

  def _end(self, ids: Tokens) -> jax.Array:
    """Return where each text is pooled: [b]. Ids of extra embeddings are no end."""
    if self.config.eos_token_id == 2:
      return jnp.argmax(jnp.where(ids < self.config.vocab_size, ids, -1), axis=-1)
    return jnp.argmax(ids == self.config.eos_token_id, axis=-1)


class CLIPTextModel(nnx.Module):
  """The text tower alone: the text encoder of Stable Diffusion 1 and 2."""

  def __init__(self, config: CLIPTextConfig, **kw):
    self.config = config
    self.text_model = CLIPTextTransformer(config, **kw)

  def encode_text(
    self, ids: Tokens, *, skip: int = 0, normalize: bool = True,
    extra_embeddings: jax.Array | None = None,
  ) -> tuple[Text, jax.Array]:
    """ids [b l] -> (hidden states [b l d], pooled [b d]).

    skip: last layers left out of the hidden states ("clip skip" less one); 1: penultimate.
    normalize: apply the final norm to them; the pooled one always has it, of the last layer.
    extra_embeddings: [n d], rows of the ids from vocab_size on.
    """
    return self.text_model(ids, skip=skip, normalize=normalize, extra_embeddings=extra_embeddings)


class CLIPTextModelWithProjection(CLIPTextModel):
  """The text tower with its projection: the second text encoder of Stable Diffusion XL."""

  def __init__(self, config: CLIPTextProjectionConfig, **kw):
    super().__init__(config, **kw)
    d = config.hidden_size
    self.text_projection = dense(d, config.projection_dim, d**-0.5, use_bias=False, **kw)

  def encode_text(self, ids: Tokens, **options) -> tuple[Text, jax.Array]:
    """CLIPTextModel's, with a projected pooled state: (hidden [b l d], pooled [b p])."""
    hidden, pooled = super().encode_text(ids, **options)
    return hidden, self.text_projection(pooled)


class CLIPVisionEmbeddings(nnx.Module):
  """Class token, patches and learned positions: pixels [b s s c] -> [b 1+(s/p)^2 d]."""

  def __init__(self, config: CLIPVisionConfig, *, compute: Compute = PLAIN, rngs: nnx.Rngs):
    kw = dict(compute=compute, rngs=rngs)
    d, p = config.hidden_size, config.patch_size
    init = nnx.initializers.normal(d**-0.5)
    self.class_embedding = nnx.Param(init(rngs.params(), (d,), compute.param_dtype))
    self.patch_embedding = Conv(
      config.num_channels, d, p, stride=p, padding=0, use_bias=False, **kw
    )
    self.position_embedding = embed((config.image_size // p) ** 2 + 1, d, normal(0.02), **kw)

  def __call__(self, pixels: Images) -> jax.Array:
    patches = self.patch_embedding(pixels)
    b, d = patches.shape[0], patches.shape[-1]
    first = jnp.broadcast_to(self.class_embedding[...].astype(patches.dtype), (b, 1, d))
    x = jnp.concatenate([first, patches.reshape(b, -1, d)], axis=1)
    return constrain(x + self.position_embedding(jnp.arange(x.shape[1])), 'tokens')


class CLIPVisionTransformer(nnx.Module):
  """Normalised pixels [b s s c] -> the class token after the last norm [b d]."""

  def __init__(self, config: CLIPVisionConfig, **kw):
    d, eps = config.hidden_size, config.layer_norm_eps
    self.config = config
    self.embeddings = CLIPVisionEmbeddings(config, **kw)
    self.pre_layrnorm = LayerNorm(d, eps, **kw)  # Spelt so in every published checkpoint.
    self.encoder = CLIPEncoder(config, causal=False, **kw)
    self.post_layernorm = LayerNorm(d, eps, **kw)

  def __call__(self, pixels: Images) -> jax.Array:
    size = self.config.image_size
    expected = (size, size, self.config.num_channels)
    require(
      pixels.shape[1:] == expected,
      f'The vision tower takes images {list(expected)}, not {list(pixels.shape[1:])}; resize them.',
    )
    states, _ = self.encoder(self.pre_layrnorm(self.embeddings(pixels)))
    return self.post_layernorm(states[:, 0])


class CLIPVisionModel(nnx.Module):
  """The vision tower alone."""

  def __init__(self, config: CLIPVisionConfig, **kw):
    self.config = config
    self.vision_model = CLIPVisionTransformer(config, **kw)

  def encode_image(self, pixels: Images) -> jax.Array:
    """Pixels [b s s c], already normalised -> the class token after the last norm [b d]."""
    return self.vision_model(pixels)


class CLIPVisionModelWithProjection(CLIPVisionModel):
  """The vision tower with its projection: the image encoder of image variations."""

  def __init__(self, config: CLIPVisionProjectionConfig, **kw):
    super().__init__(config, **kw)
    d = config.hidden_size
    self.visual_projection = dense(d, config.projection_dim, d**-0.5, use_bias=False, **kw)

  def encode_image(self, pixels: Images) -> jax.Array:
    """Pixels [b s s c], already normalised -> embedding [b p], projected but not normalised."""
    return self.visual_projection(super().encode_image(pixels))


class CLIP(CLIPTextModelWithProjection, CLIPVisionModelWithProjection):
  """Both towers with their projections; `logit_scale` is the log of 1/temperature, a scalar."""

  def __init__(self, config: CLIPConfig, *, compute: Compute = PLAIN, rngs: nnx.Rngs):
    kw = dict(compute=compute, rngs=rngs)
    text, vision, p = config.text_config, config.vision_config, config.projection_dim
    project = lambda d: dense(d, p, d**-0.5, use_bias=False, **kw)
    self.config = config
    self.text_model = CLIPTextTransformer(text, **kw)
    self.vision_model = CLIPVisionTransformer(vision, **kw)
    self.text_projection = project(text.hidden_size)
    self.visual_projection = project(vision.hidden_size)
    self.logit_scale = nnx.Param(jnp.asarray(config.logit_scale_init_value, compute.param_dtype))


def unit(x: jax.Array) -> jax.Array:
  """Scale rows [n p] to Euclidean length 1."""
  return x / jnp.linalg.norm(x, axis=-1, keepdims=True)
