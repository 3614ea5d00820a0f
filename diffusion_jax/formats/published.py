"""Rules between our parameters and configs and the published ones, for all networks.

Modules are named alike, only leaves differ: kernel, scale and embedding are all `weight`, a
convolution is stored [o i h w] instead of [h w i o], a matrix [out in] instead of [in out]. Both
directions are total: a missing, unused or misshapen tensor is an error that names it. An unknown
key of config.json is an error, but with values under which the computation is ours.
"""

import collections
import dataclasses
import functools
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from diffusion_jax.config import typed
from diffusion_jax.errors import UserError, require, shown
from diffusion_jax.models.network import Network, abstract
from diffusion_jax.types import Params

DIFFUSERS, TRANSFORMERS = 'diffusion_pytorch_model.safetensors', 'model.safetensors'
"""The files of weights of the two libraries."""

_TO_PUBLISHED = {2: (1, 0), 4: (3, 2, 0, 1)}
_FROM_PUBLISHED = {2: (1, 0), 4: (2, 3, 1, 0)}
_WEIGHTS = ('kernel', 'scale', 'embedding')


def published_name(name: str) -> str:
  """'a.0.weight' for 'a.0.kernel'; names without such a leaf, such as logit_scale, stay."""
  module, _, leaf = name.rpartition('.')
  return f'{module}.weight' if module and leaf in _WEIGHTS else name


def published_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
  """Return the shape under which a parameter of ours is published."""
  if name.endswith('.kernel') and len(shape) in _TO_PUBLISHED:
    return tuple(shape[axis] for axis in _TO_PUBLISHED[len(shape)])
  return tuple(shape)


def to_published_layout(name: str, value: Any) -> np.ndarray:
  """Return the array that is published of a parameter of ours, of the same type."""
  value = np.asarray(value)
  return value.transpose(_TO_PUBLISHED[value.ndim]) if name.endswith('.kernel') else value


def from_published_layout(name: str, value: Any) -> np.ndarray:
  """Return a view of a published array as our parameter."""
  value = np.asarray(value)
  if name.endswith('.kernel') and value.ndim in _FROM_PUBLISHED:
    value = value.transpose(_FROM_PUBLISHED[value.ndim])
  return value


def to_published_names(names: Iterable[str]) -> dict[str, str]:
  """Return our names with the published ones, which are all different."""
  found = {name: published_name(name) for name in names}
  key, count = collections.Counter(found.values()).most_common(1)[0] if found else ('', 1)
  require(count == 1, f'Two parameters would both be published as {key}.')
  return found


def match(
  tensors: Mapping[str, Any], shapes: Mapping[str, Any], where: str, native: bool = False
) -> dict[str, Any]:
  """Tensors by published names, unread, by the names of `shapes`; `native` ones are ours already.

  `where` names the source. UserError: a tensor is missing, left over or of another shape.
  """
  names = {name: name for name in shapes} if native else to_published_names(shapes)
  same_names(set(tensors), set(names.values()), where)
  for name, key in names.items():
    shape, expected = tuple(tensors[key].shape), tuple(shapes[name].shape)
    expected = expected if native else published_shape(name, expected)
    require(
      shape == expected,
      f'{where}: {key} has shape {list(shape)}, which does not fit the config; it must be '
      f'{list(expected)}.',
    )
  return {name: tensors[key] for name, key in names.items()}


def from_published(
  tensors: Mapping[str, Any], shapes: Mapping[str, Any], where: str
) -> dict[str, np.ndarray]:
  """Return published tensors as float32 parameters on the host, as `match` does."""
  return {
    name: np.ascontiguousarray(from_published_layout(name, tensor), np.float32).reshape(
      shapes[name].shape
    )
    for name, tensor in match(tensors, shapes, where).items()
  }


def some(names: Iterable[str]) -> str:
  """Return the first three names, and how many more there are."""
  names = sorted(names)
  return ', '.join(name[:200] for name in names[:3]) + (
    f' and {len(names) - 3} more' * (len(names) > 3)
  )


def same_names(have: set[str], want: set[str], where: str) -> None:
  """Raise a UserError, naming up to three, where names are missing or left over."""
  missing, unused = want - have, have - want
  require(
    not missing,
    f'{where} lacks {some(missing)}; it does not hold the network that its config describes.',
  )
  require(
    not unused,
    f'{where} holds {some(unused)}, which the network of its config does not have.',
  )


