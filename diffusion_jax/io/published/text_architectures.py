"""Configs of the text encoders that published diffusion models use."""

from diffusion_jax.models.text.clip_config import CLIPTextConfig, CLIPTextProjectionConfig
from diffusion_jax.models.text.t5_config import T5Config

TEXT_ENCODERS: dict[str, CLIPTextConfig | T5Config] = {
  # OpenAI's ViT-L/14: Stable Diffusion 1, and the first text encoder of XL.
  'clip_l': CLIPTextConfig(
    hidden_size=768, intermediate_size=3072, num_attention_heads=12, eos_token_id=2
  ),
  # OpenCLIP's ViT-H/14 without its last layer: Stable Diffusion 2.
  'openclip_h': CLIPTextConfig(
    hidden_size=1024, intermediate_size=4096, num_hidden_layers=23, num_attention_heads=16,
    hidden_act='gelu', eos_token_id=2,
  ),
  # OpenCLIP's ViT-bigG/14: the second text encoder of Stable Diffusion XL.
  'openclip_bigg': CLIPTextProjectionConfig(
    hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=20,
    hidden_act='gelu', eos_token_id=2, projection_dim=1280,
  ),
  't5_v1_1_small': T5Config(
    d_ff=1024, num_layers=8, num_heads=6, feed_forward_proj='gated-gelu'
  ),
  # Stable Diffusion 3, PixArt, Imagen.
  't5_v1_1_xxl': T5Config(
    d_model=4096, d_ff=10240, num_layers=24, num_heads=64, feed_forward_proj='gated-gelu'
  ),
}
