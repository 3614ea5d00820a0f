"""The published models by name: every part's config, without weights."""

import dataclasses
import functools

import jax.numpy as jnp

from diffusion_jax.diffusion.noise import NoiseConfig, NoiseSchedule
from diffusion_jax.diffusion.parameterization import Parameterization
from diffusion_jax.formats.autoencoder import AUTOENCODERS
from diffusion_jax.formats.clip import TEXT_ENCODERS
from diffusion_jax.formats.networks import network_format
from diffusion_jax.formats.unet import UNETS
from diffusion_jax.pipelines.assembly import make_model
from diffusion_jax.pipelines.model import Diffusion
from diffusion_jax.pipelines.spaces import LatentSpace
from diffusion_jax.pipelines.text_conditioners import ROLES, TextEncoders, clip_readers


@dataclasses.dataclass(frozen=True)
class Architecture:
  """Names in UNETS, AUTOENCODERS and TEXT_ENCODERS, and what the U-Net predicts."""

  unet: str
  autoencoder: str
  text: tuple[str, ...]
  prediction: str = 'epsilon'


ARCHITECTURES = {
  'sd15': Architecture('sd15', 'sd15', ('clip_l',)),
  'sd15_inpaint': Architecture('sd15_inpaint', 'sd15', ('clip_l',)),
  'sd21_base': Architecture('sd21_base', 'sd21', ('openclip_h',)),
  'sd21': Architecture('sd21', 'sd21', ('openclip_h',), 'v_prediction'),
  'sdxl': Architecture('sdxl', 'sdxl', ('clip_l', 'openclip_bigg')),
}


@functools.cache
def architecture_model(name: str, dtype=jnp.float32) -> Diffusion:
  """The model of that name without weights and tokenizers; nothing is allocated."""
  a = ARCHITECTURES[name]
  sdxl = len(a.text) > 1
  networks = {}
  for role, encoder in zip(ROLES, a.text, strict=False):
    config = TEXT_ENCODERS[encoder]
    kind = 'clip_text_projection' if role == ROLES[1] else 'clip_text'
    networks[role] = network_format(kind).network(config, dtype=dtype)
  readers = clip_readers(networks, [None] * len(networks), skip=int(sdxl), normalize=not sdxl)
  text = TextEncoders(
    networks, readers, (tuple(networks),), pooled=(ROLES[1],) if sdxl else (), zero_null=sdxl
  )
  denoiser = network_format('unet').network(UNETS[a.unet], dtype=dtype)
  autoencoder = network_format('autoencoder').network(AUTOENCODERS[a.autoencoder], dtype=dtype)
  return make_model(
    denoiser, LatentSpace(autoencoder), {'text': text}, NoiseSchedule.of(NoiseConfig()),
    Parameterization(a.prediction),
  )
