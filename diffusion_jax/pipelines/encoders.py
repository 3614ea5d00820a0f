"""Prompts, or a picture in their place, as text and image encoders read them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.errors import UserError
from diffusion_jax.files import check_folder
from diffusion_jax.formats.networks import read_part, resolve
from diffusion_jax.models.network import Network
from diffusion_jax.models.text.tokenizer import Cut, Tokenize, add_placeholder, load_tokenizer
from diffusion_jax.pipelines.conditioners import Arrays, Conditioner
from diffusion_jax.types import Text, Weights

if TYPE_CHECKING:
  from transformers import PreTrainedTokenizerBase

ROLES = ('text_encoder', 'text_encoder_2')
TEXT_KINDS = ('clip_text_projection', 'clip_text', 'clip')
EXTRA = 'extra.embedding'
"""The parameter of a text encoder that holds rows after its vocabulary (textual inversion)."""
IMAGE_ENCODER = 'image_encoder'
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""Of the pixels in [0, 1] that CLIP was trained on (Radford et al. 2021)."""


@dataclasses.dataclass(frozen=True, eq=False)
class TextEncoders(Conditioner):
  """Prompts, by one text tower of CLIP or several, whose hidden states are joined by width.

  Adds 'text' [b l d] and, where used, 'pooled' [b p]; the null is that of the empty prompt.

  Attributes:
    encoders: by the role of their weights.
    tokenizers: one for each of them, in the same order.
    skip: layers left out at the end; 0 is the last hidden state, 1 the one before (SDXL).
    normalize: whether the final norm is applied to the hidden states (not in SDXL).
    pooled: whether the model is told the pooled text of the last encoder, too.
    zero_null: whether the empty text is all zeros, as SDXL was trained.
    cut: counts the texts that were too long for the first of the tokenizers.
  """

  encoders: dict[str, Network]
  tokenizers: tuple[PreTrainedTokenizerBase, ...]
  skip: int = 0
  normalize: bool = True
  pooled: bool = False
  zero_null: bool = False
  cut: Cut = dataclasses.field(default_factory=Cut)
  fields: ClassVar = ('tokens',)
  guided: ClassVar = True
  paths: ClassVar = ('path',)

  @classmethod
  def build(cls, options, context):
    """`path`: of a CLIP with its tokenizer, or 'asset:NAME'."""
    if set(options) != {'path'}:
      raise UserError('settings.conditioners.text takes path, the directory of a CLIP, alone.')
    folder = resolve(options['path'])
    check_folder(folder)  # It is copied beside what is trained, at the end.
    part = read_part(options['path']).expect(TEXT_KINDS)
    text = cls({ROLES[0]: part.network(dtype=context.dtype)}, (load_tokenizer(folder),))
    return text, {ROLES[0]: part}

  def prompt(self, record):
    return record['captions'][0]

  def replaced(self, networks):
    own = {role: networks.get(role, network) for role, network in self.encoders.items()}
    return dataclasses.replace(self, encoders=own)

  @property
  def networks(self) -> dict[str, Network]:
    return self.encoders

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

  def rows(self, request):
    tokens = self.tokens(request.prompts)
    negative = self.tokens([request.negative])
    return {'tokens': tokens, 'negative': np.broadcast_to(negative, tokens.shape)}

  def encode(self, weights, rows, clip_skip: int = 0):
    """'tokens' [b e l] -> float32 'text' [b l d] and, where used, 'pooled' [b p].

    `clip_skip` leaves out more layers than `skip`; UserError where an encoder has not that many.
    """
    parts, pooled, tokens = [], None, rows['tokens']
    for i, (role, network) in enumerate(self.networks.items()):
      params = dict(weights[role])
      extra = params.pop(EXTRA, None)
      hidden, pooled = network.bind(params).encode_text(
        tokens[:, i], skip=self.skip + clip_skip, normalize=self.normalize, extra_embeddings=extra
      )
      parts.append(hidden)
    told = {'text': jnp.concatenate(parts, axis=-1).astype(jnp.float32)}
    if self.pooled:
      told['pooled'] = pooled.astype(jnp.float32)
    return _zeroed(told, self._empty(tokens)) if self.zero_null else told

  def null(self, weights):
    # The tokens as an argument: as a constant XLA would compute with them in another order.
    told = jax.jit(self.encode)(weights, {'tokens': self.tokens([''])})
    return {name: value[0] for name, value in told.items()}

  def pair(self, weights, rows, clip_skip=0):
    """As in diffusers, clip_skip is of what is wanted alone."""
    tokens, negative = rows['tokens'], rows['negative']
    if clip_skip:
      return (
        self.encode(weights, rows, clip_skip), self.encode(weights, {'tokens': negative})
      )
    both = self.encode(weights, {'tokens': jnp.concatenate([tokens, negative])})
    n = len(tokens)
    return tuple(jax.tree.map(lambda a, s=s: a[s : s + n], both) for s in (0, n))

  def cached(self):
    return ('text', 'pooled') if self.pooled else ('text',)

  def same(self, rows):
    return bool((rows['tokens'] == rows['negative']).all())

  def _empty(self, tokens: jax.Array) -> jax.Array:
    """[b]: whether a text has nothing between its two frame tokens."""
    return tokens[:, 0, 1] == self.tokenizers[0].eos_token_id


