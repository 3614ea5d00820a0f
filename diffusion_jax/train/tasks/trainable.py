"""Trained parts of a pretrained model: the whole denoiser, adapters, a ControlNet, a new word."""

import abc
import dataclasses
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from diffusion_jax.errors import UserError
from diffusion_jax.files import check_folder
from diffusion_jax.formats.adapters import (
  LoRAs,
  denoiser_role,
  fits_layout,
  from_params,
  write_lora,
  write_peft,
)
from diffusion_jax.formats.networks import (
  Part,
  cast,
  load_params,
  network_format,
  resolve,
  save_params,
)
from diffusion_jax.formats.pipeline import save_changed
from diffusion_jax.formats.textual_inversion import FILES, write_textual_inversion
from diffusion_jax.formats.textual_inversion import TextualInversion as Learned
from diffusion_jax.limits import Positive
from diffusion_jax.models.adapters import Rank
from diffusion_jax.models.controlnet import ControlNetConfig, from_unet
from diffusion_jax.models.lora import is_lora, merge_lora, start_of, targets, with_lora
from diffusion_jax.models.network import Network
from diffusion_jax.parallel.mesh import put_params, shard_params, to_host
from diffusion_jax.pipelines.adapters import read_controlnet
from diffusion_jax.pipelines.image_conditioners import CONTROLNET
from diffusion_jax.pipelines.image_conditioners import ControlNet as ControlNetConditioner
from diffusion_jax.pipelines.model import DENOISER, Diffusion
from diffusion_jax.pipelines.text_conditioners import EXTRA, embedding_table
from diffusion_jax.types import Params, Weights

Changed = dict[str, tuple[Any, Params]]
"""(config, parameters) of networks, by role."""


class Trainable(abc.ABC):
  """A part of a model that is trained while all others are frozen.

  Made of the settings of `finetune` and the pretrained denoiser's path for `start`; `adapted` comes
  first.
  """

  section = ''
  """The field of the settings for it alone."""
  role = DENOISER
  network: Network
  """The trained network, with its role."""

  def __init__(self, config: Any, part: Part | None = None):
    self.config, self.part = config, part

  @property
  def roles(self) -> Set[str]:
    """Roles of the networks that compute otherwise after each step."""
    return {self.role}

  @property
  def replaced(self) -> dict[str, Set[str]]:
    """Names of the model's own parameters, by role, that the trained ones take the place of."""
    return {}

  @abc.abstractmethod
  def adapted(self, model: Diffusion) -> Diffusion:
    """Return the model with room for the trained parameters."""

  @property
  def shapes(self) -> Params:
    """Shapes of the trained parameters."""
    return self.network.shapes

  def initialize(self, key: jax.Array) -> Params:
    """Return fresh parameters; pure."""
    return self.network.initialize(key)

  def start(self, frozen: Weights, mesh: Mesh) -> Params | None:
    """Return what training begins with; what lacks is fresh, None: all."""
    del frozen, mesh
    return None

  def weights(self, params: Params, frozen: Weights) -> Weights:
    """The weights of the whole model, by role."""
    return {**frozen, self.role: params}

  def changed(self, params: Params) -> Changed:
    """Return the networks of a whole model that has been trained so."""
    raise NotImplementedError(f'{type(self).__name__} changes no network')

  def export(self, directory: Path, params: Params, dtype: str) -> None:
    """Write what was trained as its users expect it: by default a whole pipeline."""
    save_changed(directory, self.config.model, self.changed(params), dtype)

  def rest(self, parts: Mapping[str, Part], **how) -> Weights:
    """Return the weights of a model's parts that stay as they are, read by `Part.load`."""
    out = {}
    for role, part in parts.items():
      names = self.replaced.get(role, set())
      if part.format.shapes(part.config).keys() - names:
        out[role] = {n: value for n, value in part.load(**how).items() if n not in names}
    return out


class Denoiser(Trainable):
  """All of a new denoiser."""

  def adapted(self, model):
    self.network = model.denoiser
    return model

  def changed(self, params):
    return {DENOISER: (self.network.config, params)}


