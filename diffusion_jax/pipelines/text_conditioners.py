"""Conditions on the text of a prompt, as one text encoder or several read it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.config import typed
from diffusion_jax.errors import UserError, require
from diffusion_jax.files import check_folder
from diffusion_jax.formats.networks import read_part, resolve
from diffusion_jax.limits import Length, Range
from diffusion_jax.models.network import Network
from diffusion_jax.models.text.tokenizer import Cut, Tokenize, add_placeholder, load_tokenizer
from diffusion_jax.pipelines.conditioners import Guided
from diffusion_jax.pipelines.options import WEIGHTED
from diffusion_jax.pipelines.weighted_text import Weighted, weigh, weighted_tokens
from diffusion_jax.types import TextShape, Weights

if TYPE_CHECKING:
  from transformers import PreTrainedTokenizerBase

ROLES = ('text_encoder', 'text_encoder_2', 'text_encoder_3', 'text_encoder_4')
"""The roles of the weights of text encoders, which are their folders, too."""
TEXT_KINDS = ('clip_text_projection', 'clip_text', 'clip', 't5')
EXTRA = 'extra.embedding'
"""The parameter of a text encoder that holds rows after its vocabulary (textual inversion)."""
WHERE = 'settings.conditioners.text'
ANY_LENGTH = 128
"""Tokens that an encoder reads of a prompt that has no limit, where nothing else is said."""
WIDTHS = ('cross_attention_dim', 'joint_attention_dim', 'caption_channels')
"""Fields of denoisers' configs that say the width of texts, for the error."""


def tokenizer_role(role: str) -> str:
  """Return the folder of the tokenizer of a text encoder."""
  return role.replace('text_encoder', 'tokenizer')


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
  """A text encoder in a section of a config.

  path: of a CLIP or a T5, or 'asset:NAME'. tokenizer: of its tokenizer, '' for the same. length:
  tokens of a prompt, 0 for CLIP's own, or ANY_LENGTH for T5. skip: layers of CLIP left out at the
  end. normalize: whether CLIP's final norm is applied.
  """

  path: str
  tokenizer: str = ''
  length: Annotated[int, Range(0, 4096)] = 0
  skip: Annotated[int, Range(0, 512)] = 0
  normalize: bool = True


Number = Annotated[int, Range(1, len(ROLES))]


@dataclasses.dataclass(frozen=True)
class TextConfig:
  """The section of a config; encoders are numbered from 1.

  join: of hidden states, 'width' for one text of all, 'length' for one after another with zeros up
  to the widest, or groups of numbers that are joined by width, which follow each other. pooled:
  the numbers of encoders whose pooled texts are joined, or whether all that have one are. mask:
  whether padding is left out of attention, None: T5's alone.
  """

  encoders: Annotated[tuple[EncoderConfig, ...], Length(1, len(ROLES))]
  join: Literal['width', 'length'] | tuple[tuple[Number, ...], ...] = 'length'
  pooled: bool | tuple[Number, ...] = False
  mask: bool | None = None

  @classmethod
  def of(cls, options: Mapping[str, Any]) -> TextConfig:
    """Return the config of a section, in which the keys of a single encoder may stand alone."""
    own = {field.name for field in dataclasses.fields(EncoderConfig)} & options.keys()
    require(
      not own or 'encoders' not in options,
      f'{WHERE} has {" and ".join(sorted(own))} beside encoders; say it in each of those.',
    )
    if own:
      rest = {key: value for key, value in options.items() if key not in own}
      options = rest | {'encoders': [{key: options[key] for key in own}]}
    return typed(cls, options, f'{WHERE}.')

  def roles(self, shapes: Mapping[str, TextShape]) -> tuple[tuple[tuple[str, ...], ...], ...]:
    """Return (the groups of `text`, (those that are pooled,)). UserError for numbers of none."""
    names = tuple(shapes)
    count = len(names)
    groups = {'width': (range(1, count + 1),), 'length': [(n,) for n in range(1, count + 1)]}
    groups = self.join if isinstance(self.join, tuple) else groups[self.join]
    pooled = self.pooled
    if isinstance(pooled, bool):
      pooled = [n for n, name in enumerate(names, 1) if self.pooled and shapes[name].pooled]
    used = [n for group in groups for n in group] + list(pooled)
    require(
      set(used) == set(range(1, count + 1)) and all(groups),
      f'{WHERE}.join and pooled use the encoders {sorted(set(used))}, but there are {count}; name '
      'each of them in one of both.',
    )
    for n in pooled:
      require(
        shapes[names[n - 1]].pooled is not None,
        f'{WHERE}.pooled names encoder {n}, a T5, which pools nothing; leave it out.',
      )
    return tuple(tuple(names[n - 1] for n in group) for group in groups), tuple(
      names[n - 1] for n in pooled
    )


