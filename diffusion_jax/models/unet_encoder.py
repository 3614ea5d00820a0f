"""From the latents to the mid block: the half that a U-Net and its ControlNets share."""

import jax
import jax.numpy as jnp
from flax import nnx

from diffusion_jax.models.checks import require, size_fits
from diffusion_jax.models.embeddings import TimestepEmbedding, timestep_embedding
from diffusion_jax.models.layers import Conv
from diffusion_jax.models.remat import Blocks
from diffusion_jax.models.unet_blocks import DownBlock, MidBlock
from diffusion_jax.models.unet_config import EncoderConfig


class Encoder(Blocks):
  """Input convolution, embeddings of time and other conditions, down blocks and mid block.

  A subclass adds what it makes of the results; its submodules stand beside these, as in the
  published files.
  """

  def __init__(self, config: EncoderConfig, **kw):
    width, features = config.block_out_channels[0], config.time_features
    self.config = config
    self.conv_in = Conv(config.in_channels, width, **kw)
    self.time_embedding = TimestepEmbedding(width, features, **kw)
    projected = config.projection_class_embeddings_input_dim
    if config.class_embed_type is not None:
      inputs = width if config.class_embed_type == 'timestep' else projected
      self.class_embedding = TimestepEmbedding(inputs, features, **kw)
    elif config.num_class_embeds is not None:
      init = nnx.initializers.normal(1.0)  # PyTorch's default, as for every layer here.
      self.class_embedding = nnx.Embed(
        config.num_class_embeds, features, embedding_init=init, **kw
      )
    if config.addition_embed_type == 'text_time':
      self.add_embedding = TimestepEmbedding(projected, features, **kw)
    levels = range(len(config.block_out_channels))
    self.down_blocks = nnx.List([DownBlock(config, level, **kw) for level in levels])
    self.mid_block = None if config.mid_block_type is None else MidBlock(config, **kw)

  def embed(
    self, t: jax.Array, pooled: jax.Array | None, sizes: jax.Array | None,
    labels: jax.Array | None,
  ) -> jax.Array:
    """The sum of the embeddings of the time and of all other conditions: [b e]."""
    config, width = self.config, self.config.block_out_channels[0]
    time = self.time_embedding(self._sinusoids(t, width))
    if labels is not None:
      timed = config.class_embed_type == 'timestep'
      time = time + self.class_embedding(self._sinusoids(labels, width) if timed else labels)
    if sizes is not None:
      each = self._sinusoids(sizes.reshape(-1), config.addition_time_embed_dim)
      each = each.reshape(len(sizes), -1)
      time = time + self.add_embedding(jnp.concatenate([pooled.astype(each.dtype), each], -1))
    return time

  def descend(
    self, x: jax.Array, time: jax.Array, text: jax.Array
  ) -> tuple[jax.Array, list[jax.Array]]:
    """Features [b h w c] -> the mid block's result and every skip on the way, x first."""
    skips = [x]
    for block in self.down_blocks:
      x, more = block(x, time, text)
      skips += more
    return x if self.mid_block is None else self.mid_block(x, time, text), skips

  def _sinusoids(self, t: jax.Array, features: int) -> jax.Array:
    return timestep_embedding(
      t, features, flip_sin_to_cos=self.config.flip_sin_to_cos, freq_shift=self.config.freq_shift
    )

  def check(self, x: jax.Array, t: jax.Array, text: jax.Array, **conditions) -> None:
    """UserError unless every input has the shape that the config asks for."""
    size_fits(x.shape, self.config.in_channels, self.config.factor, 'The latents')
    b, width = len(x), self.config.cross_attention_dim
    require(
      text.ndim == 3 and text.shape[0] == b and text.shape[-1] == width,
      f'The text must have shape [{b} l {width}] (cross_attention_dim), not {list(text.shape)}.',
    )
    require(t.shape == (b,), f'The times must have shape [{b}], not {list(t.shape)}.')
    self._check_presence(conditions)
    if conditions['labels'] is not None:
      self._check_labels(b, conditions['labels'])
    if conditions['sizes'] is not None:
      self._check_sizes(b, conditions['pooled'], conditions['sizes'])

  def _check_presence(self, conditions: dict[str, jax.Array | None]) -> None:
    who, needed = type(self).__name__, self.config.conditions
    why = {'labels': 'class_embed_type or num_class_embeds'}
    for name, value in conditions.items():
      keys = why.get(name, 'addition_embed_type')
      require(
        value is not None or name not in needed,
        f'This {who} needs `{name}`, because its config has {keys}; pass it.',
      )
      require(
        value is None or name in needed,
        f'This {who} takes no `{name}`, because its config has no {keys}; leave it out.',
      )

  def _check_labels(self, b: int, labels: jax.Array) -> None:
    config = self.config
    projected = config.class_embed_type == 'projection'
    wanted = (b, config.projection_class_embeddings_input_dim) if projected else (b,)
    require(
      labels.shape == wanted,
      f'`labels` must have shape {list(wanted)}, not {list(labels.shape)}.',
    )
    require(
      config.class_embed_type is not None or jnp.issubdtype(labels.dtype, jnp.integer),
      f'`labels` must be whole numbers in [0, {config.num_class_embeds}), not {labels.dtype}.',
    )

  def _check_sizes(self, b: int, pooled: jax.Array, sizes: jax.Array) -> None:
    config = self.config
    total, each = config.projection_class_embeddings_input_dim, config.addition_time_embed_dim
    require(
      pooled.ndim == sizes.ndim == 2 and len(pooled) == len(sizes) == b
      and pooled.shape[1] + each * sizes.shape[1] == total,
      f'`pooled` [{b} p] and `sizes` [{b} n] must have p + {each} n = {total} '
      '(projection_class_embeddings_input_dim), but their shapes are '
      f'{list(pooled.shape)} and {list(sizes.shape)}.',
    )
