"""Text to image: prompts -> text embeddings -> latents by a sampler -> images by the decoder."""

import dataclasses
from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from transformers import PreTrainedTokenizerBase

from diffusion_jax.diffusion.denoiser import BLIND_AT_ZERO_SNR, TextDenoiser, text_denoiser
from diffusion_jax.diffusion.guidance import classifier_free
from diffusion_jax.diffusion.samplers import initial_noise, sampler, sampling_grid
from diffusion_jax.diffusion.schedules import Schedule
from diffusion_jax.errors import UserError
from diffusion_jax.models.functional import Network
from diffusion_jax.models.text.tokenizer import Tokenize
from diffusion_jax.parallel.sharding import in_batches, put_params
from diffusion_jax.types import Images, Latents, Params, Text, Tokens
from diffusion_jax.viz.grids import to_uint8


@dataclasses.dataclass(frozen=True)
class SampleConfig:
  """How to sample: names of `SAMPLERS` and `SPACINGS` in `diffusion.samplers`.

  guidance is the classifier-free scale; 1 means none.
  """

  sampler: str = 'dpmpp_2m'
  steps: int = 20
  guidance: float = 4.0
  spacing: str = 'trailing'

  def check(self, schedule: Schedule, prediction: str) -> None:
    """Raises a UserError for what cannot be sampled."""
    sampler(self.sampler)
    sampling_grid(schedule, self.steps, self.spacing)
    if prediction in BLIND_AT_ZERO_SNR and schedule.zero_terminal:
      raise UserError(
        f'the prediction {prediction!r} says nothing at zero terminal SNR; set task.prediction to '
        'v_prediction, or schedule.rescale_betas_zero_snr to False.'
      )


class Weights(NamedTuple):
  """Parameters of the three networks, on the mesh."""

  unet: Params
  autoencoder: Params
  clip: Params


def fold(x: Latents, patch: int) -> Latents:
  """Squares of positions become channels: [b h w c] -> [b h/patch w/patch patch*patch*c]."""
  b, h, w, c = x.shape
  x = x.reshape(b, h // patch, patch, w // patch, patch, c).swapaxes(2, 3)
  return x.reshape(b, h // patch, w // patch, patch * patch * c)


def unfold(x: Latents, patch: int) -> Latents:
  """Inverse of `fold`."""
  b, h, w, c = x.shape
  x = x.reshape(b, h, w, patch, patch, c // patch**2).swapaxes(2, 3)
  return x.reshape(b, h * patch, w * patch, c // patch**2)


@dataclasses.dataclass(frozen=True, eq=False)
class TextToImage:
  """A latent diffusion model without its weights."""

  unet: Network
  autoencoder: Network
  clip: Network
  schedule: Schedule
  prediction: str
  tokenizer: PreTrainedTokenizerBase
  latent_patch_size: int = 1

  @property
  def latent_shape(self) -> tuple[int, int, int]:
    """[h w c] of one latent."""
    size = self.unet.config.sample_size
    return size, size, self.unet.config.in_channels

  @property
  def image_size(self) -> int:
    """Edge of the images in pixels."""
    places = self.unet.config.sample_size * self.latent_patch_size
    return places * self.autoencoder.config.factor

  @property
  def context(self) -> int:
    """Length of a prompt in tokens, both frame tokens included."""
    return self.clip.config.text_config.max_position_embeddings

  def on_mesh(self, weights: Weights, mesh: Mesh) -> Weights:
    """Host arrays onto their shards."""
    return Weights(*(put_params(params, mesh) for params in weights))

  def tokens(self, prompts: Sequence[str], on_long: str = 'truncate') -> np.ndarray:
    """Prompts -> int32 [n l]. With on_long='error' a prompt that does not fit is a UserError."""
    return Tokenize(self.tokenizer, self.context, on_long).batch(list(prompts))

  def encode_text(self, clip: Params, tokens: Tokens) -> Text:
    """Tokens [b l] -> the text tower's last hidden states [b l d], float32."""
    return self.clip.bind(clip).encode_text(tokens)[0].astype(jnp.float32)

  def denoiser(self, unet: Params) -> TextDenoiser:
    """D(x, alpha, sigma, text) -> estimate of the clean latents, by the U-Net without guidance."""
    module = self.unet.bind(unet)
    return text_denoiser(lambda x, t, text: module(x, t, text), self.schedule, self.prediction)

  def sample_latents(
    self, unet: Params, noise: Latents, keys: jax.Array, text: Text, negative: Text,
    config: SampleConfig,
  ) -> Latents:
    """Unit noise [b h w c], one key per image, text and negative [b l d] -> latents."""
    guided = classifier_free(self.denoiser(unet), text, negative, config.guidance)
    grid = sampling_grid(self.schedule, config.steps, config.spacing)
    return sampler(config.sampler)(guided, noise, grid, keys)

  def latents(self, z: Latents) -> Latents:
    """The autoencoder's latents -> what the U-Net sees: unit variance, folded."""
    config = self.autoencoder.config
    return fold((z - config.shift_factor) * config.scaling_factor, self.latent_patch_size)

  def decode(self, autoencoder: Params, latents: Latents) -> Images:
    """What the U-Net sees -> images [b h w 3] in [-1, 1]."""
    config = self.autoencoder.config
    z = unfold(latents, self.latent_patch_size) / config.scaling_factor + config.shift_factor
    images = self.autoencoder.bind(autoencoder).decode(z)
    return jnp.clip(images.astype(jnp.float32), -1.0, 1.0)

  @partial(jax.jit, static_argnums=(0, 6))
  def _draw(self, weights: Weights, noise, keys, tokens, negative, config) -> Images:
    text = self.encode_text(weights.clip, jnp.concatenate([tokens, negative]))
    text, negative = jnp.split(text, 2)
    keys = jax.random.wrap_key_data(keys)
    latents = self.sample_latents(weights.unet, noise, keys, text, negative, config)
    return self.decode(weights.autoencoder, latents)

  def generate(
    self, weights: Weights, prompts: Sequence[str], config: SampleConfig, *, seed: int, mesh: Mesh,
    negative: str = '', batch_size: int = 16, first: int = 0,
  ) -> Iterator[np.ndarray]:
    """Yields images, uint8 [b h w 3], batch after batch; one compilation for all.

    Image i depends on the seed, its number first + i and its prompt, not on the batch it is in.
    """
    config.check(self.schedule, self.prediction)
    tokens = self.tokens(prompts)
    null = np.repeat(self.tokens([negative]), len(prompts), axis=0)
    noise, keys = initial_noise(seed, first, len(prompts), self.latent_shape)
    draw = lambda weights, *rows: self._draw(weights, *rows, config)
    rows = (np.asarray(noise), np.asarray(jax.random.key_data(keys)), tokens, null)
    for images in in_batches(draw, weights, *rows, mesh=mesh, batch_size=batch_size):
      yield to_uint8(images)