@dataclasses.dataclass(frozen=True)
class Reader:
  """How an encoder reads prompts.

  length: tokens of a prompt, those of the frame included. skip: layers of CLIP left out at the end;
  0 is the last hidden state, 1 the one before (SDXL). normalize: whether CLIP's final norm is
  applied to the hidden states (not in SDXL). masked: whether neither the encoder nor the denoiser
  attends to padding. missing: the shape of the zeros in place of an encoder that is not there.
  lower: whether prompts are read in lower case, without spaces around them.
  """

  length: int
  tokenizer: PreTrainedTokenizerBase | None = None
  skip: int = 0
  normalize: bool = True
  masked: bool = False
  missing: TextShape | None = None
  lower: bool = False


class Read(NamedTuple):
  """What encoders give: text [b l d], pooled [b p] or None, mask [b l], 1 at no padding, or None.
  """

  text: jax.Array
  pooled: jax.Array | None = None
  mask: jax.Array | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class TextEncoders(Guided):
  """Prompts, as text towers of CLIP and encoders of T5 read them.

  Adds 'text' [b l d] and, where used, 'pooled' [b p] and 'mask' [b l]; the null is that of the
  empty prompt.

  Attributes:
    networks: by the role of their weights.
    readers: by role, also of encoders that are missing.
    text: groups of roles. Within a group hidden states are joined by width, shorter ones with zeros
      after them; groups follow each other, narrower ones with zeros up to the widest.
    pooled: roles of those whose pooled texts are joined by width.
    zero_null: whether the empty text is all zeros, as SDXL was trained.
    cut: counts the texts that were too long for the encoder that reads most.
  """

  networks: Mapping[str, Network] = dataclasses.field()  # The base's is no default.
  readers: Mapping[str, Reader]
  text: tuple[tuple[str, ...], ...]
  pooled: tuple[str, ...] = ()
  zero_null: bool = False
  cut: Cut = dataclasses.field(default_factory=Cut)
  fields: ClassVar = ('tokens',)
  paths: ClassVar = ('path', 'tokenizer')

  @classmethod
  def build(cls, options, context):
    """As `TextConfig` says, or with the keys of one encoder, such as `path` alone."""
    config = TextConfig.of(options)
    parts, readers = {}, {}
    for role, one in zip(ROLES, config.encoders, strict=False):
      check_folder(resolve(one.path))  # It is copied with what is trained, at the end.
      parts[role] = part = read_part(one.path).expect(TEXT_KINDS)
      readers[role] = _reader(one, part.config.text_shape, config.mask)
    text, pooled = config.roles({role: part.config.text_shape for role, part in parts.items()})
    networks = {role: part.network(dtype=context.dtype) for role, part in parts.items()}
    return cls(networks, readers, text, pooled), parts

  @classmethod
  def check_options(cls, options):
    TextConfig.of(options)

  @classmethod
  def moved(cls, name, options, move):
    if 'encoders' not in options:
      moved = {k: move(str(v), f'{name}_{k}') for k, v in options.items() if k in cls.paths and v}
      return {**options, **moved}
    encoders = []
    for role, one in zip(ROLES, options['encoders'], strict=False):
      one = {**one, 'path': move(str(one['path']), role)}
      if one.get('tokenizer'):
        one['tokenizer'] = move(str(one['tokenizer']), tokenizer_role(role))
      encoders.append(one)
    return {**options, 'encoders': encoders}

  def check(self, denoiser):
    wanted = getattr(denoiser, 'conditions', None)
    if wanted is None:
      return
    who = type(denoiser).__name__.removesuffix('Config')
    require('text' in wanted, f'this {who} reads no text; leave {WHERE} out.')
    width = wanted['text'][-1]
    field = next((n for n in WIDTHS if getattr(denoiser, n, None) == width), 'width of texts')
    require(
      width in (None, self.width),
      f'denoiser.{field} is {width}, but the text encoder gives texts of width {self.width}; set '
      f'it to {self.width}.',
    )
    require(
      ('pooled' in wanted) == bool(self.pooled),
      f'this {who} takes no pooled text; leave {WHERE}.pooled out.' if self.pooled else
      f'this {who} needs a pooled text; set {WHERE}.pooled to encoders that have one.',
    )
    if self.pooled:
      found, (width,) = sum(self.shape(role).pooled for role in self.pooled), wanted['pooled']
      require(
        width in (None, found),
        f'this {who} takes pooled texts of width {width}, but the text encoders give {found}; '
        'change one of them.',
      )

  def prompt(self, record):
    return record['captions'][0]

  @property
  def tokenizers(self) -> tuple[PreTrainedTokenizerBase, ...]:
    """Of the encoders that are there, in order; none of a model without weights."""
    found = (self.readers[role].tokenizer for role in self.networks)
    return tuple(tokenizer for tokenizer in found if tokenizer is not None)

  @property
  def towers(self) -> dict[str, Network]:
    """Those of CLIP, which may skip layers and learn words."""
    return {r: n for r, n in self.networks.items() if n.config.text_shape.pooled is not None}

  @property
  def masked(self) -> bool:
    """Whether some of the text may be padding that is left out."""
    return any(self.readers[role].masked for group in self.text for role in group)

  @property
  def kept(self) -> tuple[str, ...]:
    return ('text', *['pooled'] * bool(self.pooled), *['mask'] * self.masked)

  @property
  def length(self) -> int:
    """Tokens of a prompt, those of the frame included, of the encoder that reads most."""
    return max(self.readers[role].length for role in self.networks)

  @property
  def width(self) -> int:
    """d of the joined hidden states [b l d]."""
    return max(sum(self.shape(role).width for role in group) for group in self.text)

  def shape(self, role: str) -> TextShape:
    """Return the shape of the texts of an encoder, there or missing."""
    missing = self.readers[role].missing
    return self.networks[role].config.text_shape if missing is None else missing

  def tokens(self, prompts: Sequence[str], on_long: str = 'truncate') -> np.ndarray:
    """Prompts -> int32 [n e l], e encoders, those that read less filled up with zeros.

    With 'error' a prompt that does not fit those that read most is refused.
    """
    columns, cut = [], self.cut
    for role in self.networks:
      reader, most = self.readers[role], self.readers[role].length == self.length
      how, count = (on_long, cut) if most else ('truncate', _silent())
      cut = _silent() if most else cut  # Each text counts once.
      texts = [prompt.lower().strip() if reader.lower else prompt for prompt in prompts]
      ids = Tokenize(reader.tokenizer, reader.length, how, count).batch(texts)
      columns.append(np.pad(ids, ((0, 0), (0, self.length - reader.length))))
    return np.stack(columns, axis=1)

  def tokenize(self, prompt: str) -> np.ndarray:
    """One prompt -> int32 [e l]."""
    return self.tokens([prompt])[0]

  def add_word(self, token: str, counts: Mapping[str, int], after: Mapping[str, int]) -> None:
    """Teach tokenizers a word of `counts` rows by role, after the vocabulary and `after` rows.

    UserError for a word that a tokenizer has, or one that does not fit its encoder.
    """
    for role, network in self.towers.items():
      if role not in counts:
        continue
      known = embedding_table(network)[2] + after.get(role, 0)
      first = add_placeholder(self.readers[role].tokenizer, token, counts[role])[0]
      if first != known:
        raise UserError(
          f'the tokenizer gives {token} the id {first}, but the text encoder has {known} rows; use '
          'the tokenizer that came with it.'
        )

  def weighted(self, prompts: Sequence[str]) -> Weighted:
    """Prompts with weights -> tokens and weights [n e c l] of e encoders, in c chunks each.

    Only CLIP reads chunks: of a T5 all but the first are empty. UserError, see `weighted_tokens`.
    """
    columns = []
    for role in self.networks:
      tokenizer, length = self.readers[role].tokenizer, self.readers[role].length
      of = lambda prompts, role=role, one=tokenizer, length=length: weighted_tokens(
        one, prompts, length, role in self.towers, self.cut
      )
      columns.append((of(prompts), of([''])))
    count = max(found.tokens.shape[1] for found, _ in columns)
    columns = [found.padded(count, empty).widened(self.length) for found, empty in columns]
    return Weighted(*(np.stack(parts, axis=1) for parts in zip(*columns, strict=True)))

  def rows(self, request):
    if request.syntax == WEIGHTED:
      both = self.weighted([*request.prompts, request.negative])
      names = ('tokens', 'negative'), ('token_weights', 'negative_weights')
      return {
        name: part for (own, negative), all in zip(names, both, strict=True)
        for name, part in ((own, all[:-1]), (negative, np.broadcast_to(all[-1:], all[:-1].shape)))
      }
    tokens = self.tokens(request.prompts)
    negative = self.tokens([request.negative])
    return {'tokens': tokens, 'negative': np.broadcast_to(negative, tokens.shape)}

  def encode(self, weights, rows, clip_skip: int = 0):
    """'tokens' [b e l] -> float32 'text' [b l d] and, where used, 'pooled' [b p], 'mask' [b l].

    `clip_skip` leaves out more layers than `skip`; UserError where an encoder has not that many.
    With 'token_weights' [b e c l] there are 'tokens' [b e c l] of chunks, whose texts follow each
    other; pooled is the first.
    """
    tokens, found = rows['tokens'], {}
    for i, role in enumerate(self.networks):
      length = self.readers[role].length
      ids = tokens[:, i, ..., :length]
      if 'token_weights' in rows:
        factors = rows['token_weights'][:, i, ..., :length]
        found[role] = self._read_weighted(role, weights, ids, factors, clip_skip)
      else:
        found[role] = self._read(role, weights, ids, clip_skip)
    for role in self.readers.keys() - self.networks.keys():
      found[role] = self._missing(role, len(tokens))
    joined = _by_length([_by_width([found[role] for role in group]) for group in self.text])
    out = {'text': joined.text}
    if self.pooled:
      out['pooled'] = jnp.concatenate([found[role].pooled for role in self.pooled], axis=-1)
    if self.zero_null:
      end = self.tokenizers[0].eos_token_id
      empty = tokens[:, 0, ..., 1] == end  # Nothing between the frame tokens.
      empty = empty.reshape(len(tokens), -1).all(axis=1)
      spread = lambda x: empty.reshape(-1, *[1] * (x.ndim - 1))
      out = jax.tree.map(lambda x: jnp.where(spread(x), 0, x), out)
    return out if joined.mask is None else out | {'mask': joined.mask}

  def _read(self, role: str, weights: Weights, ids: jax.Array, clip_skip: int) -> Read:
    reader, params = self.readers[role], dict(weights[role])
    extra = params.pop(EXTRA, None)
    network = self.networks[role].bind(params)
    mask = _text_mask(ids, reader.tokenizer) if reader.masked else None
    if role in self.towers:  # Causal: what stands before padding does not depend on it.
      text, pooled = network.encode_text(
        ids, skip=reader.skip + clip_skip, normalize=reader.normalize, extra_embeddings=extra
      )
      return Read(text.astype(jnp.float32), pooled.astype(jnp.float32), mask)
    return Read(network.encode_text(ids, mask)[0].astype(jnp.float32), None, mask)

  def _read_weighted(
    self, role: str, weights: Weights, ids: jax.Array, factors: jax.Array, clip_skip: int
  ) -> Read:
    """Read chunks [b c l], each by itself; T5 reads the first alone."""
    count = slice(None if role in self.towers else 1)
    ids, factors = ids[:, count], factors[:, count]
    b, c, length = ids.shape
    read = self._read(role, weights, ids.reshape(b * c, length), clip_skip)
    text = weigh(read.text, factors.reshape(b * c, length))
    joined = lambda x: None if x is None else x.reshape(b, c * length, *x.shape[2:])
    pooled = None if read.pooled is None else read.pooled.reshape(b, c, -1)[:, 0]
    return Read(joined(text), pooled, joined(read.mask))

  def _missing(self, role: str, count: int) -> Read:
    reader, (width, pooled, _) = self.readers[role], self.readers[role].missing
    mask = jnp.zeros((count, reader.length), jnp.int32) if reader.masked else None
    return Read(
      jnp.zeros((count, reader.length, width)),
      None if pooled is None else jnp.zeros((count, pooled)), mask,
    )

  def null(self, weights):
    # The tokens as an argument: as a constant XLA would compute with them in another order.
    out = jax.jit(self.encode)(weights, {'tokens': self.tokens([''])})
    return {name: value[0] for name, value in out.items()}

  def pair(self, weights, rows, clip_skip=0):
    """As in diffusers, clip_skip is of the condition alone."""
    sides = (
      {name: rows[of] for name, of in zip(('tokens', 'token_weights'), names, strict=True)
       if of in rows}
      for names in (('tokens', 'token_weights'), ('negative', 'negative_weights'))
    )
    told, negative = sides
    if clip_skip:
      return self.encode(weights, told, clip_skip), self.encode(weights, negative)
    both = self.encode(weights, {
      name: jnp.concatenate([told[name], negative[name]]) for name in told
    })
    n = len(rows['tokens'])
    return tuple(jax.tree.map(lambda a, s=s: a[s : s + n], both) for s in (0, n))

  def same(self, rows):
    pairs = (('tokens', 'negative'), ('token_weights', 'negative_weights'))
    return all(bool((rows[a] == rows[b]).all()) for a, b in pairs if a in rows)