def _zeroed(told: Arrays, where: jax.Array) -> Arrays:
  zero = lambda x: jnp.where(where.reshape(-1, *[1] * (x.ndim - 1)), 0, x)
  return jax.tree.map(zero, told)


def embedding_table(network: Network) -> tuple[str, int, int]:
  """(parameter, width, rows) of a text tower's table of tokens."""
  name = next(n for n in network.shapes if n.endswith('token_embedding.embedding'))
  rows, width = network.shapes[name].shape
  return name, width, rows


def _text_config(config):
  """The text tower's config, of a whole CLIP or of the tower alone."""
  return getattr(config, 'text_config', config)


@dataclasses.dataclass(frozen=True, eq=False)
class ImageEncoder(Conditioner):
  """A picture as CLIP's vision tower sees it, where others have a text: for variations of it.

  Adds 'text' [b 1 d]; the null is zeros. Prompts say nothing to such a model.

  Attributes:
    mean, std: of each channel of the pixels in [0, 1]; the tower sees (pixel - mean) / std.
  """

  network: Network
  mean: tuple[float, ...] = MEAN
  std: tuple[float, ...] = STD
  fields: ClassVar = ('reference',)
  guided: ClassVar = True

  def replaced(self, networks):
    return dataclasses.replace(self, network=networks.get(IMAGE_ENCODER, self.network))

  @property
  def networks(self) -> dict[str, Network]:
    return {IMAGE_ENCODER: self.network}

  @property
  def size(self) -> int:
    """Edge of the pictures that it sees, in pixels."""
    return self.network.config.image_size

  @property
  def width(self) -> int:
    """d of what it says, [b 1 d]."""
    return self.network.config.projection_dim

  def pictures(self, space, height, width):
    return {'reference': ((self.size, self.size, 3), np.uint8)}

  def encode(self, weights, rows):
    """'reference' uint8 [b s s 3] -> float32 'text' [b 1 d]."""
    return {'text': self.see(weights, rows['reference'])}

  def see(self, weights: Weights, images: jax.Array) -> Text:
    """Images uint8 [b s s 3] -> float32 [b 1 d]."""
    pixels = (images / jnp.float32(255) - jnp.asarray(self.mean)) / jnp.asarray(self.std)
    seen = self.network.bind(weights[IMAGE_ENCODER]).encode_image(pixels.astype(jnp.float32))
    return seen.astype(jnp.float32)[:, None]

  def null(self, weights):
    del weights
    return {'text': jnp.zeros((1, self.width), jnp.float32)}
