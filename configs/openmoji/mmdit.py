"""An MMDiT as in Stable Diffusion 3.5, of the quickstart's size: text and image attend jointly."""

from diffusion_jax.configs.openmoji import dit_flow
from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  config = dit_flow.get_config()
  config.settings.denoiser = ConfigDict({
    'type': 'mmdit', 'sample_size': 16, 'patch_size': 2, 'in_channels': 4, 'out_channels': 4,
    'num_layers': 5, 'num_attention_heads': 4, 'attention_head_dim': 32,
    'caption_projection_dim': 128, 'joint_attention_dim': 128, 'pooled_projection_dim': None,
    'positions': 'rotary', 'qk_norm': 'rms_norm',
  })
  return config
