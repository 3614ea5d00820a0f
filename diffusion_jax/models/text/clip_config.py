"""Configs of CLIP; field names are the keys of transformers' config.json."""

import dataclasses
from typing import Any

from diffusion_jax.models.checks import MOST_EDGE, MOST_LAYERS, above_zero, positive, require

ACTIVATIONS = ('quick_gelu', 'gelu', 'gelu_new', 'gelu_pytorch_tanh')


def _check_tower(config: Any) -> None:
  positive(config, 'hidden_size', 'intermediate_size', 'num_attention_heads')
  positive(config, 'num_hidden_layers', most=MOST_LAYERS)
  above_zero(config, 'layer_norm_eps', most=1)
  name = type(config).__name__
  require(
    config.hidden_size % config.num_attention_heads == 0,
    f'{name}.num_attention_heads={config.num_attention_heads} does not divide hidden_size='
    f'{config.hidden_size}; choose a divisor.',
  )
  require(
    config.hidden_act in ACTIVATIONS,
    f'{name}.hidden_act={config.hidden_act!r} is not known; use one of {", ".join(ACTIVATIONS)}.',
  )


@dataclasses.dataclass(frozen=True)
class CLIPTextConfig:
  """The text tower; the defaults are those of CLIP ViT-B/32 (hidden 768, 12 heads: ViT-L/14).

  `eos_token_id` decides where a text is pooled: 2 (an old mistake that checkpoints carry) means at
  the largest id, anything else at the first such id.
  """

  vocab_size: int = 49408
  hidden_size: int = 512
  intermediate_size: int = 2048
  num_hidden_layers: int = 12
  num_attention_heads: int = 8
  max_position_embeddings: int = 77
  hidden_act: str = 'quick_gelu'
  layer_norm_eps: float = 1e-5
  bos_token_id: int = 49406
  eos_token_id: int = 49407
  pad_token_id: int = 1

  def __post_init__(self):
    _check_tower(self)
    positive(self, 'vocab_size', 'max_position_embeddings')
    require(
      isinstance(self.eos_token_id, int),
      f'CLIPTextConfig.eos_token_id must be one whole number, not {self.eos_token_id!r}.',
    )


@dataclasses.dataclass(frozen=True)
class CLIPTextProjectionConfig(CLIPTextConfig):
  """The text tower and the width of its projection."""

  projection_dim: int = 512

  def __post_init__(self):
    super().__post_init__()
    positive(self, 'projection_dim')


@dataclasses.dataclass(frozen=True)
class CLIPVisionConfig:
  """The vision tower, a ViT over square images of one fixed size; defaults of ViT-B/32."""

  hidden_size: int = 768
  intermediate_size: int = 3072
  num_hidden_layers: int = 12
  num_attention_heads: int = 12
  num_channels: int = 3
  image_size: int = 224
  patch_size: int = 32
  hidden_act: str = 'quick_gelu'
  layer_norm_eps: float = 1e-5

  def __post_init__(self):
    _check_tower(self)
    positive(self, 'num_channels')
    positive(self, 'image_size', 'patch_size', most=MOST_EDGE)
    require(
      self.image_size % self.patch_size == 0,
      f'CLIPVisionConfig.image_size={self.image_size} must be a multiple of patch_size='
      f'{self.patch_size}.',
    )


@dataclasses.dataclass(frozen=True)
class CLIPVisionProjectionConfig(CLIPVisionConfig):
  """The vision tower and the width of its projection."""

  projection_dim: int = 512

  def __post_init__(self):
    super().__post_init__()
    positive(self, 'projection_dim')


@dataclasses.dataclass(frozen=True)
class CLIPConfig:
  """Both towers, the width of the space they share, and where the log of 1/temperature starts."""

  text_config: CLIPTextConfig = CLIPTextConfig()
  vision_config: CLIPVisionConfig = CLIPVisionConfig()
  projection_dim: int = 512
  logit_scale_init_value: float = 2.6592

  def __post_init__(self):
    positive(self, 'projection_dim')