def _reader(one: EncoderConfig, shape: TextShape, mask: bool | None) -> Reader:
  """Return how an encoder of a config, whose texts have this shape, reads; with its tokenizer."""
  length = one.length or shape.length or ANY_LENGTH
  require(
    shape.length is None or length <= shape.length,
    f'{WHERE}.encoders: length of {one.path} is {length}, but it reads {shape.length} tokens; make '
    'it no more.',
  )
  is_t5 = shape.pooled is None
  require(
    not (is_t5 and (one.skip or not one.normalize)),
    f'{WHERE}.encoders: {one.path} is a T5, whose last hidden state is read; leave skip at 0 and '
    'normalize true.',
  )
  tokenizer = load_tokenizer(resolve(one.tokenizer or one.path))
  masked = is_t5 if mask is None else mask
  return Reader(length, tokenizer, one.skip, one.normalize, masked)


def _silent() -> Cut:
  return Cut(lambda _: None)


def _text_mask(ids: jax.Array, tokenizer: PreTrainedTokenizerBase) -> jax.Array:
  """Return int32 [b l], 1 up to the token that ends each text; padding comes after it."""
  pad, end = tokenizer.pad_token_id, tokenizer.eos_token_id
  pad = end if pad is None else pad
  seen = jnp.cumsum((ids != pad)[:, ::-1], axis=1)[:, ::-1] > 0
  if pad == end:  # Then the first of them is no padding.
    seen = jnp.pad(seen, ((0, 0), (1, 0)), constant_values=True)[:, :-1]
  return seen.astype(jnp.int32)


