"""What of a pretrained model is trained: all of the denoiser, adapters, a ControlNet, a few words.

Each kind says which parameters there are, with what they begin, how the whole model is put
together with them, and what is written at the end.
"""

import dataclasses
from pathlib import Path
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from diffusion_jax.errors import UserError
from diffusion_jax.files import check_folder
from diffusion_jax.formats.adapters import from_params, write_lora
from diffusion_jax.formats.networks import Part, cast, load_params, resolve, save_params
from diffusion_jax.formats.pipeline import save_changed
from diffusion_jax.formats.textual_inversion import FILES, write_textual_inversion
from diffusion_jax.formats.textual_inversion import TextualInversion as Learned
from diffusion_jax.models.controlnet import ControlNet as ControlNetModule
from diffusion_jax.models.controlnet import ControlNetConfig, from_unet
from diffusion_jax.models.lora import LoRAConfig, is_lora, targets, with_lora
from diffusion_jax.models.network import Network
from diffusion_jax.parallel.mesh import put_params, shard_params, to_host
from diffusion_jax.pipelines.adapters import controlnet_config
from diffusion_jax.pipelines.conditioners import CONTROLNET
from diffusion_jax.pipelines.conditioners import ControlNet as ControlNetConditioner
from diffusion_jax.pipelines.encoders import EXTRA, embedding_table
from diffusion_jax.pipelines.model import DENOISER, Diffusion
from diffusion_jax.types import Params, Weights


class Trainable(Protocol):
  """A part of a model that is trained while all others are frozen."""

  def adapted(self, model: Diffusion) -> Diffusion:
    """The model with room for the trained parameters; before anything else is asked."""

  @property
  def shapes(self) -> Params:
    """Of the trained parameters, without making them."""

  def initialize(self, key: jax.Array) -> Params:
    """Fresh parameters; pure."""

  def start(self, frozen: Weights, mesh: Mesh) -> Params | None:
    """What training begins with; None for fresh parameters."""

  def weights(self, params: Params, frozen: Weights) -> Weights:
    """The whole model by role."""

  def export(self, directory: Path, params: Params, dtype: str) -> None:
    """Writes what was trained as its users expect it."""


class Full:
  """All of the denoiser; the result is a whole pipeline."""

  def __init__(self, source: str, part: Part | None):
    self.source, self.part = source, part
    if part is not None:
      check_folder(resolve(source))  # It is copied when training ends.

  def adapted(self, model: Diffusion) -> Diffusion:
    self.model = model
    return model

  @property
  def shapes(self) -> Params:
    return self.model.denoiser.shapes

  def initialize(self, key: jax.Array) -> Params:
    return self.model.denoiser.initialize(key)

  def start(self, frozen: Weights, mesh: Mesh) -> Params:
    """The pretrained denoiser; input channels that it does not have yet begin at zero.

    So inpainting begins as the plain model does (Rombach et al. 2022, sec. 4.5).
    """
    params = self.part.load(mesh=mesh)
    return widened(params, self.model.denoiser.shapes, mesh)

  def weights(self, params: Params, frozen: Weights) -> Weights:
    return {**frozen, DENOISER: params}

  def export(self, directory: Path, params: Params, dtype: str) -> None:
    save_changed(directory, self.source, {DENOISER: (self.model.denoiser.config, params)}, dtype)


def widened(params: Params, shapes: Params, mesh: Mesh) -> Params:
  """Parameters whose first convolution gets the input channels of `shapes`, new ones at zero."""
  name = 'conv_in.kernel'
  kernel, wanted = params[name], shapes[name].shape
  more = wanted[2] - kernel.shape[2]
  if more == 0:
    return params
  wide = jnp.pad(to_host(kernel), ((0, 0), (0, 0), (0, more), (0, 0)))
  return {**params, **put_params({name: wide}, mesh)}


class LoRA:
  """LoRA on the denoiser; the result are adapters in the layouts of PEFT and kohya."""

  def __init__(self, config: LoRAConfig):
    self.config = config

  def adapted(self, model: Diffusion) -> Diffusion:
    self.sizes = targets(model.denoiser, self.config)
    self.network = with_lora(model.denoiser, self.sizes)
    return model.replaced({DENOISER: self.network})

  @property
  def shapes(self) -> Params:
    return {n: p for n, p in self.network.shapes.items() if is_lora(n)}

  def initialize(self, key: jax.Array) -> Params:
    return {n: p for n, p in self.network.initialize(key).items() if is_lora(n)}

  def start(self, frozen: Weights, mesh: Mesh) -> None:
    del frozen, mesh

  def weights(self, params: Params, frozen: Weights) -> Weights:
    return {**frozen, DENOISER: {**frozen[DENOISER], **params}}

  def export(self, directory: Path, params: Params, dtype: str) -> None:
    lora = {'unet': from_params(_cast(params, dtype), self.sizes)}
    write_lora(directory / 'pytorch_lora_weights.safetensors', lora, layout='peft')
    write_lora(directory / 'kohya.safetensors', lora, layout='kohya')


