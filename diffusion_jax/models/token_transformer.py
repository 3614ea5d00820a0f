"""The transformer of DALL-E (Ramesh et al. 2021, section 2.2): one causal sequence of a caption's
tokens and then an image's, each predicted from all before it.

Blocks are those of GPT-2 (pre-norm, learned positions); an image token's position is the sum of its
row's and its column's. Texts and images have tables and outputs of their own, so that a place
predicts only what may stand there. Attention is dense; DALL-E's own is sparse for speed.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from diffusion_jax.errors import require
from diffusion_jax.models.config import Edge, Width
from diffusion_jax.models.layers import embed
from diffusion_jax.models.network import PLAIN, Compute
from diffusion_jax.models.norms import LayerNorm
from diffusion_jax.models.text.clip import (
  Activation,
  CLIPEncoder,
  CLIPEncoderLayer,
  TowerConfig,
  dense,
)
from diffusion_jax.types import Tokens

normal = nnx.initializers.normal


@dataclasses.dataclass(frozen=True)
class TokenTransformerConfig(TowerConfig):
  """vocab_size, text_length: of captions. image_vocab_size, rows, columns: of images' tokens."""

  intermediate_size: Width = 2048
  hidden_act: Activation = 'gelu_new'
  vocab_size: Width = 16384
  text_length: Width = 256
  image_vocab_size: Width = 8192
  rows: Edge = 32
  columns: Edge = 32

  @property
  def places(self) -> int:
    """Tokens of an image."""
    return self.rows * self.columns


class Cache(NamedTuple):
  """Keys and values of every layer and place so far, [layers b l heads d] each."""

  keys: jax.Array
  values: jax.Array


