"""The U-Nets and the ControlNet: config.json and published configs."""

from collections.abc import Mapping
from typing import Any

from diffusion_jax.errors import require
from diffusion_jax.formats.autoencoder import new_attention
from diffusion_jax.formats.published import ANY, NetworkFormat
from diffusion_jax.models.controlnet import ControlNet, ControlNetConfig
from diffusion_jax.models.unet import UNet, UNetConfig
from diffusion_jax.models.unet2d import UNet2D, UNet2DConfig

_BOTH = {
  'act_fn': 'silu', 'downsample_padding': 1, 'mid_block_scale_factor': 1,
  'addition_embed_type_num_heads': ANY,
}
_UNET = _BOTH | {
  'center_input_sample': False, 'dropout': 0.0, 'dual_cross_attention': False,
  'resnet_skip_time_act': False, 'resnet_out_scale_factor': 1.0, 'conv_in_kernel': 3,
  'conv_out_kernel': 3, 'time_embedding_type': 'positional', 'attention_type': 'default',
  'class_embeddings_concat': False,
  'mid_block_only_cross_attention': ANY,  # Of a mid block that we refuse.
}


class _UNetFormat(NetworkFormat):
  """Null for false, as diffusers takes it; of a ControlNet, num_attention_heads comes first."""

  def parse(self, values: Mapping[str, Any], where: str) -> Any:
    values = dict(values)
    if values.get('upcast_attention') is None:
      values['upcast_attention'] = False
    if self.module is ControlNet and (heads := values.pop('num_attention_heads', None)) is not None:
      values['attention_head_dim'] = heads
    return super().parse(values, where)


UNET = _UNetFormat(
  UNet, UNetConfig, ('UNet2DConditionModel',), accepted=_UNET,
  defaults={'sample_size': None, 'cross_attention_dim': 1280}, written={'act_fn': 'silu'},
)
CONTROLNET = _UNetFormat(
  ControlNet, ControlNetConfig, ('ControlNetModel',), accepted=_BOTH,
  defaults={'cross_attention_dim': 1280}, written={'act_fn': 'silu'},
)
_SHARED = ('act_fn', 'mid_block_scale_factor', 'center_input_sample', 'time_embedding_type')


class _UNet2DFormat(NetworkFormat):
  """Where the time scales and shifts, diffusers leaves out the mid block's norm unless it is told
  of groups for it: of such networks those that have it are read and written."""

  def parse(self, values: Mapping[str, Any], where: str) -> Any:
    values = dict(values)
    groups, config = values.pop('attn_norm_num_groups', None), super().parse(values, where)
    require(
      groups == self._groups(config) or not config.add_attention,
      f'{where}: attn_norm_num_groups={groups!r:.40} is not implemented (only '
      f'{self._groups(config)} is).',
    )
    return config

  def describe(self, config: Any) -> dict[str, Any]:
    return super().describe(config) | {'attn_norm_num_groups': self._groups(config)}

  def _groups(self, config: Any) -> int | None:
    return None if config.resnet_time_scale_shift == 'default' else config.norm_num_groups


UNET2D = _UNet2DFormat(
  UNet2D, UNet2DConfig, ('UNet2DModel',), written={'act_fn': 'silu'}, rename=new_attention,
  accepted={name: (_BOTH | _UNET)[name] for name in _SHARED} | {
    'dropout': ANY,  # Of training alone.
    'downsample_type': 'conv', 'upsample_type': 'conv', 'num_train_timesteps': ANY,
    'mid_block_type': 'UNetMidBlock2D',
  },
)


_CROSS, _PLAIN = 'CrossAttnDownBlock2D', 'DownBlock2D'
_UP_CROSS, _UP_PLAIN = 'CrossAttnUpBlock2D', 'UpBlock2D'
_SD2 = dict(
  cross_attention_dim=1024, attention_head_dim=(5, 10, 20, 20), use_linear_projection=True
)

