"""The published models by name: every part's config, without weights."""

import dataclasses
import functools

import jax.numpy as jnp

from diffusion_jax.diffusion.noise import NoiseConfig, NoiseSchedule
from diffusion_jax.diffusion.parameterization import Parameterization
from diffusion_jax.formats.autoencoder import AUTOENCODERS
from diffusion_jax.formats.clip import TEXT_ENCODERS
from diffusion_jax.formats.dit import TRANSFORMERS
from diffusion_jax.formats.networks import format_of
from diffusion_jax.formats.t5 import T5_ENCODERS
from diffusion_jax.formats.unet import UNETS
from diffusion_jax.models.network import Network
from diffusion_jax.pipelines.assembly import make_model
from diffusion_jax.pipelines.model import Diffusion
from diffusion_jax.pipelines.published import FIRST, SECOND, THIRD, joined_texts, published
from diffusion_jax.pipelines.spaces import LatentSpace


@dataclasses.dataclass(frozen=True)
class Architecture:
  """Names in DENOISERS, AUTOENCODERS and ENCODERS, what the denoiser predicts, and its noise.

  kind: the class of its pipeline in diffusers, where `pipelines.published` has a row for it.
  roles: of the text encoders, of which there may be fewer.
  """

  denoiser: str
  autoencoder: str
  text: tuple[str, ...]
  prediction: str = 'epsilon'
  kind: str | None = None
  noise: NoiseConfig = NoiseConfig()
  roles: tuple[str, ...] = (FIRST, SECOND, THIRD)


DENOISERS = UNETS | TRANSFORMERS
ENCODERS = TEXT_ENCODERS | T5_ENCODERS

_SD3 = Architecture(
  'sd3_medium', 'sd3', ('clip_l_projection', 'openclip_bigg', 't5_v1_1_xxl'), 'flow_prediction',
  'StableDiffusion3Pipeline', NoiseConfig('flow', shift=3.0, label='sigma'),
)
_FLUX = Architecture(
  'flux_dev', 'flux', ('clip_l', 't5_v1_1_xxl'), 'flow_prediction', 'FluxPipeline',
  NoiseConfig('flow', label='sigma'),
)
_PIXART = Architecture(
  'pixart_alpha', 'sd15', ('t5_v1_1_xxl',), kind='PixArtAlphaPipeline',
  noise=NoiseConfig('linear', 0.0001, 0.02),
)
ARCHITECTURES = {
  'sd15': Architecture('sd15', 'sd15', ('clip_l',)),
  'sd15_inpaint': Architecture('sd15_inpaint', 'sd15', ('clip_l',)),
  'sd21_base': Architecture('sd21_base', 'sd21', ('openclip_h',)),
  'sd21': Architecture('sd21', 'sd21', ('openclip_h',), 'v_prediction'),
  'sdxl': Architecture('sdxl', 'sdxl', ('clip_l', 'openclip_bigg')),
  'sdxl_refiner': Architecture('sdxl_refiner', 'sdxl', ('openclip_bigg',), roles=(SECOND,)),
  'lcm_sd15': Architecture(
    'lcm_sd15', 'sd15', ('clip_l',), kind='LatentConsistencyModelPipeline'
  ),
  **{name: dataclasses.replace(_SD3, denoiser=name)
     for name in ('sd3_medium', 'sd35_medium', 'sd35_large')},
  **{name: dataclasses.replace(_FLUX, denoiser=name) for name in ('flux_dev', 'flux_schnell')},
  'pixart_alpha': _PIXART,
  'pixart_sigma': dataclasses.replace(
    _PIXART, denoiser='pixart_sigma', autoencoder='sdxl', kind='PixArtSigmaPipeline'
  ),
}


@functools.cache
def architecture_model(name: str, dtype=jnp.float32) -> Diffusion:
  """The model of that name without weights and tokenizers; nothing is allocated."""
  a = ARCHITECTURES[name]
  row = published(a.kind, a.roles[: len(a.text)])

  def network(config) -> Network:
    return format_of(config).network(config, dtype=dtype)

  networks = {
    role: network(ENCODERS[encoder]) for role, encoder in zip(row.encoders, a.text, strict=True)
  }
  denoiser = DENOISERS[a.denoiser]
  return make_model(
    network(denoiser), LatentSpace(network(AUTOENCODERS[a.autoencoder])),
    {'text': joined_texts(row, networks, {}, denoiser)}, NoiseSchedule.of(a.noise),
    Parameterization(a.prediction),
  )