ANY = object()  # The key has no effect on the network.
GENERAL = dict.fromkeys((
  'architectures', 'attention_dropout', 'bad_words_ids', 'bos_token_id', 'chunk_size_feed_forward',
  'decoder_start_token_id', 'diversity_penalty', 'do_sample', 'dropout', 'dtype', 'early_stopping',
  'encoder_no_repeat_ngram_size', 'eos_token_id', 'exponential_decay_length_penalty',
  'finetuning_task', 'id2label', 'initializer_factor', 'initializer_range', 'label2id',
  'length_penalty', 'max_length', 'min_length', 'model_type', 'no_repeat_ngram_size',
  'num_beam_groups', 'num_beams', 'num_return_sequences', 'output_attentions',
  'output_hidden_states', 'output_scores', 'pad_token_id', 'prefix', 'problem_type',
  'projection_dim', 'remove_invalid_values', 'repetition_penalty', 'return_dict',
  'return_dict_in_generate', 'sep_token_id', 'suppress_tokens', 'task_specific_params',
  'temperature', 'tf_legacy_loss', 'tie_encoder_decoder', 'tie_word_embeddings',
  'tokenizer_class', 'top_k', 'top_p', 'torch_dtype', 'torchscript', 'transformers_version',
  'typical_p', 'use_bfloat16',
), ANY) | {'is_decoder': False, 'is_encoder_decoder': False, 'add_cross_attention': False,
           'pruned_heads': {}}
"""Keys that transformers writes into every config or that only text generation reads."""


@dataclasses.dataclass(frozen=True)
class NetworkFormat:
  """One kind of network: how it is built, described in config.json and stored.

  module, config: the network, and its config's dataclass. names: values in config.json of `key`;
  the first is written. key: '_class_name' (diffusers), or one of transformers'. accepted: keys that
  are no fields of `config` -> the allowed value, or ANY. defaults: of missing keys, where not those
  of `config`. written: keys written with the fields. rename: a tensor's name in a file -> its name
  by our modules, `.weight` for every kernel, scale and embedding; None for one without a parameter,
  such as a position table.
  """

  module: type
  config: type
  names: tuple[Any, ...]
  key: str = '_class_name'
  accepted: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  written: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  rename: Callable[[str], str | None] = lambda name: name

  @classmethod
  def default(cls, module: type) -> 'NetworkFormat':
    """The format of a network of no library: its class name and its config's fields.

    TypeError: its __init__ takes no `config` annotated with a dataclass.
    """
    config = typing.get_type_hints(module.__init__).get('config')
    if not dataclasses.is_dataclass(config):
      raise TypeError(f'{module.__name__}.__init__ must annotate `config` with a dataclass.')
    return cls(module, config, (module.__name__,))

  @property
  def weights(self) -> str:
    """The library's name of the file of weights."""
    return DIFFUSERS if self.key == '_class_name' else TRANSFORMERS

  def matches(self, values: Mapping[str, Any]) -> bool:
    """Return whether a config.json describes this kind of network."""
    return values.get(self.key) in self.names

  def parse(self, values: Mapping[str, Any], where: str) -> Any:
    """Return the config that a config.json describes. UserError, after `where`, for any other."""
    return parse_config(self.config, {**self.defaults, **values}, self.accepted, where)

  def describe(self, config: Any) -> dict[str, Any]:
    """Return the config.json of a config, which `parse` reads back."""
    return dataclasses.asdict(config) | {self.key: self.names[0], **self.written}

  def network(self, config: Any, **options) -> Network:
    """Return the network of a config, without weights."""
    return Network.of(self.module, config, **options)

  def shapes(self, config: Any) -> Params:
    """Return the parameters' shapes by name, without building the network."""
    return _shapes(self.module, config)


@functools.lru_cache(maxsize=8)
def _shapes(module: type, config: Any) -> Params:
  return abstract(lambda rngs: module(config, rngs=rngs))[1]


def parse_config(
  cls: type, values: Mapping[str, Any], accepted: Mapping[str, Any], where: str
) -> Any:
  """A `cls` from those of `values` that are its fields; others must be `accepted`.

  Types are those of `cls`, numbers finite; null stands for a default of another type.
  """
  hints = typing.get_type_hints(cls)
  for key, value in values.items():
    if key in hints or key.startswith('_') or value is None:
      continue
    require(
      key in accepted and (accepted[key] is ANY or accepted[key] == value),
      f'{where}: {key[:60]}={shown(value)} is not implemented'
      + (f' (only {accepted[key]!r} is).' if key in accepted else '; such a model cannot be read.'),
    )
  fields = {key: value for key, value in values.items() if key in hints}
  fields = {k: v for k, v in fields.items() if v is not None or type(None) in _choices(hints[k])}
  for key, value in fields.items():
    if dataclasses.is_dataclass(hints[key]) and isinstance(value, dict):
      fields[key] = parse_config(hints[key], value, accepted, f'{where}, {key}')
  try:
    return typed(cls, fields, '')
  except UserError as error:
    raise UserError(f'{where}: {error}') from None


def _choices(hint: Any) -> tuple[Any, ...]:
  union = typing.get_origin(hint) in (types.UnionType, typing.Union)
  return typing.get_args(hint) if union else (hint,)