class TokenTransformer(nnx.Module):
  """(caption [b l], image tokens [b n]) -> logits of each token but the first, given those before.
  """

  def __init__(
    self, config: TokenTransformerConfig, *, compute: Compute = PLAIN, rngs: nnx.Rngs
  ):
    kw, d = dict(compute=compute, rngs=rngs), config.hidden_size
    self.config = config
    self.token_embedding = embed(config.vocab_size, d, normal(0.02), **kw)
    self.position_embedding = embed(config.text_length, d, normal(0.02), **kw)
    self.image_embedding = embed(config.image_vocab_size, d, normal(0.02), **kw)
    self.row_embedding = embed(config.rows, d, normal(0.02), **kw)
    self.column_embedding = embed(config.columns, d, normal(0.02), **kw)
    self.encoder = CLIPEncoder(config, causal=True, **kw)
    self.final_layer_norm = LayerNorm(d, config.layer_norm_eps, **kw)
    last = dict(compute=dataclasses.replace(compute, dtype=jnp.float32), rngs=rngs)
    self.text_head = dense(d, config.vocab_size, 0.02, **last)
    self.image_head = dense(d, config.image_vocab_size, 0.02, **last)

  def __call__(self, text: Tokens, image: Tokens) -> tuple[jax.Array, jax.Array]:
    """Return float32 logits of text[:, 1:] [b l-1 v] and of all of the image [b n k]."""
    length = text.shape[1]
    self._check(text)
    before = [self._text(text), self._image(image[:, :-1], 0)]
    _, states = self.encoder(jnp.concatenate(before, axis=1))
    states = self.final_layer_norm(states)
    return self.text_head(states[:, : length - 1]), self.image_head(states[:, length - 1 :])

  def begin(self, text: Tokens) -> tuple[jax.Array, Cache]:
    """Captions [b l] -> (logits of the first image token [b k], the cache of the captions)."""
    self._check(text)
    config, b = self.config, len(text)
    length = text.shape[1] + config.places - 1
    x = self._text(text)
    heads = config.num_attention_heads
    shape = (config.num_hidden_layers, b, length, heads, config.hidden_size // heads)
    return self._continue(x, Cache(jnp.zeros(shape, x.dtype), jnp.zeros(shape, x.dtype)), 0)

  def step(self, token: jax.Array, cache: Cache, number: jax.Array) -> tuple[jax.Array, Cache]:
    """(image tokens [b] of that number, the cache before) -> (logits of the next [b k], cache)."""
    start = cache.keys.shape[2] - self.config.places + 1
    return self._continue(self._image(token[:, None], number), cache, start + number)

  def _check(self, text: Tokens) -> None:
    most = self.config.text_length
    require(
      text.ndim == 2 and text.shape[1] <= most,
      f'The transformer takes token ids [b l] with l <= {most}, not {list(text.shape)}.',
    )

  def _text(self, ids: Tokens) -> jax.Array:
    return self.token_embedding(ids) + self.position_embedding(jnp.arange(ids.shape[1]))

  def _image(self, tokens: Tokens, first: jax.Array | int) -> jax.Array:
    """Embed image tokens [b m], of which the first has that number."""
    number = first + jnp.arange(tokens.shape[1])
    row, column = number // self.config.columns, number % self.config.columns
    places = self.row_embedding(row) + self.column_embedding(column)
    return self.image_embedding(tokens) + places

  def _continue(self, x: jax.Array, cache: Cache, at: jax.Array | int) -> tuple[jax.Array, Cache]:
    """Embedded places [b m d] from `at` on -> (logits after the last of them, the cache)."""
    keys, values = [], []
    for number, layer in enumerate(self.encoder.layers):
      x, k, v = _attend_cached(layer, x, cache.keys[number], cache.values[number], at)
      keys.append(k)
      values.append(v)
    logits = self.image_head(self.final_layer_norm(x[:, -1]))
    return logits, Cache(jnp.stack(keys), jnp.stack(values))


def _attend_cached(
  layer: CLIPEncoderLayer, x: jax.Array, keys: jax.Array, values: jax.Array, at: jax.Array | int
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """A block on places [b m d] from `at` on, which see all before them, [b l h e], and are added."""
  attention, normed = layer.self_attn, layer.layer_norm1(x)
  q, k, v = (
    attention.by_head(part(normed))
    for part in (attention.q_proj, attention.k_proj, attention.v_proj)
  )
  keys = lax.dynamic_update_slice(keys, k.astype(keys.dtype), (0, at, 0, 0))
  values = lax.dynamic_update_slice(values, v.astype(values.dtype), (0, at, 0, 0))
  seen = jnp.arange(keys.shape[1]) <= (at + jnp.arange(x.shape[1]))[:, None]
  y = jax.nn.dot_product_attention(q, keys, values, mask=seen[None, None])
  x = x + attention.out_proj(y.reshape(x.shape))
  return x + layer.mlp(layer.layer_norm2(x)), keys, values


class Filter(NamedTuple):
  """What is kept of a distribution over tokens: temperature, the `top_k` likeliest (0: all), and of
  those the likeliest that together have the probability `top_p`."""

  temperature: jax.Array | float = 1.0
  top_k: jax.Array | int = 0
  top_p: jax.Array | float = 1.0


def filtered(logits: jax.Array, keep: Filter) -> jax.Array:
  """Logits [... k] -> those of what is kept, -inf for the rest; the likeliest always stays.

  Top-k: Fan et al. 2018, section 5.4. Top-p: Holtzman et al. 2020, section 3.1.
  """
  logits, count = logits / keep.temperature, logits.shape[-1]
  ordered = -jnp.sort(-logits, axis=-1)
  most = jnp.where(keep.top_k > 0, jnp.minimum(keep.top_k, count), count)
  ordered = jnp.where(jnp.arange(count) < most, ordered, -jnp.inf)
  probabilities = jax.nn.softmax(ordered, axis=-1)
  before = jnp.cumsum(probabilities, axis=-1) - probabilities
  # All of them means all: sums of many probabilities may be rounded to 1 before the last.
  within = (before < keep.top_p) | (jnp.asarray(keep.top_p) >= 1)
  kept = (within & (ordered > -jnp.inf)).at[..., 0].set(True)
  least = jnp.where(kept, ordered, jnp.inf).min(-1, keepdims=True)
  return jnp.where(logits >= least, logits, -jnp.inf)


def sample_tokens(
  model: TokenTransformer, text: Tokens, keys: jax.Array, keep: Filter,
  null: Tokens | None = None, guidance: jax.Array | float = 1.0,
) -> Tokens:
  """Draw the image tokens [b n] of captions [b l], one after another, with a key for each image.

  null: captions [b l] that say nothing; logits are then null's + guidance (text's - null's), as in
  classifier-free guidance (Ho & Salimans 2022; Gafni et al. 2022, section 3.4).
  """
  b = len(text)
  texts = text if null is None else jnp.concatenate([text, null])

  def draw(logits: jax.Array, number: jax.Array | int) -> jax.Array:
    if null is not None:
      told, untold = jnp.split(logits, 2)
      logits = untold + guidance * (told - untold)
    own = jax.vmap(lambda key: jax.random.fold_in(key, number))(keys)
    return jax.vmap(jax.random.categorical)(own, filtered(logits, keep))

  def one(carry: tuple, number: jax.Array) -> tuple[tuple, jax.Array]:
    token, cache = carry
    both = token if null is None else jnp.concatenate([token, token])
    logits, cache = model.step(both, cache, number)
    token = draw(logits, number + 1)
    return (token, cache), token

  logits, cache = model.begin(texts)
  first = draw(logits, 0)
  _, rest = lax.scan(one, (first, cache), jnp.arange(model.config.places - 1))
  return jnp.concatenate([first[:, None], rest.T.reshape(b, -1)], axis=1)
