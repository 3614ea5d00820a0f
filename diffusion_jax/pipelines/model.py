"""Text to image: prompts -> text embeddings -> latents by a sampler -> images by the decoder.

The same model draws with whatever else its U-Net takes: see `pipelines.conditions`.
"""

import dataclasses
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from diffusion_jax.backend.xla import jitted
from diffusion_jax.diffusion.denoiser import Label, TextDenoiser, make_denoiser
from diffusion_jax.diffusion.noise import NoiseSchedule, Schedule
from diffusion_jax.diffusion.parameterization import Parameterization
from diffusion_jax.diffusion.samplers import initial_noise, sampler
from diffusion_jax.errors import UserError
from diffusion_jax.limits import check_seed
from diffusion_jax.models.autoencoder import decode_sliced, decode_tiled
from diffusion_jax.models.network import Network
from diffusion_jax.models.unet import UNet, UNetConfig
from diffusion_jax.parallel.mesh import in_batches, put_params, whole_batch
from diffusion_jax.pipelines.conditioners import ImageEncoder, TextEncoders
from diffusion_jax.pipelines.conditions import Inputs, check_edited, prepared
from diffusion_jax.pipelines.sampling import Numbers, Program, SampleConfig
from diffusion_jax.pixels import to_uint8
from diffusion_jax.types import Condition, Images, Latents, Params, Tokens, Weights

__all__ = ['Diffusion', 'SampleConfig', 'Weights', 'fold', 'unfold']


