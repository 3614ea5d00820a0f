"""Conditions of a denoiser, one class for each kind; here those that read the prompt.

A conditioner names its fields of `types.Condition` and its inputs: fields of a batch in training,
prompts and images in sampling. It holds networks without weights. New ones subclass `Conditioner`
or `Guided`, with a row in `registry.CONDITIONERS`.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.errors import UserError
from diffusion_jax.files import check_folder
from diffusion_jax.formats.networks import Part, read_part, resolve
from diffusion_jax.models.network import Network
from diffusion_jax.models.text.tokenizer import Cut, Tokenize, add_placeholder, load_tokenizer
from diffusion_jax.types import Condition, Weights

if TYPE_CHECKING:
  from transformers import PreTrainedTokenizerBase

  from diffusion_jax.pipelines.spaces import Space

Arrays = dict[str, jax.Array]
Spec = tuple[tuple[int, ...], type]
"""Shape without the leading [n], and type, of an image."""

ROLES = ('text_encoder', 'text_encoder_2')
TEXT_KINDS = ('clip_text_projection', 'clip_text', 'clip')
EXTRA = 'extra.embedding'
"""The parameter of a text encoder that holds rows after its vocabulary (textual inversion)."""


class Request(NamedTuple):
  """A request to sample: prompts, a negative prompt, `image_conditioners.Inputs`, and the size."""

  prompts: Sequence[str]
  negative: str = ''
  inputs: Any = None
  height: int = 1
  width: int = 1


class Context(NamedTuple):
  """Context for building a conditioner: space, training source, dtype."""

  space: Space
  train: Any = None
  dtype: Any = jnp.float32


class Conditioner(abc.ABC):
  """One thing that a denoiser is conditioned on. Rows are arrays [n ...] by name."""

  fields: ClassVar[tuple[str, ...]] = ()
  """Fields of a batch that `of_batch` reads; () for what no data set has."""
  kept: ClassVar[tuple[str, ...]] = ()
  """Fields of its condition that a cache keeps; () where they do not follow from a prompt alone."""
  paths: ClassVar[tuple[str, ...]] = ()
  """Options that are directories, or 'asset:NAME'."""
  about: ClassVar[str] = ''
  """A sentence on previews with what `examples` makes."""
  random: ClassVar[bool] = False
  """True if `of_batch` needs its key."""
  channels: ClassVar[int] = 0
  """Channels that it adds to the denoiser's input."""
  networks: Mapping[str, Network] = MappingProxyType({})
  """By the role of their weights; a field of those that have any."""

  @classmethod
  def build(
    cls, options: Mapping[str, Any], context: Context
  ) -> tuple[Conditioner, dict[str, Part]]:
    """Return the conditioner of a section of a config, and its frozen parts by role."""
    del context
    try:
      return cls(**options), {}
    except TypeError as error:
      raise UserError(f'{cls.__name__} cannot be made of its section: {error}.') from error

  def options(self) -> dict[str, Any]:
    """Return what `build` needs, with the section of the config, where there is no data set."""
    return {}

  def check(self, denoiser: Any) -> None:
    """Raise UserError where the denoiser with this config is not made for it."""
    del denoiser

  def prompt(self, record: Mapping[str, Any]) -> str | None:
    """Return the prompt for which a model should sample a record; None where there is none."""
    del record
    return None

  def replaced(self, networks: Mapping[str, Network]) -> Conditioner:
    """Return the same with other networks, by role."""
    own = {role: networks.get(role, network) for role, network in self.networks.items()}
    return dataclasses.replace(self, networks=own) if own else self

  def inputs(self, height: int, width: int) -> dict[str, Spec]:
    """Return the fields of `Inputs` that it must be given for images of height x width pixels."""
    del height, width
    return {}

  def examples(self, images: np.ndarray) -> dict[str, np.ndarray]:
    """Return fields of `Inputs` for previews, made of images uint8 [n h w 3] of the data."""
    del images
    return {}

  def rows(self, request: Request) -> dict[str, np.ndarray]:
    """Return host arrays [n ...] that `encode` and `pair` take, with those of `Inputs`."""
    del request
    return {}

  @abc.abstractmethod
  def encode(self, weights: Weights, rows: Mapping[str, jax.Array]) -> Arrays:
    """Return the fields of `Condition`, [n ...], of rows; pure."""

  def of_prompts(self, weights: Weights, prompts: Sequence[str]) -> Arrays:
    """Return the condition [n ...] of prompts alone, for a cache of what is `kept`."""
    return self.encode(weights, self.rows(Request(prompts)))

  def pair(
    self, weights: Weights, rows: Mapping[str, jax.Array], clip_skip: int = 0
  ) -> tuple[Arrays, Arrays]:
    """Return (the condition, the one that guidance leads away from); pure."""
    del clip_skip
    condition = self.encode(weights, rows)
    return condition, condition

  def of_batch(
    self, weights: Weights, batch: Mapping[str, jax.Array], key: jax.Array | None = None
  ) -> Arrays:
    """Return the condition of a batch in training; pure."""
    del key
    return self.encode(weights, batch)

  def same(self, rows: Mapping[str, np.ndarray]) -> bool:
    """Return whether both of `pair` are alike, so that guidance changes nothing."""
    del rows
    return True

  def at_step(
    self, weights: Weights, x: jax.Array, t: jax.Array, condition: Condition
  ) -> dict[str, Any]:
    """Return further arguments of the denoiser, by name, which depend on x and t; pure."""
    del weights, x, t, condition
    return {}


