"""CLIP's text tower (Radford et al. 2021, sec. 2.4), alone and with its projection.

It is causal and does not mask padding, as OpenAI's.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from diffusion_jax.layout import constrain
from diffusion_jax.models.checks import require
from diffusion_jax.models.norms import LayerNorm
from diffusion_jax.models.text.clip_config import CLIPTextConfig, CLIPTextProjectionConfig
from diffusion_jax.models.text.clip_layers import CLIPEncoder, dense, embed
from diffusion_jax.types import Text, Tokens


class CLIPTextEmbeddings(nnx.Module):
  """Token plus learned position embedding: ids [b l] -> [b l d].

  Ids from vocab_size on choose rows of `extra` [n d], as learned by textual inversion; an id past
  those gives NaN.
  """

  def __init__(self, config: CLIPTextConfig, **kw):
    d = config.hidden_size
    self.token_embedding = embed(config.vocab_size, d, 0.02, **kw)
    self.position_embedding = embed(config.max_position_embeddings, d, 0.02, **kw)

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
    """Where each text is pooled: [b]. Ids of extra embeddings are no end, however large."""
    if self.config.eos_token_id == 2:
      return jnp.argmax(jnp.where(ids < self.config.vocab_size, ids, -1), axis=-1)
    return jnp.argmax(ids == self.config.eos_token_id, axis=-1)


class CLIPTextModel(nnx.Module):
  """The text tower alone: the text encoder of Stable Diffusion 1 and 2."""

  def __init__(
    self, config: CLIPTextConfig, *, dtype=jnp.float32, param_dtype=jnp.float32, rngs: nnx.Rngs
  ):
    self.config = config
    self.text_model = CLIPTextTransformer(config, dtype=dtype, param_dtype=param_dtype, rngs=rngs)

  def encode_text(
    self, ids: Tokens, *, skip: int = 0, normalize: bool = True,
    extra_embeddings: jax.Array | None = None,
  ) -> tuple[Text, jax.Array]:
    """ids [b l] -> (hidden states [b l d], the pooled one [b d]).

    Args:
      skip: how many of the last layers `hidden` leaves out ("clip skip" less one); 1: penultimate.
      normalize: whether `hidden` goes through the final norm. `pooled` always does, and is always
        of the last layer.
      extra_embeddings: [n d], rows that the ids vocab_size, vocab_size + 1, ... choose.
    """
    return self.text_model(
      ids, skip=skip, normalize=normalize, extra_embeddings=extra_embeddings
    )


class CLIPTextModelWithProjection(CLIPTextModel):
  """The text tower with its projection: the second text encoder of Stable Diffusion XL."""

  def __init__(
    self, config: CLIPTextProjectionConfig, *, dtype=jnp.float32, param_dtype=jnp.float32,
    rngs: nnx.Rngs,
  ):
    kw = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
    super().__init__(config, **kw)
    d = config.hidden_size
    self.text_projection = dense(d, config.projection_dim, d**-0.5, use_bias=False, **kw)

  def encode_text(self, ids: Tokens, **options) -> tuple[Text, jax.Array]:
    """As CLIPTextModel's, but the pooled state is projected: (hidden [b l d], pooled [b p])."""
    hidden, pooled = super().encode_text(ids, **options)
    return hidden, self.text_projection(pooled)
