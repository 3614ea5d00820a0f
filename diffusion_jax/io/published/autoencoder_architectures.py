"""Configs of published autoencoders, by name."""

from diffusion_jax.models.autoencoder import AutoencoderKLConfig
from diffusion_jax.models.autoencoder_tiny import AutoencoderTinyConfig
from diffusion_jax.models.vq import VQConfig

AUTOENCODERS: dict[str, AutoencoderKLConfig | AutoencoderTinyConfig | VQConfig] = {
  'sd15': AutoencoderKLConfig(sample_size=512),
  'sd21': AutoencoderKLConfig(sample_size=768),
  'sdxl': AutoencoderKLConfig(sample_size=1024, scaling_factor=0.13025),
  'sd_x4_upscaler': AutoencoderKLConfig(
    block_out_channels=(128, 256, 512), scaling_factor=0.08333, sample_size=256
  ),
  'taesd': AutoencoderTinyConfig(),
  'vq_f4': VQConfig(sample_size=256),  # Latent diffusion's, with 8192 codes of 3 channels.
}
"""What the published config.json say, without weights: what `KINDS` would read from them."""
