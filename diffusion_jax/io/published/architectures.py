"""The published networks by name, as their config.json describe them."""

from diffusion_jax.models.controlnet import ControlNetConfig
from diffusion_jax.models.unet_config import UNetConfig

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
}

CONTROLNETS: dict[str, ControlNetConfig] = {
  name: ControlNetConfig.for_unet(UNETS[name]) for name in ('sd15', 'sdxl')
}