UNETS: dict[str, UNetConfig] = {
  'sd15': UNetConfig(),
  # Latents, mask, and latents of the masked image.
  'sd15_inpaint': UNetConfig(in_channels=9),
  # Latents and those of the image to edit.
  'instruct_pix2pix': UNetConfig(in_channels=8),
  'sd21_base': UNetConfig(**_SD2),
  'sd21': UNetConfig(**_SD2, sample_size=96, upcast_attention=True),
  # Latents and depth.
  'sd2_depth': UNetConfig(**_SD2, in_channels=5),
  # Latents and the small image; the label is the noise level of the latter.
  'sd_x4_upscaler': UNetConfig(
    in_channels=7, sample_size=128, block_out_channels=(256, 512, 512, 1024),
    down_block_types=(_PLAIN, _CROSS, _CROSS, _CROSS),
    up_block_types=(_UP_CROSS, _UP_CROSS, _UP_CROSS, _UP_PLAIN),
    cross_attention_dim=1024, only_cross_attention=(True, True, True, False),
    num_class_embeds=1000, use_linear_projection=True,
  ),
  'sdxl': UNetConfig(
    sample_size=128, block_out_channels=(320, 640, 1280),
    down_block_types=(_PLAIN, _CROSS, _CROSS), up_block_types=(_UP_CROSS, _UP_CROSS, _UP_PLAIN),
    cross_attention_dim=2048, attention_head_dim=(5, 10, 20),
    transformer_layers_per_block=(1, 2, 10), use_linear_projection=True,
    addition_embed_type='text_time', addition_time_embed_dim=256,
    projection_class_embeddings_input_dim=2816,
  ),
  # Its second text encoder alone; one size fewer, with a score.
  'sdxl_refiner': UNetConfig(
    sample_size=128, block_out_channels=(384, 768, 1536, 1536),
    down_block_types=(_PLAIN, _CROSS, _CROSS, _PLAIN),
    up_block_types=(_UP_PLAIN, _UP_CROSS, _UP_CROSS, _UP_PLAIN),
    cross_attention_dim=1280, attention_head_dim=(6, 12, 24, 24), transformer_layers_per_block=4,
    use_linear_projection=True, addition_embed_type='text_time', addition_time_embed_dim=256,
    projection_class_embeddings_input_dim=2560,
  ),
  # Dreamshaper's latent consistency model.
  'lcm_sd15': UNetConfig(time_cond_proj_dim=256, sample_size=96),
}
"""The published U-Nets by name, as their config.json describe them."""

_DOWN, _UP = _PLAIN, _UP_PLAIN
_ATTN, _UP_ATTN = 'AttnDownBlock2D', 'AttnUpBlock2D'
_DDPM = dict(
  attention_head_dim=None, downsample_padding=0, flip_sin_to_cos=False, freq_shift=1, norm_eps=1e-6,
)

UNETS2D: dict[str, UNet2DConfig] = {
  # Of Ho et al. 2020, appendix B.
  'ddpm_cifar10': UNet2DConfig(
    **_DDPM, sample_size=32, block_out_channels=(128, 256, 256, 256),
    down_block_types=(_DOWN, _ATTN, _DOWN, _DOWN), up_block_types=(_UP, _UP, _UP_ATTN, _UP),
  ),
  'ddpm_256': UNet2DConfig(
    **_DDPM, sample_size=256, block_out_channels=(128, 128, 256, 256, 512, 512),
    down_block_types=(_DOWN, _DOWN, _DOWN, _DOWN, _ATTN, _DOWN),
    up_block_types=(_UP, _UP_ATTN, _UP, _UP, _UP, _UP),
  ),
}
"""Those of DDPM."""

CONTROLNETS: dict[str, ControlNetConfig] = {
  name: ControlNetConfig.for_unet(UNETS[name]) for name in ('sd15', 'sdxl')
}
