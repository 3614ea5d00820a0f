"""Every kind of network that can be read and written, and how its files look."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

from diffusion_jax.errors import UserError
from diffusion_jax.io.published import autoencoders, classifier, dinov2, dit, mlp, text, unet
from diffusion_jax.models.autoencoder import AutoencoderKL
from diffusion_jax.models.autoencoder_tiny import AutoencoderTiny
from diffusion_jax.models.classifier import Classifier
from diffusion_jax.models.controlnet import ControlNet
from diffusion_jax.models.dinov2 import DINOv2
from diffusion_jax.models.dit import DiT
from diffusion_jax.models.mlp import MLP
from diffusion_jax.models.mmdit import MMDiT
from diffusion_jax.models.text.clip import CLIP
from diffusion_jax.models.text.clip_text import CLIPTextModel, CLIPTextModelWithProjection
from diffusion_jax.models.text.clip_vision import CLIPVisionModel, CLIPVisionModelWithProjection
from diffusion_jax.models.text.t5 import T5EncoderModel
from diffusion_jax.models.unet import UNet
from diffusion_jax.models.vq import VQModel

DIFFUSERS, TRANSFORMERS = 'diffusion_pytorch_model.safetensors', 'model.safetensors'


def same_name(name: str) -> str | None:
  """A published tensor that is called as its network is built."""
  return name


@dataclasses.dataclass(frozen=True)
class Kind:
  """How one kind of network is built, described and stored.

  named: the key of config.json that identifies the kind, and the values that it may have.
  rename: a tensor's name in a file -> its name by the modules of our network, `.weight` for every
  kernel, scale and embedding; None for a tensor that holds no parameter, such as a position table.
  """

  module: type
  config: type
  weights: str
  named: tuple[str, tuple[Any, ...]]
  read: Callable[[dict[str, Any], str], Any]
  write: Callable[[Any], dict[str, Any]]
  rename: Callable[[str], str | None] = same_name

  def describes(self, values: dict[str, Any]) -> bool:
    """Whether a config.json is of this kind."""
    key, known = self.named
    return values.get(key) in known


# Autoencoders saved before diffusers 0.18 name the parts of their attention so.
_OLD_ATTENTION = {'query': 'to_q', 'key': 'to_k', 'value': 'to_v', 'proj_attn': 'to_out.0'}


def _new_attention(name: str) -> str:
  parts = name.split('.')
  if len(parts) >= 4 and parts[-4] == 'attentions':
    parts[-2] = _OLD_ATTENTION.get(parts[-2], parts[-2])
  return '.'.join(parts)


def _without_positions(name: str) -> str | None:
  return None if name.endswith('position_ids') else name


def _in_tower(prefix: str, name: str) -> str | None:
  """transformers 5 leaves the prefix out of a tower alone, and writes it beside a projection."""
  if name.endswith('position_ids'):
    return None
  return name if name.startswith((prefix, 'text_projection.', 'visual_projection.')) else (
    prefix + name
  )


_text_tower = functools.partial(_in_tower, 'text_model.')
_vision_tower = functools.partial(_in_tower, 'vision_model.')


def _dinov2(name: str) -> str | None:
  """A network with a head for classes has the body under a prefix; the head is left out."""
  if name.startswith('classifier.'):
    return None
  return name.removeprefix('dinov2.').removeprefix('dinov2_with_registers.')


def _t5_encoder(name: str) -> str | None:
  """The table of tokens has two names, and a whole T5 also has a decoder, which we leave out."""
  if name.startswith(('decoder.', 'lm_head.')):
    return None
  return 'shared.weight' if name == 'encoder.embed_tokens.weight' else name


KINDS = {
  'autoencoder': Kind(
    AutoencoderKL, autoencoders.AutoencoderKLConfig, DIFFUSERS,
    ('_class_name', ('AutoencoderKL',)),
    autoencoders.read_autoencoder, autoencoders.write_autoencoder, _new_attention,
  ),
  'unet': Kind(
    UNet, unet.UNetConfig, DIFFUSERS, ('_class_name', ('UNet2DConditionModel',)),
    unet.read_unet, unet.write_unet,
  ),
  'controlnet': Kind(
    ControlNet, unet.ControlNetConfig, DIFFUSERS, ('_class_name', ('ControlNetModel',)),
    unet.read_controlnet, unet.write_controlnet,
  ),
  'clip': Kind(
    CLIP, text.CLIPConfig, TRANSFORMERS, ('model_type', ('clip',)),
    text.read_clip, text.write_clip, _without_positions,
  ),
  'clip_text': Kind(
    CLIPTextModel, text.CLIPTextConfig, TRANSFORMERS,
    ('architectures', (['CLIPTextModel'],)),
    text.read_clip_text, text.write_clip_text, _text_tower,
  ),
  'clip_text_projection': Kind(
    CLIPTextModelWithProjection, text.CLIPTextProjectionConfig, TRANSFORMERS,
    ('architectures', (['CLIPTextModelWithProjection'],)),
    text.read_clip_text_projection, text.write_clip_text_projection, _text_tower,
  ),
  'clip_vision': Kind(
    CLIPVisionModel, text.CLIPVisionConfig, TRANSFORMERS,
    ('architectures', (['CLIPVisionModel'],)),
    text.read_clip_vision, text.write_clip_vision, _vision_tower,
  ),
  'clip_vision_projection': Kind(
    CLIPVisionModelWithProjection, text.CLIPVisionProjectionConfig, TRANSFORMERS,
    ('architectures', (['CLIPVisionModelWithProjection'],)),
    text.read_clip_vision_projection, text.write_clip_vision_projection, _vision_tower,
  ),
  'dinov2': Kind(
    DINOv2, dinov2.DINOv2Config, TRANSFORMERS, ('model_type', dinov2.MODEL_TYPES),
    dinov2.read_dinov2, dinov2.write_dinov2, _dinov2,
  ),
  't5': Kind(
    T5EncoderModel, text.T5Config, TRANSFORMERS, ('model_type', ('t5',)),
    text.read_t5, text.write_t5, _t5_encoder,
  ),
  'vq': Kind(
    VQModel, autoencoders.VQConfig, DIFFUSERS, ('_class_name', ('VQModel',)),
    autoencoders.read_vq, autoencoders.write_vq, _new_attention,
  ),
  'autoencoder_tiny': Kind(
    AutoencoderTiny, autoencoders.AutoencoderTinyConfig, DIFFUSERS,
    ('_class_name', ('AutoencoderTiny',)),
    autoencoders.read_autoencoder_tiny, autoencoders.write_autoencoder_tiny,
  ),
  'dit': Kind(
    DiT, dit.DiTConfig, DIFFUSERS, ('_class_name', dit.DIT_CLASSES), dit.read_dit, dit.write_dit
  ),
  'mmdit': Kind(
    MMDiT, dit.MMDiTConfig, DIFFUSERS, ('_class_name', ('SD3Transformer2DModel',)),
    dit.read_mmdit, dit.write_mmdit,
  ),
  'classifier': Kind(
    Classifier, classifier.ClassifierConfig, DIFFUSERS, ('_class_name', ('Classifier',)),
    classifier.read_classifier, classifier.write_classifier,
  ),
  'mlp': Kind(
    MLP, mlp.MLPConfig, DIFFUSERS, ('_class_name', ('MLP',)), mlp.read_mlp, mlp.write_mlp
  ),
}


def kind(name: str) -> Kind:
  """The kind of that name. UserError, listing them, where there is none."""
  if name not in KINDS:
    raise UserError(f'There is no kind of model {name!r}; use one of {", ".join(KINDS)}.')
  return KINDS[name]


def kind_of(module: Any) -> str:
  """The name of a module's kind. UserError where it has none."""
  for name, spec in KINDS.items():
    if type(module) is spec.module:
      return name
  raise UserError(f'A {type(module).__name__} is no kind of model that can be saved.')


def kind_of_config(config: Any) -> Kind:
  """The kind whose config has this type."""
  for spec in KINDS.values():
    if type(config) is spec.config:
      return spec
  raise UserError(f'No kind of model has a config of type {type(config).__name__}.')
