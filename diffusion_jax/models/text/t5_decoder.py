"""T5 as it is trained: the encoder with its decoder (Raffel et al. 2020), named as in transformers.

Only training needs the decoder; what conditions a denoiser is the encoder alone.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from diffusion_jax.models.network import PLAIN, Blocks, Compute
from diffusion_jax.models.norms import RMSNorm
from diffusion_jax.models.text.t5 import (
  T5Attention,
  T5Config,
  T5EncoderModel,
  T5FeedForward,
  T5Layer,
  dense,
)
from diffusion_jax.types import Text, Tokens


class T5DecoderBlock(nnx.Module):
  """Causal attention, attention to the encoder, feed-forward, on a float32 residual stream."""

  def __init__(self, config: T5Config, *, has_bias: bool, **kw):
    layer = lambda name, module: T5Layer(name, module, config, **kw)
    self.layer = nnx.List([
      layer('SelfAttention', T5Attention(config, has_bias=has_bias, causal=True, **kw)),
      layer('EncDecAttention', T5Attention(config, has_bias=False, **kw)),
      layer('DenseReluDense', T5FeedForward(config, **kw)),
    ])

  def __call__(
    self, x: jax.Array, bias: jax.Array, causal: jax.Array, states: Text, mask: jax.Array | None
  ) -> jax.Array:
    """x [b t d], states [b l d] -> [b t d]."""
    x = x + self.layer[0](x, bias, causal).astype(jnp.float32)
    x = x + self.layer[1](x, None, mask, states).astype(jnp.float32)
    return x + self.layer[2](x)


class T5DecoderStack(Blocks):
  """The blocks and the final norm: [b t d] and the encoder's states [b l d] -> [b t d]."""

  def __init__(self, config: T5Config, **kw):
    super().__init__(**kw)
    self.block = nnx.List([
      T5DecoderBlock(config, has_bias=number == 0, **kw)
      for number in range(config.num_decoder_layers or config.num_layers)
    ])
    self.final_layer_norm = RMSNorm(config.d_model, config.layer_norm_epsilon, **kw)

  def __call__(self, x: jax.Array, states: Text, mask: jax.Array | None) -> jax.Array:
    return self.run_all(self._states, x, states, mask)

  def _states(self, x: jax.Array, states: Text, mask: jax.Array | None) -> jax.Array:
    length = x.shape[1]
    bias = self.block[0].layer[0].SelfAttention.position_bias(length)
    causal = jnp.tril(jnp.ones((length, length), bool))[None, None]
    for block in self.block:
      x = self.run(block, x, bias, causal, states, mask)
    return self.final_layer_norm(x)


class T5ForConditionalGeneration(T5EncoderModel):
  """Encoder and decoder: (ids [b l], mask [b l], decoder's ids [b t]) -> logits [b t vocabulary].

  T5 (feed_forward_proj 'relu') takes the table of tokens as its last layer, with its input scaled
  by 1/sqrt(d_model); T5 v1.1 has a layer of its own.
  """

  def __init__(self, config: T5Config, *, compute: Compute = PLAIN, rngs: nnx.Rngs):
    super().__init__(config, compute=compute, rngs=rngs)
    kw = dict(compute=compute, rngs=rngs)
    self.decoder = T5DecoderStack(config, **kw)
    last = dict(compute=dataclasses.replace(compute, dtype=jnp.float32), rngs=rngs)
    self.lm_head = None if config.feed_forward_proj == 'relu' else dense(
      config.d_model, config.vocab_size, config.d_model**-0.5, **last
    )

  def __call__(self, ids: Tokens, mask: jax.Array | None, previous: Tokens) -> jax.Array:
    """Return float32 logits of each next token; `previous` are the targets, moved by one."""
    states, _ = self.encode_text(ids, mask)
    seen = None if mask is None else (mask != 0)[:, None, None]
    x = self.decoder(self.shared(previous), states, seen)
    if self.lm_head is None:
      return x * self.config.d_model**-0.5 @ self.shared.embedding[...].T
    return self.lm_head(x)


def shifted(targets: Tokens, start: int) -> Tokens:
  """Return what the decoder has seen before each target: `start`, then the targets but the last."""
  return jnp.concatenate([jnp.full_like(targets[:, :1], start), targets[:, :-1]], axis=1)


def token_losses(
  model: T5ForConditionalGeneration, inputs: Tokens, mask: jax.Array, targets: Tokens, pad: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Return (cross-entropy in nats, whether it was the likeliest, whether it is no padding).

  Each float32 [b t], zero at the padding of the targets. The decoder begins with padding.
  """
  logits = model(inputs, mask, shifted(targets, pad))
  real = (targets != pad).astype(jnp.float32)
  loss = -jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1)[..., 0]
  return loss * real, (logits.argmax(-1) == targets) * real, real
