"""The autoencoders: config.json and published configs."""

import dataclasses
from typing import Any

from diffusion_jax.formats.published import ANY, NetworkFormat
from diffusion_jax.models.autoencoder import AutoencoderKL, AutoencoderKLConfig
from diffusion_jax.models.autoencoder_tiny import AutoencoderTiny, AutoencoderTinyConfig
from diffusion_jax.models.dvae import DiscreteVAE, DVAEConfig
from diffusion_jax.models.fsq import FSQConfig, FSQModel
from diffusion_jax.models.vq import VQConfig, VQModel

# Autoencoders saved before diffusers 0.18 name the parts of their attention so.
_OLD_ATTENTION = {'query': 'to_q', 'key': 'to_k', 'value': 'to_v', 'proj_attn': 'to_out.0'}


def new_attention(name: str) -> str:
  """Return the name of today of a tensor."""
  parts = name.split('.')
  if len(parts) >= 4 and parts[-4] == 'attentions':
    parts[-2] = _OLD_ATTENTION.get(parts[-2], parts[-2])
  return '.'.join(parts)


class _AutoencoderFormat(NetworkFormat):
  """Without what diffusers fails on: a sample_size of null, and a shift_factor of 0."""

  def describe(self, config: Any) -> dict[str, Any]:
    values = super().describe(config)
    if config.sample_size is None:
      del values['sample_size']
    if 'shift_factor' in values:
      values['shift_factor'] = config.shift_factor or None
    return values


AUTOENCODER = _AutoencoderFormat(
  AutoencoderKL, AutoencoderKLConfig, ('AutoencoderKL',), accepted={'act_fn': 'silu'},
  defaults={'block_out_channels': [64], 'layers_per_block': 1}, written={'act_fn': 'silu'},
  rename=new_attention,
)
VQ = _AutoencoderFormat(
  VQModel, VQConfig, ('VQModel',),
  accepted={'act_fn': 'silu', 'norm_type': 'group', 'force_upcast': ANY},
  defaults={'block_out_channels': [64], 'layers_per_block': 1, 'num_vq_embeddings': 256},
  written={'act_fn': 'silu', 'norm_type': 'group'}, rename=new_attention,
)
FSQ = _AutoencoderFormat(FSQModel, FSQConfig, ('FSQModel',))
DVAE = _AutoencoderFormat(DiscreteVAE, DVAEConfig, ('DiscreteVAE',))
TINY = NetworkFormat(AutoencoderTiny, AutoencoderTinyConfig, ('AutoencoderTiny',), accepted={
  'upsample_fn': 'nearest', 'upsampling_scaling_factor': 2, 'force_upcast': ANY,
  'block_out_channels': ANY,  # A copy of decoder_block_out_channels.
})

QUANTIZED = ('vq', 'fsq', 'dvae')
"""The rows of `registry.NETWORKS` whose latents are codes."""

_SIXTEEN = AutoencoderKLConfig(
  latent_channels=16, scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False,
  use_post_quant_conv=False, sample_size=1024,
)
AUTOENCODERS: dict[str, AutoencoderKLConfig | AutoencoderTinyConfig | VQConfig] = {
  'sd15': AutoencoderKLConfig(sample_size=512),
  'sd21': AutoencoderKLConfig(sample_size=768),
  'sdxl': AutoencoderKLConfig(sample_size=1024, scaling_factor=0.13025),
  'sd_x4_upscaler': AutoencoderKLConfig(
    block_out_channels=(128, 256, 512), scaling_factor=0.08333, sample_size=256
  ),
  'sd3': _SIXTEEN, 'flux': dataclasses.replace(
    _SIXTEEN, scaling_factor=0.3611, shift_factor=0.1159
  ),
  'taesd': AutoencoderTinyConfig(),
  'vq_f4': VQConfig(sample_size=256),  # Latent diffusion's, with 8192 codes of 3 channels.
}
"""The published autoencoders by name, as their config.json describe them."""
