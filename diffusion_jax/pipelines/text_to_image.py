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

from diffusion_jax.diffusion.denoiser import TextDenoiser, text_denoiser
from diffusion_jax.diffusion.samplers import initial_noise, sampler
from diffusion_jax.diffusion.schedules import Schedule
from diffusion_jax.errors import UserError
from diffusion_jax.models.functional import Network
from diffusion_jax.models.text.tokenizer import Tokenize
from diffusion_jax.parallel.sharding import in_batches, put_params
from diffusion_jax.pipelines.sampling import Numbers, Program, SampleConfig
from diffusion_jax.types import Images, Latents, Params, Text, Tokens
from diffusion_jax.viz.grids import to_uint8


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

  @property
  def learned_variance(self) -> bool:
    """Whether the U-Net predicts a variance, too, in as many channels again."""
    return self.unet.config.out_channels == 2 * self.unet.config.in_channels

  def denoiser(self, unet: Params, variance: bool = False) -> TextDenoiser:
    """D(x, alpha, sigma, text) -> estimate of the clean latents, by the U-Net without guidance."""
    module = self.unet.bind(unet)
    network = lambda x, t, text: module(x, t, text)
    return text_denoiser(network, self.schedule, self.prediction, variance)

  def sample_latents(
    self, unet: Params, x: Latents, keys: jax.Array, text: Text, negative: Text,
    program: Program, numbers: Numbers,
  ) -> Latents:
    """Noise or noised latents x [b h w c], one key per image, text and negative [b l d]."""
    variance = self.learned_variance and program.sampler == 'ddpm'
    denoise = self.denoiser(unet, variance)
    guided = program.guide(denoise, text, negative, numbers, self.prediction)
    draw = sampler('ddpm', variance='learned') if variance else sampler(program.sampler)
    return draw(guided, x, numbers.grid, keys)

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

  @partial(jax.jit, static_argnums=0)
  def _encode(self, autoencoder: Params, images) -> Latents:
    """Images uint8 [b h w 3] -> means of their latents as the U-Net sees them."""
    mean, _ = self.autoencoder.bind(autoencoder).encode(images / jnp.float32(127.5) - 1)
    return self.latents(mean.astype(jnp.float32))

  @partial(jax.jit, static_argnums=(0, 6))
  def _draw(self, weights: Weights, x, keys, tokens, negative, program, numbers) -> Images:
    text = self.encode_text(weights.clip, jnp.concatenate([tokens, negative]))
    text, negative = jnp.split(text, 2)
    keys = jax.random.wrap_key_data(keys)
    latents = self.sample_latents(weights.unet, x, keys, text, negative, program, numbers)
    return self.decode(weights.autoencoder, latents)

  def _noised(self, autoencoder: Params, images, noise, pair, mesh, batch_size) -> np.ndarray:
    """alpha x_0 + sigma eps of uint8 images [1 or n h w 3] and noise [n h w c]."""
    edge = self.image_size
    if images.dtype != np.uint8 or images.shape[1:] != (edge, edge, 3):
      raise UserError(
        f'images to start from are {images.dtype} {list(images.shape)}; give uint8 [n, {edge}, '
        f'{edge}, 3].'
      )
    if len(images) not in (1, len(noise)):
      raise UserError(f'{len(images)} images do not fit {len(noise)} prompts; give 1, or as many.')
    z = in_batches(self._encode, autoencoder, images, mesh=mesh,
                   batch_size=min(batch_size, len(images)))
    return pair[0] * np.concatenate(list(z)) + pair[1] * noise

  def generate(
    self, weights: Weights, prompts: Sequence[str], config: SampleConfig, *, seed: int, mesh: Mesh,
    negative: str = '', batch_size: int = 16, first: int = 0, images: np.ndarray | None = None,
    strength: float = 0.8,
  ) -> Iterator[np.ndarray]:
    """Yields images, uint8 [b h w 3], batch after batch; one compilation for all.

    Image i depends on the seed, its number first + i and its prompt, not on the batch it is in.
    What is compiled depends on the config's `program` alone, and on the batch size.

    Args:
      images: uint8 [n h w 3], one for each prompt, or one for all: image-to-image (Meng et al.
        2022, SDEdit), which noises them and takes the last steps only.
      strength: of image-to-image: the share of the steps in (0, 1]; 1 keeps least of an image.

    Raises:
      UserError: for a config that cannot be sampled, and images that do not fit.
    """
    config.check(self.schedule, self.prediction)
    tokens = self.tokens(prompts)
    null = np.repeat(self.tokens([negative]), len(prompts), axis=0)
    noise, keys = initial_noise(seed, first, len(prompts), self.latent_shape)
    x, keys = np.asarray(noise), np.asarray(jax.random.key_data(keys))
    numbers = config.numbers(self.schedule, 1.0 if images is None else strength)
    if images is not None:
      pair = [part[0] for part in numbers.grid]
      x = self._noised(weights.autoencoder, images, x, pair, mesh, batch_size)
    draw = lambda weights, *rows: self._draw(weights, *rows, config.program, numbers)
    for out in in_batches(draw, weights, x, keys, tokens, null, mesh=mesh, batch_size=batch_size):
      yield to_uint8(out)