class Guided(Conditioner):
  """A conditioner with a null, which guidance leads away from and training puts in now and then."""

  @abc.abstractmethod
  def null(self, weights: Weights) -> Arrays:
    """Return the condition of nothing, without [n]."""

  def pair(self, weights, rows, clip_skip=0):
    condition, null = self.encode(weights, rows), self.null(weights)
    spread = lambda value, name: jnp.broadcast_to(null[name].astype(value.dtype), value.shape)
    return condition, {name: spread(value, name) for name, value in condition.items()}

  def same(self, rows):
    return False


def part_of(options: Mapping[str, Any], name: str, kinds: Sequence[str]) -> Part:
  """Return the network that `path` names, the only option of a conditioner called `name`."""
  if set(options) != {'path'}:
    raise UserError(f'settings.conditioners.{name} takes path alone, the directory of its network.')
  check_folder(resolve(options['path']))  # It is copied with what is trained, at the end.
  return read_part(options['path']).expect(kinds)


@dataclasses.dataclass(frozen=True)
class ClassLabel(Guided):
  """A class by its name or number in the prompt; the empty prompt is no class.

  Adds 'labels' [b], int32 places in `classes`; the null is their number.
  """

  classes: tuple[str, ...]
  fields: ClassVar = ('label',)
  kept: ClassVar = ('labels',)

  @classmethod
  def build(cls, options, context):
    """`classes`: () for those of the data."""
    found = sorted(set(getattr(context.train, 'labels', ())))
    classes = tuple(options.get('classes', ())) or tuple(found)
    if set(options) - {'classes'} or not classes:
      raise UserError(
        'settings.conditioners.class takes classes alone, the names of all of them; a data set '
        'without classes cannot be without it.'
      )
    return cls(classes), {}

  def options(self):
    return {'classes': list(self.classes)}

  def check(self, denoiser):
    rows, count = getattr(denoiser, 'num_embeds_ada_norm', None), len(self.classes)
    if rows not in (None, count):
      raise UserError(
        f'denoiser.num_embeds_ada_norm is {rows}, but there are {count} classes; set it to that.'
      )

  def prompt(self, record):
    return record.get('label', '')

  def number(self, prompt: str) -> int:
    """Return the number of the class that a prompt names; UserError where it is none."""
    prompt = prompt.strip()
    if not prompt:
      return len(self.classes)
    if prompt in self.classes:
      return self.classes.index(prompt)
    if prompt.isdecimal() and int(prompt) < len(self.classes):
      return int(prompt)
    raise UserError(
      f'{prompt!r} is no class of the model; give one of {", ".join(self.classes[:20])}, or a '
      f'number below {len(self.classes)}.'
    )

  def rows(self, request):
    labels = np.asarray([self.number(prompt) for prompt in request.prompts], np.int32)
    return {'label': labels, 'negative_label': np.full_like(labels, self.number(request.negative))}

  def encode(self, weights, rows):
    return {'labels': rows['label']}

  def null(self, weights):
    return {'labels': jnp.asarray(len(self.classes), jnp.int32)}

  def pair(self, weights, rows, clip_skip=0):
    return {'labels': rows['label']}, {'labels': rows['negative_label']}

  def same(self, rows):
    return bool((rows['label'] == rows['negative_label']).all())


@dataclasses.dataclass(frozen=True)
class Sizes(Conditioner):
  """SDXL's sizes [b 6] in pixels: original height and width, top and left of the crop, target
  height and width (Podell et al. 2023, sec. 2.2); those of whole images where none are given."""

  fields: ClassVar = ('sizes',)

  def rows(self, request):
    return {'sizes': self.whole(len(request.prompts), request.height, request.width)}

  @staticmethod
  def whole(count: int, height: int, width: int) -> np.ndarray:
    """Return the sizes of images that nothing is cut off from, float32 [count 6]."""
    return np.tile(np.asarray([height, width, 0, 0, height, width], np.float32), (count, 1))

  def encode(self, weights, rows):
    return {'sizes': rows['sizes']}