DECODERS = {
  'whole': lambda autoencoder, z: autoencoder.decode(z), 'sliced': decode_sliced,
  'tiled': decode_tiled,
}


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
class Diffusion:
  """A latent diffusion model without its weights.

  `controlnet` adds to the U-Net's skips where there is one; `small_schedule` has the noise levels
  of the small pictures that an upscaler enlarges.
  """

  unet: Network
  autoencoder: Network
  text: TextEncoders | ImageEncoder
  noise: NoiseSchedule
  parameterization: Parameterization
  latent_patch_size: int = 1
  controlnet: Network | None = None
  small_schedule: Schedule | None = None

  @property
  def networks(self) -> dict[str, Network]:
    """Every network by role."""
    own = {'unet': self.unet, 'autoencoder': self.autoencoder, **self.text.networks}
    return own | ({'controlnet': self.controlnet} if self.controlnet else {})

  @property
  def channels(self) -> int:
    """Channels of one latent, as the U-Net sees it."""
    return self.autoencoder.config.latent_channels * self.latent_patch_size**2

  @property
  def latent_shape(self) -> tuple[int, int, int]:
    """[h w c] of one latent."""
    size = self.unet.config.sample_size
    return size, size, self.channels

  @property
  def image_size(self) -> int:
    """Edge of the images in pixels."""
    places = self.unet.config.sample_size * self.latent_patch_size
    return places * self.autoencoder.config.factor

  @property
  def beside(self) -> int:
    """Channels that the U-Net takes beside the latents."""
    return self.unet.config.in_channels - self.channels

  def with_unet(self, config: UNetConfig) -> 'Diffusion':
    """The same model with a U-Net of another config."""
    return dataclasses.replace(self, unet=Network.of(UNet, config, self.unet.compute))

  def with_remat(self, remat: str) -> 'Diffusion':
    """The same model for training: of its networks, the backward pass keeps less.

    The autoencoder is left out, because no gradient passes through it.
    """
    if remat == 'none':
      return self
    less = lambda network: network and network.with_remat(remat)
    return dataclasses.replace(
      self, unet=less(self.unet), controlnet=less(self.controlnet),
      text=self.text.replaced({role: less(n) for role, n in self.text.networks.items()}),
    )

  def with_attention(self, attention: str) -> 'Diffusion':
    """The same model, whose U-Net and ControlNet compute attention in that way.

    Others choose for themselves: the one head of an autoencoder is too wide for kernels.
    """
    control = self.controlnet and self.controlnet.with_attention(attention)
    return dataclasses.replace(self, unet=self.unet.with_attention(attention), controlnet=control)

  def with_matmul_precision(self, precision: str) -> 'Diffusion':
    """The same model for training, whose U-Net and ControlNet multiply in that way."""
    if precision == 'plain':
      return self
    control = self.controlnet and self.controlnet.with_matmul_precision(precision)
    return dataclasses.replace(
      self, unet=self.unet.with_matmul_precision(precision), controlnet=control
    )

  def on_mesh(self, weights: Weights, mesh: Mesh) -> Weights:
    """Host arrays onto their shards."""
    return {role: put_params(params, mesh) for role, params in weights.items()}

  def tokens(self, prompts: Sequence[str], on_long: str = 'truncate') -> np.ndarray:
    """Prompts -> int32 [n e l]. With on_long='error' a prompt that does not fit is a UserError."""
    return self.text.tokens(prompts, on_long)

  def encode_text(self, weights: Weights, tokens: Tokens, clip_skip: int = 0) -> Condition:
    """Tokens [b e l] -> what the U-Net is told of them; SDXL's sizes are those of whole images."""
    return self.with_sizes(self.text.encode(weights, tokens, clip_skip))

  def with_sizes(self, condition: Condition, sizes: jax.Array | None = None) -> Condition:
    """Adds the sizes [b 6] that SDXL is told, those of whole images where none are given."""
    if getattr(self.unet.config, 'addition_embed_type', None) != 'text_time':
      return condition
    edge = float(self.image_size)
    whole = jnp.asarray([edge, edge, 0, 0, edge, edge], jnp.float32)
    sizes = jnp.broadcast_to(whole, (len(condition.text), 6)) if sizes is None else sizes
    return condition._replace(sizes=sizes)

  @property
  def learned_variance(self) -> bool:
    """Whether the U-Net predicts a variance, too, in as many channels again."""
    return self.unet.config.out_channels == 2 * self.channels

  def network(self, weights: Weights):
    """(x [b h w c], t [b], condition) -> the U-Net's output, with a ControlNet where there is one.
    """
    unet = self.unet.bind(weights['unet'])
    control = self.controlnet.bind(weights['controlnet']) if self.controlnet else None

    def predict(x: Latents, t: jax.Array, c: Condition) -> Latents:
      more = {name: getattr(c, name) for name in ('pooled', 'sizes', 'labels')}
      given = {name: value for name, value in more.items() if value is not None}
      if control is not None and c.control is not None:
        residuals = control(x, t, c.text, c.control, **given)
        strength = c.strength[:, None, None, None]
        given['residuals'] = jax.tree.map(lambda r: r * strength.astype(r.dtype), residuals)
      seen = x if c.image is None else jnp.concatenate([x, c.image.astype(x.dtype)], axis=-1)
      return unet(seen, t, c.text, **given)

    return predict

  def denoiser(
    self, weights: Weights, variance: bool = False, label: Label | None = None
  ) -> TextDenoiser:
    """D(x, alpha, sigma, condition) -> estimate of the clean latents, without guidance."""
    network, label = self.network(weights), label or self.noise.label

    def denoise(x, alpha, sigma, condition):
      bound = lambda x, t: network(x, t, condition)
      return make_denoiser(bound, self.parameterization, label, variance=variance)(x, alpha, sigma)

    return denoise

  def sample_latents(
    self, weights: Weights, x: Latents, keys: jax.Array, condition: Condition,
    negative: Condition, program: Program, numbers: Numbers,
  ) -> Latents:
    """Noise or noised latents x [b h w c], one key per image, conditions [b ...] -> latents."""
    variance = self.learned_variance and program.sampler == 'ddpm'
    label = self.noise.label_as(program.timesteps, numbers.grid)
    denoise = self.denoiser(weights, variance, label)
    guided = program.guide(denoise, condition, negative, numbers, self.parameterization)
    options = dict(program.options) | ({'variance': 'learned'} if variance else {})
    return sampler(program.sampler, **options)(guided, x, numbers.grid, keys)

  def latents(self, z: Latents) -> Latents:
    """The autoencoder's latents -> what the U-Net sees: unit variance, folded."""
    config = self.autoencoder.config
    return fold((z - config.shift_factor) * config.scaling_factor, self.latent_patch_size)

  def encode(self, autoencoder: Params, images: Images) -> Latents:
    """Images [b h w 3] in [-1, 1] -> means of their latents as the U-Net sees them."""
    mean, _ = self.autoencoder.bind(autoencoder).encode(images)
    return self.latents(mean.astype(jnp.float32))

  def decode(self, autoencoder: Params, latents: Latents, how: str = 'whole') -> Images:
    """What the U-Net sees -> images [b h w 3] in [-1, 1]; `how` is one of `sampling.DECODINGS`."""
    config = self.autoencoder.config
    z = unfold(latents, self.latent_patch_size) / config.scaling_factor + config.shift_factor
    images = DECODERS[how](self.autoencoder.bind(autoencoder), z)
    return jnp.clip(images.astype(jnp.float32), -1.0, 1.0)

  def _texts(self, weights: Weights, rows: dict, clip_skip: int) -> tuple[Condition, Condition]:
    """What the U-Net is told of the prompts and of what is not to be drawn."""
    if clip_skip:
      return (
        self.encode_text(weights, rows['tokens'], clip_skip),
        self.encode_text(weights, rows['negative']),
      )
    n, tokens = len(rows['x']), jnp.concatenate([rows['tokens'], rows['negative']])
    both = self.encode_text(weights, tokens)
    condition, negative = (jax.tree.map(lambda a, s=s: a[s : s + n], both) for s in (0, n))
    return condition, negative

  @jitted(static_argnums=(0, 3))
  def _draw(self, weights: Weights, rows: dict, program: Program, numbers: Numbers) -> Images:
    condition, negative = self._texts(weights, rows, program.clip_skip)
    if 'start' not in rows:
      rows = rows | {'x': numbers.start * rows['x']}
    condition, negative, x = prepared(self, weights, condition, negative, rows, numbers.grid)
    keys = jax.random.wrap_key_data(rows['keys'])
    latents = self.sample_latents(weights, x, keys, condition, negative, program, numbers)
    return self.decode(weights['autoencoder'], latents, program.decoding)

  def generate(
    self, weights: Weights, prompts: Sequence[str], config: SampleConfig, **how
  ) -> Iterator[np.ndarray]:
    """Yields images, uint8 [b h w 3], batch after batch; the rest is as in `draw`."""
    return map(to_uint8, self.draw(weights, prompts, config, **how))

  def draw(
    self, weights: Weights, prompts: Sequence[str], config: SampleConfig, *, seed: int, mesh: Mesh,
    negative: str = '', batch_size: int = 16, first: int = 0, inputs: Inputs | None = None,
    noise: np.ndarray | None = None,
  ) -> Iterator[np.ndarray]:
    """Yields images, float32 [b h w 3] in [-1, 1], batch after batch; one compilation for all.

    Image i depends on the seed, its number first + i and its prompt, not on the batch it is in; at
    another batch size sums are rounded otherwise. Memory does not grow with the number of prompts.
    What is compiled depends on the config's `program` alone, on the batch size, and on which
    inputs there are. A prompt that is empty, or of spaces alone, draws without condition; where all
    are and `negative` is, too, guidance changes nothing and is left out, with its cost.

    Args:
      seed: from 0 to 2**32 - 1.
      inputs: pictures to start from, masks, controls: whatever the model takes beside the prompt.
      noise: float32 [n h w c], what the sampler starts from, or a picture is noised with; None for
        unit Gaussian noise of the seed. Samplers that add noise on the way draw it from the seed.

    Raises:
      UserError: for a config that cannot be sampled, and inputs that do not fit the model.
    """
    config.check(self.noise, self.parameterization)
    check_seed(seed)
    inputs, n = inputs or Inputs(), len(prompts)
    given = inputs.rows(self, n)
    check_edited(self, config.image_guidance)
    if noise is not None:
      given['x'] = _checked_noise(noise, (n, *self.latent_shape))
    given['tokens'] = self.tokens(prompts)
    given['negative'] = np.broadcast_to(self.tokens([negative]), given['tokens'].shape)
    if 'reference' not in given and not config.clip_skip and _same(given):
      config = dataclasses.replace(config, guidance=1.0)
    numbers = config.numbers(self.noise, inputs.share(self))
    size = whole_batch(batch_size, mesh)
    names = tuple(dict.fromkeys(('x', 'keys', *given)))
    draw = lambda weights, *columns: self._draw(
      weights, dict(zip(names, columns, strict=True)), config.program, numbers
    )
    for start in range(0, n, size):
      rows = {name: column[start : start + size] for name, column in given.items()}
      x, keys = initial_noise(seed, first + start, min(size, n), self.latent_shape)
      own = {'x': np.asarray(x), 'keys': np.asarray(jax.random.key_data(keys))}
      rows = {name: column[: len(rows['tokens'])] for name, column in own.items()} | rows
      yield from in_batches(
        draw, weights, *(rows[name] for name in names), mesh=mesh, batch_size=size
      )


def _same(given: dict[str, np.ndarray]) -> bool:
  """Whether what is to be drawn and what is not are the same texts."""
  return bool((given['tokens'] == given['negative']).all())


def _checked_noise(given: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
  if given.shape != shape:
    raise UserError(f'noise is {list(given.shape)}; give one array for each prompt, {list(shape)}.')
  return np.asarray(given, np.float32)
