"""What a denoiser is conditioned on: text by one encoder or several, or a picture in its place."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.errors import UserError
from diffusion_jax.models.network import Network
from diffusion_jax.models.text.tokenizer import Cut, Tokenize, add_placeholder
from diffusion_jax.types import Condition, Text, Weights

if TYPE_CHECKING:
  from transformers import PreTrainedTokenizerBase

ROLES = ('text_encoder', 'text_encoder_2')
EXTRA = 'extra.embedding'
"""The parameter of a text encoder that holds rows after its vocabulary (textual inversion)."""


@dataclasses.dataclass(frozen=True, eq=False)
class TextEncoders:
  """Text towers of CLIP, without weights, by role; their hidden states are joined by width.

  Attributes:
    tokenizers: one for each network, in the same order.
    skip: layers left out at the end; 0 is the last hidden state, 1 the one before (SDXL).
    normalize: whether the final norm is applied to the hidden states (not in SDXL).
    pooled: whether the model is told the pooled text of the last encoder, too.
    zero_null: whether the empty text is all zeros, as SDXL was trained.
    cut: counts the texts that were too long for the first of the tokenizers.
  """

  networks: dict[str, Network]
  tokenizers: tuple[PreTrainedTokenizerBase, ...]
  skip: int = 0
  normalize: bool = True
  pooled: bool = False
  zero_null: bool = False
  cut: Cut = dataclasses.field(default_factory=Cut)

  def replaced(self, networks: dict[str, Network]) -> 'TextEncoders':
    """The same with other networks."""
    return dataclasses.replace(self, networks=networks)

  @property
  def length(self) -> int:
    """Tokens of a prompt, both frame tokens included."""
    return min(_text_config(n.config).max_position_embeddings for n in self.networks.values())

  @property
  def width(self) -> int:
    """d of the joined hidden states [b l d]."""
    return sum(_text_config(n.config).hidden_size for n in self.networks.values())

  def tokens(self, prompts: Sequence[str], on_long: str = 'truncate') -> np.ndarray:
    """Prompts -> int32 [n e l], e encoders. With 'error' a prompt that does not fit is refused."""
    told = (self.cut, *(Cut(lambda _: None) for _ in self.tokenizers[1:]))
    columns = [
      Tokenize(tokenizer, self.length, on_long, cut).batch(list(prompts))
      for tokenizer, cut in zip(self.tokenizers, told, strict=True)
    ]
    return np.stack(columns, axis=1)

  def tokenize(self, prompt: str) -> np.ndarray:
    """One prompt -> int32 [e l]."""
    return self.tokens([prompt])[0]

  def add_word(self, token: str, counts: Mapping[str, int], after: Mapping[str, int]) -> None:
    """Teaches tokenizers a word of `counts` rows by role, after the vocabulary and `after` rows.

    UserError for a word that a tokenizer has, or one that does not fit its encoder.
    """
    for (role, network), tokenizer in zip(self.networks.items(), self.tokenizers, strict=True):
      if role not in counts:
        continue
      known = embedding_table(network)[2] + after.get(role, 0)
      first = add_placeholder(tokenizer, token, counts[role])[0]
      if first != known:
        raise UserError(
          f'the tokenizer gives {token} the id {first}, but the text encoder has {known} rows; use '
          'the tokenizer that came with it.'
        )

  def encode(self, weights: Weights, tokens: jax.Array, clip_skip: int = 0) -> Condition:
    """Tokens [b e l] -> a condition with float32 text [b l d] and, where used, pooled [b p].

    `clip_skip` leaves out more layers than `skip`; UserError where an encoder has not that many.
    """
    parts, pooled = [], None
    for i, (role, network) in enumerate(self.networks.items()):
      params = dict(weights[role])
      extra = params.pop(EXTRA, None)
      hidden, pooled = network.bind(params).encode_text(
        tokens[:, i], skip=self.skip + clip_skip, normalize=self.normalize, extra_embeddings=extra
      )
      parts.append(hidden)
    text = jnp.concatenate(parts, axis=-1).astype(jnp.float32)
    pooled = pooled.astype(jnp.float32) if self.pooled else None
    condition = Condition(text, pooled)
    return _zeroed(condition, self._empty(tokens)) if self.zero_null else condition

  def _empty(self, tokens: jax.Array) -> jax.Array:
    """[b]: whether a text has nothing between its two frame tokens."""
    return tokens[:, 0, 1] == self.tokenizers[0].eos_token_id


def _zeroed(condition: Condition, where: jax.Array) -> Condition:
  zero = lambda x: jnp.where(where.reshape(-1, *[1] * (x.ndim - 1)), 0, x)
  return jax.tree.map(zero, condition)


def embedding_table(network: Network) -> tuple[str, int, int]:
  """(parameter, width, rows) of a text tower's table of tokens."""
  name = next(n for n in network.shapes if n.endswith('token_embedding.embedding'))
  rows, width = network.shapes[name].shape
  return name, width, rows


