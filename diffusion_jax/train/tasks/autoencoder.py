"""Train the KL autoencoder: reconstruction + KL, later a PatchGAN, LPIPS if its weights are given.

The objective is that of Rombach et al. 2022, appendix G, after Esser et al. 2021, eq. 4-7.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from clu.metrics import Average
from jax.sharding import Mesh

from diffusion_jax.config import MeshConfig, TrainingConfig
from diffusion_jax.data.unreadable import first_readable
from diffusion_jax.errors import UserError
from diffusion_jax.formats.networks import load_lpips, save_params
from diffusion_jax.limits import Count, EdgeRule, FileDtype, Range, check_edges, same_size
from diffusion_jax.models.autoencoder import AutoencoderKL, AutoencoderKLConfig
from diffusion_jax.models.network import Network, prefixed, under
from diffusion_jax.models.perceptual import Discriminator, DiscriminatorConfig, lpips
from diffusion_jax.parallel.mesh import make_mesh
from diffusion_jax.pipelines.spaces import latent_moments
from diffusion_jax.registry import EVALUATORS, load
from diffusion_jax.train.meter import mean_metric
from diffusion_jax.train.tasks.task import Env, Frozen, Metrics, Task
from diffusion_jax.types import Images, Latents, Params, Scores, Source


@dataclasses.dataclass(frozen=True)
class AutoencoderTaskConfig:
  """Weights are per pixel value (reconstruction), per latent value (KL), per patch (adversarial).

  adversarial_weight: norm of the adversarial gradient as a fraction of the reconstruction's, at the
  output image (Esser et al. 2021, eq. 7, has the last layer); 0 leaves out the discriminator. Empty
  lpips_weights leave out LPIPS. reconstruction: l1 (Rombach et al. 2022), or l2, which learns
  colours sooner: l1 has almost no gradient at the median colour. initial_logvar: of the latents;
  below 0 noise does not hide weak features, such as colours, at first. kl_warmup_steps: linear
  growth of the KL's weight from 0 (Bowman et al. 2016, section 3.1), to learn features before they
  cost.
  """

  autoencoder: AutoencoderKLConfig = AutoencoderKLConfig()
  reconstruction: Literal['l1', 'l2'] = 'l1'
  initial_logvar: float = 0.0
  kl_weight: Annotated[float, Range(0)] = 1e-3
  kl_warmup_steps: Count = 0
  adversarial_weight: Annotated[float, Range(0)] = 0.5
  adversarial_start_step: Count = 10_000
  discriminator: DiscriminatorConfig = DiscriminatorConfig()
  lpips_weights: str = ''
  lpips_weight: Annotated[float, Range(0)] = 1.0
  export_dtype: FileDtype = 'float16'


def kl_divergence(mean: Latents, logvar: Latents) -> jax.Array:
  """KL(N(mean, exp(logvar)) || N(0, 1)) per latent value, mean [b] (Kingma & Welling 2014)."""
  kl = 0.5 * (mean**2 + jnp.exp(logvar) - 1 - logvar)
  return kl.mean(axis=(1, 2, 3))


SCALED_BY = 256
"""Test images whose latents are measured where no score has done so."""


class AutoencoderTask(Task):
  """Parameters are named 'autoencoder.*' and, with an adversarial loss, 'discriminator.*'."""

  Config = AutoencoderTaskConfig
  name, title = 'autoencoder', 'KL autoencoder'
  batch_fields = ('image',)

  def __init__(
    self, config: AutoencoderTaskConfig, test: Source, dtype=jnp.float32, **compute: str
  ):
    """`compute`: as of `models.network.Compute`."""
    self.config, self.test = config, test
    self.autoencoder = self.model = Network.of(
      AutoencoderKL, config.autoencoder, dtype=dtype, **compute
    )
    self.discriminator = Network.of(Discriminator, config.discriminator, dtype=dtype)
    self.frozen: Frozen = {}
    if config.lpips_weights:
      self.frozen['lpips'] = load_lpips(config.lpips_weights)

  @classmethod
  def check_data(cls, config: TrainingConfig) -> None:
    size, autoencoder = config.data.size, config.settings.autoencoder
    given = autoencoder.sample_size
    if not isinstance(size, int):
      for shape in config.data.shapes:
        check_edges(shape, EdgeRule(autoencoder.factor))
      shape = config.data.shape
      same_size('settings.autoencoder.sample_size', given or shape, shape)
      return super().check_data(config)
    for edge in () if given is None else np.ravel(given):
      same_size('settings.autoencoder.sample_size', int(edge), size)
    rule = EdgeRule(autoencoder.factor)
    if not rule.fits(size):
      raise UserError(
        f'data.size is {size}, but the autoencoder halves pictures to 1/{autoencoder.factor}; '
        f'choose a multiple of {autoencoder.factor}, the nearest is {rule.near(size)[0]}, or other '
        'settings.autoencoder.block_out_channels.'
      )
    super().check_data(config)

  @classmethod
  def build(cls, config: TrainingConfig, env: Env) -> AutoencoderTask:
    return cls(config.settings, env.test, **cls.compute(config))

  def initialize(self, key: jax.Array) -> Params:
    first, second = jax.random.split(key)
    params = prefixed('autoencoder', self.autoencoder.initialize(first))
    bias, channels = 'autoencoder.quant_conv.bias', self.config.autoencoder.latent_channels
    params[bias] = params[bias].at[channels:].set(self.config.initial_logvar)
    if self.config.adversarial_weight:
      params |= prefixed('discriminator', self.discriminator.initialize(second))
    return params

  def _reconstruction(self, output: Images, images: Images, frozen: Frozen) -> jax.Array:
    error = output - images
    error = jnp.abs(error) if self.config.reconstruction == 'l1' else error**2
    loss = error.mean(axis=(1, 2, 3))
    if 'lpips' in frozen:
      loss = loss + self.config.lpips_weight * lpips(frozen['lpips'], output, images)
    return loss

  def _kl_weight(self, step: jax.Array) -> jax.Array:
    grown = jnp.minimum(step / max(self.config.kl_warmup_steps, 1), 1.0)
    return self.config.kl_weight * (grown if self.config.kl_warmup_steps else 1.0)

  def loss(self, params, frozen, carry, batch, key, step) -> tuple[jax.Array, tuple]:
    images = batch['image']
    model = self.autoencoder.bind(under('autoencoder', params))
    mean, logvar = (x.astype(jnp.float32) for x in model.encode(images))
    noise = jax.random.normal(key, mean.shape)
    output = model.decode(mean + jnp.exp(logvar / 2) * noise).astype(jnp.float32)
    reconstruction = self._reconstruction(output, images, frozen)
    kl = kl_divergence(mean, logvar)
    total = reconstruction + self._kl_weight(step) * kl
    loss = total.mean()
    metrics = {
      'loss': mean_metric(total),
      'loss_reconstruction': mean_metric(reconstruction),
      'loss_kl': mean_metric(kl),
    }
    if self.config.adversarial_weight:
      adversarial, more = self._adversarial(params, frozen, images, output, step)
      loss, metrics = loss + adversarial, metrics | more
    return loss, (metrics, ())

  def _adversarial(self, params, frozen, images, output, step) -> tuple[jax.Array, Metrics]:
    """Generator's and discriminator's losses in one: each sees the other as a constant."""
    own = under('discriminator', params)
    constant = jax.lax.stop_gradient

    def generator(output):
      return -self.discriminator.bind(constant(own))(output).astype(jnp.float32).mean()

    def active(output):
      pull = jax.grad(lambda x: self._reconstruction(x, images, frozen).mean())(output)
      fool, push = jax.value_and_grad(generator)(output)
      ratio = jnp.linalg.norm(pull.ravel()) / (jnp.linalg.norm(push.ravel()) + 1e-8)
      weight = constant(self.config.adversarial_weight * jnp.clip(ratio, 0.0, 1e4))
      # Value and gradient of weight * generator(output), without a second pass over it.
      fooling = weight * (jnp.sum(constant(push) * (output - constant(output))) + constant(fool))
      both = jnp.concatenate([images, constant(output)])
      real, fake = jnp.split(self.discriminator.bind(own)(both).astype(jnp.float32), 2)
      hinge = 0.5 * (jax.nn.relu(1 - real).mean() + jax.nn.relu(1 + fake).mean())
      return fooling + hinge, fool, hinge, jnp.ones(())

    idle = lambda output: (0.0 * output.sum(), jnp.zeros(()), jnp.zeros(()), jnp.zeros(()))
    started = step >= self.config.adversarial_start_step
    loss, fool, hinge, count = jax.lax.cond(started, active, idle, output)
    return loss, {
      'loss_generator': Average(fool, count), 'loss_discriminator': Average(hinge, count),
    }

  def weights(self, params: Params, frozen: Frozen) -> Params:
    return under('autoencoder', params)

  def evaluators(self, mesh: Mesh) -> list[Any]:
    cache = {}
    return [
      load(EVALUATORS, name)(self.test, mesh, cache=cache)
      for name in ('reconstruction_preview', 'reconstruction')
    ]

  def export(self, directory: Path, params: Params, scores: Scores) -> None:
    """Write the autoencoder in diffusers' layout, scaled to latents of unit variance."""
    params, test = under('autoencoder', params), scores.get('test', {})
    if 'latent_mean' in test:
      mean, deviation = test['latent_mean'], test['latent_std']
    else:  # Nothing was scored, or scoring has failed.
      images = np.stack([record['image'] for record in first_readable(self.test, SCALED_BY)])
      mesh = make_mesh(MeshConfig(), jax.local_devices()[:1])
      with jax.set_mesh(mesh):  # Only this process is here.
        mean, deviation = latent_moments(self.model, params, images, mesh)
    config = dataclasses.replace(
      self.config.autoencoder, sample_size=max(first_readable(self.test, 1)[0]['image'].shape[:2]),
      shift_factor=round(mean, 6), scaling_factor=round(1 / deviation, 6),
    )
    save_params(directory, config, params, dtype=self.config.export_dtype)
