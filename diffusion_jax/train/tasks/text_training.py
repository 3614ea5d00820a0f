"""Text encoders that are trained with the denoiser, whole or by adapters.

Their parameters have the role of the encoder before their names, 'text_encoder_2.encoder...', so
that groups of learning rates, averages and checkpoints take them as any others.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Annotated, ClassVar, Literal

import jax
import jax.numpy as jnp

from diffusion_jax.errors import UserError, require
from diffusion_jax.files import check_folder
from diffusion_jax.formats.networks import Part, resolve
from diffusion_jax.limits import Length
from diffusion_jax.models.lora import LoRAConfig, ending, layers_of
from diffusion_jax.models.network import prefixed, under, used_names
from diffusion_jax.pipelines.model import Diffusion
from diffusion_jax.pipelines.text_conditioners import ROLES, TextEncoders
from diffusion_jax.train.tasks.trainable import LoRA, Trainable, write_adapters
from diffusion_jax.types import Params

HOW = Literal['frozen', 'trained', 'lora']
ATTENTIONS = (
  'q_proj', 'k_proj', 'v_proj', 'out_proj', 'SelfAttention.q', 'SelfAttention.k', 'SelfAttention.v',
  'SelfAttention.o',
)
"""The projections of the attentions of CLIP and of T5."""


@dataclasses.dataclass(frozen=True)
class TextLoRAConfig(LoRAConfig):
  """targets: of all trained encoders together. Default: the attentions of CLIP and T5; 'fc1' and
  'fc2', or 'wi_0', 'wi_1' and 'wo', are their feed-forward layers."""

  section: ClassVar[str] = 'text_lora'
  targets: Annotated[tuple[str, ...], Length(1, 1000)] = ATTENTIONS


@dataclasses.dataclass(frozen=True)
class TextTrainingConfig:
  """Settings of tasks whose text encoders may be trained, too.

  text_training: frozen encoders, all of their weights trained, or adapters. text_encoders: roles of
  those that are, such as 'text_encoder_2'; () for all. text_lora: the adapters.
  """

  text_training: HOW = 'frozen'
  text_encoders: tuple[str, ...] = ()
  text_lora: TextLoRAConfig = TextLoRAConfig()

  def check_text_training(self, cache: bool) -> None:
    """Raise UserError for what has no effect, and for a cache, which keeps what encoders gave."""
    how = self.text_training
    unknown = sorted(set(self.text_encoders) - set(ROLES))
    for wrong, text in (
      (how != 'frozen' and cache, 'settings.cache keeps what text encoders give before training; '
       f'switch it off, or set settings.text_training {how} to frozen.'),
      (how == 'frozen' and self.text_encoders,
       'settings.text_encoders has no effect with settings.text_training frozen; leave it out.'),
      (how != 'lora' and self.text_lora != TextLoRAConfig(),
       f'settings.text_lora has no effect with settings.text_training {how}; leave it out.'),
      (unknown, f'settings.text_encoders names {", ".join(unknown)}; choose of '
       f'{", ".join(ROLES)}.'),
    ):
      if wrong:
        raise UserError(text)


def with_texts(
  first: Trainable, config: TextTrainingConfig, model: Diffusion, parts: Mapping[str, Part]
) -> Trainable:
  """Return what is trained, with the text encoders of the settings.

  Raises:
    UserError: settings that fit no text encoder of the model.
  """
  if config.text_training == 'frozen':
    return first
  require(
    model.text is not None, f'settings.text_training {config.text_training} has no effect on a '
    'model without text encoders; leave it out.',
  )
  there = tuple(model.text.networks)
  roles = config.text_encoders or there
  missing = [role for role in roles if role not in there]
  require(
    not missing, f'settings.text_encoders names {", ".join(missing)}, but the model has '
    f'{", ".join(there)}; leave it out.',
  )
  kind = {'trained': WholeEncoder, 'lora': EncoderLoRA}[config.text_training]
  if kind is EncoderLoRA:
    _check_targets(config.text_lora, model.text, roles)
  return Joint(first, [kind(config, parts[role], role) for role in roles], there)


def _check_targets(lora: TextLoRAConfig, text: TextEncoders, roles: Sequence[str]) -> None:
  layers = {role: layers_of(text.networks[role].shapes) for role in roles}
  every = [layer for found in layers.values() for layer in found]
  for target in lora.targets if lora.targets != ATTENTIONS else ():
    require(
      bool(ending(every, (target,))), f'settings.text_lora.targets has {target!r}, but no layer of '
      f'the text encoders ends so; one is {every[0]!r}.',
    )
  for role, found in layers.items():
    require(
      bool(ending(found, lora.targets)), f'settings.text_lora.targets names no layer of {role}; '
      'name one, or leave it out of settings.text_encoders.',
    )


def read_names(text: TextEncoders, role: str) -> frozenset[str]:
  """Return the names of an encoder's parameters that the condition depends on.

  Not among them are a vision tower, projections of a pooled text that nobody reads, and layers that
  are skipped.
  """
  # Which tokens are padding makes no difference, and there may be no tokenizer.
  readers = {r: dataclasses.replace(reader, masked=False) for r, reader in text.readers.items()}
  text = dataclasses.replace(text, readers=readers, zero_null=False)
  shapes = {r: network.shapes for r, network in text.networks.items()}
  zeros = lambda found: {name: jnp.zeros(leaf.shape, leaf.dtype) for name, leaf in found.items()}

  def encode(params: Params):
    rest = {r: zeros(found) for r, found in shapes.items() if r != role}
    tokens = jnp.zeros((1, len(shapes), text.length), jnp.int32)
    return text.encode({**rest, role: params}, {'tokens': tokens})

  return frozenset(used_names(encode, shapes[role]))


class _OfEncoder(Trainable):
  """A part of the text encoder with this role."""

  def __init__(self, config, part: Part, role: str):
    super().__init__(config, part)
    self.role = role
    if getattr(config, 'model', ''):
      check_folder(resolve(config.model))  # It is copied when training ends.


class WholeEncoder(_OfEncoder):
  """All parameters of a text encoder that texts depend on."""

  def adapted(self, model):
    self.network, self.names = model.networks[self.role], read_names(model.text, self.role)
    return model

  @property
  def replaced(self):
    return {self.role: self.names}

  @property
  def shapes(self):
    return self._own(super().shapes)

  def initialize(self, key):
    return self._own(super().initialize(key))

  def start(self, frozen, mesh):
    return self._own(self.part.load(mesh=mesh))

  def weights(self, params, frozen):
    return {**frozen, self.role: {**frozen.get(self.role, {}), **params}}

  def changed(self, params):
    rest = self.part.load() if self.network.shapes.keys() - params.keys() else {}
    return {self.role: (self.network.config, {**rest, **params})}

  def _own(self, params: Params) -> Params:
    return {name: value for name, value in params.items() if name in self.names}


class EncoderLoRA(_OfEncoder, LoRA):
  """LoRA on the layers of a text encoder that texts depend on."""

  def layers(self, model):
    names = read_names(model.text, self.role)
    lora: TextLoRAConfig = self.config.text_lora
    return lora.sizes(ending(sorted(layers_of(names)), lora.targets))


class Joint(Trainable):
  """A part of the model and text encoders, trained at once.

  The names of the first's parameters stay; those of encoders have their role before them. Adapters
  alone are written as such; else the result is a whole model, with adapters merged into it.
  """

  def __init__(self, first: Trainable, texts: Sequence[Trainable], encoders: Sequence[str]):
    """`encoders` are the roles of all that the model has."""
    super().__init__(first.config, first.part)
    self.first, self.texts, self.encoders = first, tuple(texts), tuple(encoders)

  @property
  def roles(self):
    return {*self.first.roles, *(one.role for one in self.texts)}

  @property
  def replaced(self):
    found = dict(self.first.replaced)
    for one in self.texts:
      found |= one.replaced
    return found

  def adapted(self, model):
    for one in (self.first, *self.texts):
      model = one.adapted(model)
    self.network = self.first.network
    return model

  @property
  def shapes(self):
    return self._joined(self.first.shapes, [one.shapes for one in self.texts])

  def initialize(self, key):
    """The first has the key that it has alone."""
    keys = [jax.random.fold_in(key, number) for number in range(1, len(self.texts) + 1)]
    texts = [one.initialize(own) for one, own in zip(self.texts, keys, strict=True)]
    return self._joined(self.first.initialize(key), texts)

  def start(self, frozen, mesh):
    texts = [one.start(frozen, mesh) or {} for one in self.texts]
    return self._joined(self.first.start(frozen, mesh) or {}, texts) or None

  def weights(self, params, frozen):
    weights = self.first.weights(self._of_first(params), frozen)
    for one in self.texts:
      weights = one.weights(under(one.role, params), weights)
    return weights

  def changed(self, params):
    found = self.first.changed(self._of_first(params))
    for one in self.texts:
      found |= one.changed(under(one.role, params))
    return found

  def export(self, directory, params, dtype):
    if not all(isinstance(one, LoRA) for one in (self.first, *self.texts)):
      return super().export(directory, params, dtype)
    found = self.first.adapters(self._of_first(params), dtype) | {
      role: {} for role in self.encoders
    }
    for one in self.texts:
      found |= one.adapters(under(one.role, params), dtype)
    networks = {self.first.role_in_files: self.first.network.shapes}
    return write_adapters(directory, found, networks)

  def _joined(self, first: Params, texts: Sequence[Params]) -> Params:
    found = dict(first)
    for one, params in zip(self.texts, texts, strict=True):
      found |= prefixed(one.role, params)
    return found

  def _of_first(self, params: Params) -> Params:
    starts = tuple(f'{one.role}.' for one in self.texts)
    return {name: value for name, value in params.items() if not name.startswith(starts)}