def _text_config(config):
  """The text tower's config, of a whole CLIP or of the tower alone."""
  return getattr(config, 'text_config', config)


ROLE = 'image_encoder'
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""Of the pixels in [0, 1] that CLIP was trained on (Radford et al. 2021)."""


@dataclasses.dataclass(frozen=True, eq=False)
class ImageEncoder:
  """CLIP's vision tower with its projection, without weights, where others have text encoders.

  Prompts say nothing to such a model: it is told a picture (`conditions.Inputs.reference`), and,
  where guidance asks for what it draws without one, zeros.

  Attributes:
    mean, std: of each channel of the pixels in [0, 1]; the tower sees (pixel - mean) / std.
  """

  network: Network
  mean: tuple[float, ...] = MEAN
  std: tuple[float, ...] = STD
  tokenizers: tuple = ()

  def replaced(self, networks: dict[str, Network]) -> 'ImageEncoder':
    """The same with another network."""
    return dataclasses.replace(self, network=networks[ROLE])

  @property
  def networks(self) -> dict[str, Network]:
    """By role."""
    return {ROLE: self.network}

  @property
  def size(self) -> int:
    """Edge of the pictures that it sees, in pixels."""
    return self.network.config.image_size

  @property
  def width(self) -> int:
    """d of what it says, [b 1 d]."""
    return self.network.config.projection_dim

  def tokens(self, prompts: Sequence[str], on_long: str = 'truncate') -> np.ndarray:
    """int32 [n 0 0]: no prompt says anything."""
    del on_long
    return np.zeros((len(prompts), 0, 0), np.int32)

  def encode(self, weights: Weights, tokens: jax.Array, clip_skip: int = 0) -> Condition:
    """What the model is told where there is no picture: zeros [b 1 d]."""
    del weights
    if clip_skip:
      raise UserError('the model has no text encoder; leave clip_skip at 0.')
    return Condition(jnp.zeros((len(tokens), 1, self.width), jnp.float32))

  def see(self, weights: Weights, images: jax.Array) -> Text:
    """Images uint8 [b s s 3] -> float32 [b 1 d]."""
    pixels = (images / jnp.float32(255) - jnp.asarray(self.mean)) / jnp.asarray(self.std)
    seen = self.network.bind(weights[ROLE]).encode_image(pixels.astype(jnp.float32))
    return seen.astype(jnp.float32)[:, None]


WHOLE = 0.25
"""Share of masks that cover everything, with which Stable Diffusion's inpainting was trained."""


def random_masks(key: jax.Array, shape: tuple[int, int, int], count: int = 4) -> jax.Array:
  """Unions of up to `count` random rectangles, bool [b h w], true where to paint; pure.

  A rectangle has edges of 1/8 to 5/8 of the picture's; WHOLE of the masks are true everywhere.
  """
  b, h, w = shape
  keys = jax.random.split(key, 4)
  size = jax.random.uniform(keys[0], (2, b, count), minval=1 / 8, maxval=5 / 8)
  start = jax.random.uniform(keys[1], (2, b, count)) * (1 - size)
  used = jnp.arange(count) < jax.random.randint(keys[2], (b, 1), 1, count + 1)

  def inside(axis: int, edge: int) -> jax.Array:
    place = (jnp.arange(edge) + 0.5) / edge
    low, high = start[axis][..., None], (start + size)[axis][..., None]
    return (place >= low) & (place < high)

  rectangles = inside(0, h)[..., :, None] & inside(1, w)[..., None, :]
  some = (rectangles & used[..., None, None]).any(axis=1)
  return some | jax.random.bernoulli(keys[3], WHOLE, (b, 1, 1))