class Full(Denoiser):
  """All of a pretrained denoiser; the result is a whole pipeline."""

  def __init__(self, config: Any, part: Part | None = None):
    super().__init__(config, part)
    if part is not None:
      check_folder(resolve(config.model))  # It is copied when training ends.

  def adapted(self, model):
    self.written = model.written_config
    return super().adapted(model)

  @property
  def replaced(self):
    return {DENOISER: self.part.format.shapes(self.part.config).keys()}

  def start(self, frozen, mesh):
    """The pretrained denoiser; new input channels begin at zero (Rombach et al. 2022, sec. 4.5)."""
    return widened(self.part.load(mesh=mesh), self.shapes, mesh)

  def changed(self, params):
    return {DENOISER: (self.written, params)}


def widened(params: Params, shapes: Params, mesh: Mesh) -> Params:
  """Return the parameters in these shapes, with zeros at the end of what is shorter."""
  out = dict(params)
  for name, value in params.items():
    missing = [(0, wanted - n) for wanted, n in zip(shapes[name].shape, value.shape, strict=True)]
    if any(after for _, after in missing):
      out |= put_params({name: jnp.pad(to_host(value), missing)}, mesh)
  return out


class LoRA(Trainable):
  """Adapters of the denoiser; the result are files in the layouts of PEFT and kohya."""

  section = 'lora'

  def adapted(self, model):
    self.sizes = self.layers(model)
    self.network = with_lora(model.networks[self.role], self.sizes)
    self.written = model.written_config if self.role == DENOISER else self.network.config
    return model.replaced({self.role: self.network})

  def layers(self, model: Diffusion) -> dict[str, Rank]:
    """Return the layers of the model that are adapted, with the sizes of their adapters."""
    return targets(model.denoiser, self.config.lora)

  @property
  def shapes(self):
    return _adapters(super().shapes)

  def initialize(self, key):
    return _adapters(super().initialize(key))

  def start(self, frozen, mesh):
    """The norms of the weights in full precision, for DoRA."""
    if not any(size.dora for size in self.sizes.values()):
      return super().start(frozen, mesh)
    return put_params(to_host(start_of(self.part.load(), self.sizes)), mesh)

  def weights(self, params, frozen):
    return {**frozen, self.role: {**frozen[self.role], **params}}

  def changed(self, params):
    """The network with its adapters merged into it, from its file in full precision."""
    merged = merge_lora({**self.part.load(), **params}, self.sizes)
    return {self.role: (self.written, to_host(merged))}

  def adapters(self, params: Params, dtype: str) -> LoRAs:
    """Return what was trained, by the role in files."""
    return {self.role_in_files: from_params(_cast(params, dtype), self.sizes)}

  @property
  def role_in_files(self) -> str:
    return denoiser_role(self.network.config) if self.role == DENOISER else self.role

  def export(self, directory, params, dtype):
    networks = {self.role_in_files: self.network.shapes}
    write_adapters(directory, self.adapters(params, dtype), networks)


def write_adapters(directory: Path, lora: LoRAs, shapes: dict[str, Params]) -> None:
  """Write the adapters in all layouts that have names for them.

  LoRA in `pytorch_lora_weights.safetensors` for diffusers, other kinds in a folder of PEFT for each
  role, `peft/ROLE`; and `kohya.safetensors`. shapes: of the networks' parameters, by role in files.
  """
  if all(one.size.kind == 'lora' for weights in lora.values() for one in weights.values()):
    write_lora(directory / 'pytorch_lora_weights.safetensors', lora, layout='peft')
  else:
    for role, weights in lora.items():
      if weights and fits_layout(weights, 'peft'):
        write_peft(directory / 'peft' / role, weights)
  if all(fits_layout(weights, 'kohya') for weights in lora.values()):
    write_lora(directory / 'kohya.safetensors', lora, layout='kohya', networks=shapes)


def _adapters(params: Params) -> Params:
  return {name: value for name, value in params.items() if is_lora(name)}