@dataclasses.dataclass(frozen=True, eq=False)
class TextEncoders(Guided):
  """Prompts, by one text tower of CLIP or several, whose hidden states are joined by width.

  Adds 'text' [b l d] and, where used, 'pooled' [b p]; the null is the empty prompt.

  Attributes:
    networks: by the role of their weights.
    tokenizers: one for each of them, in the same order.
    skip: last layers left out; 0: the last hidden state, 1: the one before (SDXL).
    normalize: apply the final norm to the hidden states (not in SDXL).
    pooled: add the pooled text of the last encoder.
    zero_null: the empty text is all zeros (SDXL).
    cut: counts the texts too long for the first tokenizer.
  """

  networks: Mapping[str, Network] = dataclasses.field()  # The base's is no default.
  tokenizers: tuple[PreTrainedTokenizerBase, ...]
  skip: int = 0
  normalize: bool = True
  pooled: bool = False
  zero_null: bool = False
  cut: Cut = dataclasses.field(default_factory=Cut)
  fields: ClassVar = ('tokens',)
  paths: ClassVar = ('path',)

  @classmethod
  def build(cls, options, context):
    """`path`: of a CLIP with its tokenizer, or 'asset:NAME'."""
    part = part_of(options, 'text', TEXT_KINDS)
    tokenizer = load_tokenizer(resolve(options['path']))
    return cls({ROLES[0]: part.network(dtype=context.dtype)}, (tokenizer,)), {ROLES[0]: part}

  def check(self, denoiser):
    wanted = getattr(denoiser, 'cross_attention_dim', None)
    if wanted and wanted != self.width:
      raise UserError(
        f'unet.cross_attention_dim is {wanted}, but the text encoder gives texts of width '
        f'{self.width}; set it to {self.width}.'
      )

  def prompt(self, record):
    return record['captions'][0]

  @property
  def kept(self) -> tuple[str, ...]:
    return ('text', 'pooled') if self.pooled else ('text',)

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
    counted = (self.cut, *(Cut(lambda _: None) for _ in self.tokenizers[1:]))
    columns = [
      Tokenize(tokenizer, self.length, on_long, cut).batch(list(prompts))
      for tokenizer, cut in zip(self.tokenizers, counted, strict=True)
    ]
    return np.stack(columns, axis=1)

  def tokenize(self, prompt: str) -> np.ndarray:
    """One prompt -> int32 [e l]."""
    return self.tokens([prompt])[0]

  def add_word(self, token: str, counts: Mapping[str, int], after: Mapping[str, int]) -> None:
    """Add a word to tokenizers: `counts` rows by role, following the vocabulary and `after` rows.

    UserError for a known word, or one that does not fit its encoder.
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

    clip_skip: layers left out besides `skip`; UserError for too many.
    """
    parts, pooled, tokens = [], None, rows['tokens']
    for i, (role, network) in enumerate(self.networks.items()):
      params = dict(weights[role])
      extra = params.pop(EXTRA, None)
      hidden, pooled = network.bind(params).encode_text(
        tokens[:, i], skip=self.skip + clip_skip, normalize=self.normalize, extra_embeddings=extra
      )
      parts.append(hidden)
    out = {'text': jnp.concatenate(parts, axis=-1).astype(jnp.float32)}
    if self.pooled:
      out['pooled'] = pooled.astype(jnp.float32)
    if not self.zero_null:
      return out
    empty = tokens[:, 0, 1] == self.tokenizers[0].eos_token_id  # Nothing between the frame tokens.
    return jax.tree.map(lambda x: jnp.where(empty.reshape(-1, *[1] * (x.ndim - 1)), 0, x), out)

  def null(self, weights):
    # The tokens as an argument: as a constant XLA would compute with them in another order.
    out = jax.jit(self.encode)(weights, {'tokens': self.tokens([''])})
    return {name: value[0] for name, value in out.items()}

  def pair(self, weights, rows, clip_skip=0):
    """clip_skip is of the condition alone, as in diffusers."""
    tokens, negative = rows['tokens'], rows['negative']
    if clip_skip:
      return (
        self.encode(weights, rows, clip_skip), self.encode(weights, {'tokens': negative})
      )
    both = self.encode(weights, {'tokens': jnp.concatenate([tokens, negative])})
    n = len(tokens)
    return tuple(jax.tree.map(lambda a, s=s: a[s : s + n], both) for s in (0, n))

  def same(self, rows):
    return bool((rows['tokens'] == rows['negative']).all())


def embedding_table(network: Network) -> tuple[str, int, int]:
  """Return (parameter, width, rows) of a text tower's table of tokens."""
  name = next(n for n in network.shapes if n.endswith('token_embedding.embedding'))
  rows, width = network.shapes[name].shape
  return name, width, rows


def _text_config(config: Any) -> Any:
  """The text tower's config, of a CLIP or of the tower alone."""
  return getattr(config, 'text_config', config)