def _filled(x: jax.Array, axis: int, size: int) -> jax.Array:
  """Return x with zeros at the end of an axis, up to this size."""
  missing = [(0, size - x.shape[axis] if i == axis else 0) for i in range(x.ndim)]
  return jnp.pad(x, missing) if size != x.shape[axis] else x


def _masks(parts: Sequence[Read]) -> list[jax.Array] | None:
  """Return the mask of each, 1 everywhere where there is none; None where none has one."""
  if all(part.mask is None for part in parts):
    return None
  whole = lambda text: jnp.ones(text.shape[:2], jnp.int32)
  return [whole(part.text) if part.mask is None else part.mask for part in parts]


def _by_width(parts: Sequence[Read]) -> Read:
  """Join texts token by token; one of them that is no padding is enough."""
  length = max(part.text.shape[1] for part in parts)
  texts, masks = [_filled(part.text, 1, length) for part in parts], _masks(parts)
  mask = None if masks is None else jnp.stack([_filled(m, 1, length) for m in masks]).max(axis=0)
  return Read(jnp.concatenate(texts, axis=-1), mask=mask)


def _by_length(parts: Sequence[Read]) -> Read:
  """Let texts follow each other."""
  width = max(part.text.shape[2] for part in parts)
  texts, masks = [_filled(part.text, 2, width) for part in parts], _masks(parts)
  mask = None if masks is None else jnp.concatenate(masks, axis=1)
  return Read(jnp.concatenate(texts, axis=1), mask=mask)


def embedding_table(network: Network) -> tuple[str, int, int]:
  """Return (parameter, width, rows) of a text tower's table of tokens."""
  name = next(n for n in network.shapes if n.endswith('token_embedding.embedding'))
  rows, width = network.shapes[name].shape
  return name, width, rows