class ControlNet(Trainable):
  """A ControlNet (Zhang et al. 2023), begun with `config.controlnet` or the frozen denoiser."""

  section = role = CONTROLNET

  def adapted(self, model):
    if self.config.controlnet:
      control = read_controlnet(model, self.config.controlnet)
    else:
      made = network_format(CONTROLNET).network(
        _new_controlnet(model), compute=model.denoiser.compute
      )
      control = ControlNetConditioner({CONTROLNET: made})
    self.network = control.networks[CONTROLNET]
    return model.with_conditioner('control', control)

  def start(self, frozen, mesh):
    if self.config.controlnet:
      return load_params(CONTROLNET, self.config.controlnet, mesh=mesh)[1]
    # From its file: what is frozen may be kept in half precision.
    unet = self.part.load(mesh=mesh)
    begin = lambda unet: from_unet(self.initialize(jax.random.key(0)), unet)
    return jax.jit(begin, out_shardings=shard_params(self.shapes, mesh))(unet)

  def export(self, directory, params, dtype):
    save_params(directory, self.network.config, params, dtype=dtype)


def _new_controlnet(model: Diffusion) -> ControlNetConfig:
  """Return a ControlNet that brings images to the size of the model's latents."""
  config = ControlNetConfig.for_unet(model.denoiser.config)
  factor = model.space.factor
  widths = config.conditioning_embedding_out_channels[: factor.bit_length()]
  config = dataclasses.replace(config, conditioning_embedding_out_channels=widths)
  if config.image_factor != factor:
    raise UserError(
      f'pictures are {factor} times as large as latents, which no ControlNet is made for; train on '
      'a model with a factor of 1, 2, 4 or 8.'
    )
  return config


@dataclasses.dataclass(frozen=True)
class PlaceholderConfig:
  """A new word, made of `vectors` new rows; they begin as the embedding of `initializer`."""

  token: str = '<concept>'
  vectors: Positive = 1
  initializer: str = 'object'

  def __post_init__(self):
    if not self.token.strip() or '/' in self.token:
      raise UserError(f'settings.placeholder.token is {self.token!r}; give a new word without /.')
    if not self.initializer.strip():
      raise UserError('settings.placeholder.initializer is empty; name a word of the same kind.')


class TextualInversion(Trainable):
  """Textual inversion (Gal et al. 2023): only the embedding of a new word is trained."""

  section = 'placeholder'

  def adapted(self, model):
    self.text, self.word = model.text, self.config.placeholder
    self.tables = {role: embedding_table(n)[:2] for role, n in model.text.towers.items()}
    if model.text.tokenizers:  # There are none without weights.
      model.text.add_word(self.word.token, dict.fromkeys(self.tables, self.word.vectors), {})
    return model

  @property
  def shapes(self):
    return jax.eval_shape(self.initialize, jax.random.key(0))

  def initialize(self, key):
    keys = jax.random.split(key, len(self.tables))
    return {
      f'{role}.embedding': 0.02 * jax.random.normal(key, (self.word.vectors, width))
      for key, (role, (_, width)) in zip(keys, self.tables.items(), strict=True)
    }

  def start(self, frozen, mesh):
    rows = {}
    for role, (name, _) in self.tables.items():
      tokenizer = self.text.readers[role].tokenizer
      ids = tokenizer(self.word.initializer, add_special_tokens=False)['input_ids']
      table = to_host(frozen[role][name]).astype(np.float32)
      rows[f'{role}.embedding'] = table[[ids[i % len(ids)] for i in range(self.word.vectors)]]
    return put_params(rows, mesh)

  def weights(self, params, frozen):
    return {**frozen, **{
      role: {**frozen[role], EXTRA: params[f'{role}.embedding']} for role in self.tables
    }}

  def export(self, directory, params, dtype):
    params, token = _cast(params, dtype), self.word.token
    rows = {role: params[f'{role}.embedding'] for role in self.tables}
    for role, value in rows.items():
      write_textual_inversion(directory / FILES[role], Learned(token, {role: value}))
    a1111 = directory / 'a1111' / f'{token}.safetensors'
    write_textual_inversion(a1111, Learned(token, rows), 'a1111')


def _cast(params: Params, dtype: str) -> Params:
  """Host arrays of the written type; UserError for values out of its range."""
  return {name: cast(name, np.asarray(value), dtype) for name, value in params.items()}