class ControlNet:
  """A ControlNet (Zhang et al. 2023) beside the frozen denoiser, from whose weights it begins."""

  def __init__(self, source: str, part: Part | None):
    self.source, self.part = source, part

  def adapted(self, model: Diffusion) -> Diffusion:
    found = controlnet_config(model, self.source) if self.source else _new_controlnet(model)
    self.network = Network.of(ControlNetModule, found, model.denoiser.compute)
    return model.with_conditioner('control', ControlNetConditioner(self.network))

  @property
  def shapes(self) -> Params:
    return self.network.shapes

  def initialize(self, key: jax.Array) -> Params:
    return self.network.initialize(key)

  def start(self, frozen: Weights, mesh: Mesh) -> Params:
    if self.source:
      return load_params('controlnet', self.source, mesh=mesh)[1]
    # From its file: what is frozen may be kept in half precision.
    unet = self.part.load(mesh=mesh)
    begin = lambda unet: from_unet(self.initialize(jax.random.key(0)), unet)
    return jax.jit(begin, out_shardings=shard_params(self.network.shapes, mesh))(unet)

  def weights(self, params: Params, frozen: Weights) -> Weights:
    return {**frozen, CONTROLNET: params}

  def export(self, directory: Path, params: Params, dtype: str) -> None:
    save_params(directory, self.network.config, params, dtype=dtype)


def _new_controlnet(model: Diffusion) -> ControlNetConfig:
  """A ControlNet that brings pictures to the size of the model's latents."""
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
  vectors: int = 1
  initializer: str = 'object'

  def __post_init__(self):
    if self.vectors < 1 or not self.token.strip() or '/' in self.token:
      raise UserError('settings.placeholder needs a token without / and at least one vector.')
    if not self.initializer.strip():
      raise UserError('settings.placeholder.initializer is empty; name a word of the same kind.')


class TextualInversion:
  """Textual inversion (Gal et al. 2023): only the embedding of a new word is trained."""

  def __init__(self, config: PlaceholderConfig):
    self.config = config

  def adapted(self, model: Diffusion) -> Diffusion:
    self.text = model.text
    if model.text.tokenizers:  # There are none without weights.
      counts = dict.fromkeys(model.text.networks, self.config.vectors)
      model.text.add_word(self.config.token, counts, {})
    return model

  def _tables(self) -> dict[str, tuple[str, int]]:
    """Role -> name of its embedding table and the width of a row."""
    return {role: embedding_table(network)[:2] for role, network in self.text.networks.items()}

  @property
  def shapes(self) -> Params:
    return jax.eval_shape(self.initialize, jax.random.key(0))

  def initialize(self, key: jax.Array) -> Params:
    tables = self._tables()
    draw = lambda key, width: 0.02 * jax.random.normal(key, (self.config.vectors, width))
    return {
      f'{role}.embedding': draw(key, width)
      for key, (role, (_, width)) in zip(jax.random.split(key, len(tables)), tables.items(),
                                         strict=True)
    }

  def start(self, frozen: Weights, mesh: Mesh) -> Params:
    rows = {}
    pairs = zip(self._tables().items(), self.text.tokenizers, strict=True)
    for (role, (name, _)), tokenizer in pairs:
      ids = tokenizer(self.config.initializer, add_special_tokens=False)['input_ids']
      table = to_host(frozen[role][name]).astype(np.float32)
      rows[f'{role}.embedding'] = table[[ids[i % len(ids)] for i in range(self.config.vectors)]]
    return put_params(rows, mesh)

  def weights(self, params: Params, frozen: Weights) -> Weights:
    return {**frozen, **{
      role: {**frozen[role], EXTRA: params[f'{role}.embedding']} for role in self._tables()
    }}

  def export(self, directory: Path, params: Params, dtype: str) -> None:
    token = self.config.token
    params = _cast(params, dtype)
    rows = {role: params[f'{role}.embedding'] for role in self._tables()}
    for role, value in rows.items():
      write_textual_inversion(directory / FILES[role], Learned(token, {role: value}))
    a1111 = directory / 'a1111' / f'{token}.safetensors'
    write_textual_inversion(a1111, Learned(token, rows), 'a1111')


def _cast(params: Params, dtype: str) -> Params:
  """Host arrays of the type that is written; UserError where it cannot hold a value."""
  return {name: cast(name, np.asarray(value), dtype) for name, value in params.items()}
