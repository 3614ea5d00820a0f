"""Train an autoencoder: reconstruction and bottleneck, later a PatchGAN, with weights LPIPS.

The objective is that of Rombach et al. 2022, appendix G, after Esser et al. 2021, eq. 4-7; what the
latents go through is a row of `registry.BOTTLENECKS`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
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
from diffusion_jax.formats.networks import load_lpips, read_part, save_params
from diffusion_jax.limits import (
  ByType,
  Count,
  EdgeRule,
  FileDtype,
  Range,
  check_edges,
  same_size,
)
from diffusion_jax.models.autoencoder import AutoencoderKLConfig
from diffusion_jax.models.network import Network, prefixed, under
from diffusion_jax.models.perceptual import Discriminator, DiscriminatorConfig, lpips
from diffusion_jax.parallel.mesh import make_mesh
from diffusion_jax.pipelines.spaces import latent_moments
from diffusion_jax.registry import BOTTLENECKS, EVALUATORS, load
from diffusion_jax.train.bottlenecks.kl import KL
from diffusion_jax.train.meter import mean_metric
from diffusion_jax.train.tasks.task import Carry, Env, Frozen, Metrics, Observed, Task
from diffusion_jax.types import Images, Params, Scores, Source


@dataclasses.dataclass(frozen=True)
class AutoencoderTaskConfig:
  """Weights are per pixel value (reconstruction), per patch (adversarial).

  autoencoder: the network's shape. bottleneck: what its latents go through. pretrained: a directory
  with an autoencoder of that shape and kind to begin with.
  adversarial_weight: norm of the adversarial gradient as a fraction of the reconstruction's, at the
  output image (Esser et al. 2021, eq. 7, has the last layer); 0 leaves out the discriminator. Empty
  lpips_weights leave out LPIPS. reconstruction: l1 (Rombach et al. 2022), or l2, which learns
  colours sooner: l1 has almost no gradient at the median colour; or gaussian, -ln p per value, but
  for a constant, of the Gaussian whose variance suits the batch best (Rybkin et al. 2021, eq. 5).
  """

  autoencoder: AutoencoderKLConfig = AutoencoderKLConfig()
  bottleneck: Annotated[Any, ByType(BOTTLENECKS, default='kl')] = KL()
  pretrained: str = ''
  reconstruction: Literal['l1', 'l2', 'gaussian'] = 'l1'
  adversarial_weight: Annotated[float, Range(0)] = 0.5
  adversarial_start_step: Count = 10_000
  discriminator: DiscriminatorConfig = DiscriminatorConfig()
  lpips_weights: str = ''
  lpips_weight: Annotated[float, Range(0)] = 1.0
  export_dtype: FileDtype = 'float16'


_OLD_KEYS = {
  'kl_weight': 'weight', 'kl_warmup_steps': 'warmup_steps', 'initial_logvar': 'initial_logvar'
}


def upgrade_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
  """Return settings as `AutoencoderTaskConfig` has them, of older recipes and runs, in which the
  keys of the KL stood by themselves."""
  out = dict(settings)
  given = {new: out.pop(name) for name, new in _OLD_KEYS.items() if name in out}
  return {**out, 'bottleneck': {**given, **out.get('bottleneck', {})}} if given else out


def check_pretrained(settings: AutoencoderTaskConfig) -> None:
  """Raise UserError where the pretrained autoencoder is another than the one to train."""
  if not settings.pretrained:
    return
  where, part = f'settings.pretrained={settings.pretrained}', read_part(settings.pretrained)
  wanted = settings.bottleneck.config(settings.autoencoder)
  if settings.bottleneck.carry(wanted):
    raise UserError('settings.pretrained needs a settings.bottleneck without averages of its own.')
  if part.kind is None or type(part.config) is not type(wanted):
    raise UserError(f'{where} is no {settings.bottleneck.title}; give its directory.')
  for field in dataclasses.fields(wanted):
    own, its = getattr(wanted, field.name), getattr(part.config, field.name)
    if own != its and field.name not in _OF_AN_EXPORT:
      raise UserError(
        f'{where} has {field.name}={its!r} and settings.autoencoder has {own!r}; set the same.'
      )


_OF_AN_EXPORT = ('sample_size', 'scaling_factor', 'shift_factor', 'force_upcast')
"""What a training measures or leaves open."""
SCALED_BY = 256
"""Test images whose latents are measured where no score has done so."""


class AutoencoderTask(Task):
  """Parameters are named 'autoencoder.*' and, with an adversarial loss, 'discriminator.*'."""

  Config = AutoencoderTaskConfig
  upgrade_settings = staticmethod(upgrade_settings)
  name, title = 'autoencoder', 'Autoencoder'
  batch_fields = ('image',)

  def __init__(
    self, config: AutoencoderTaskConfig, test: Source, dtype=jnp.float32, **compute: str
  ):
    """`compute`: as of `models.network.Compute`."""
    self.config, self.test, self.bottleneck = config, test, config.bottleneck
    self.title = self.bottleneck.title
    shape = self.bottleneck.config(config.autoencoder)
    self.autoencoder = self.model = Network.of(
      self.bottleneck.network, shape, dtype=dtype, **compute
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
    check_pretrained(config.settings)
    return cls(config.settings, env.test, **cls.compute(config))

  def initialize(self, key: jax.Array) -> Params:
    first, second = jax.random.split(key)
    params = self.bottleneck.initialize(self.autoencoder.initialize(first))
    params = prefixed('autoencoder', params)
    if self.config.adversarial_weight:
      params |= prefixed('discriminator', self.discriminator.initialize(second))
    return params

  def start(self, mesh: Mesh) -> Params | None:
    path = self.config.pretrained
    return prefixed('autoencoder', read_part(path).load(mesh=mesh)) if path else None

  def _reconstruction(self, output: Images, images: Images, frozen: Frozen) -> jax.Array:
    error = output - images
    error = jnp.abs(error) if self.config.reconstruction == 'l1' else error**2
    loss = error.mean(axis=(1, 2, 3))
    if self.config.reconstruction == 'gaussian':
      variance = jax.lax.stop_gradient(loss.mean())
      loss = 0.5 * (jnp.log(variance) + loss / variance)
    if 'lpips' in frozen:
      loss = loss + self.config.lpips_weight * lpips(frozen['lpips'], output, images)
    return loss

  def carry(self) -> Carry:
    return self.bottleneck.carry(self.autoencoder.config)

  def next_carry(self, carry: Carry, observed: Observed) -> Carry:
    return self.bottleneck.next_carry(carry, observed)

  def constrain(self, params: Params, carry: Carry) -> Params:
    own = self.bottleneck.constrain(under('autoencoder', params), carry)
    return params | prefixed('autoencoder', own)

  def loss(self, params, frozen, carry, batch, key, step) -> tuple[jax.Array, tuple]:
    images = batch['image']
    model = self.autoencoder.bind(under('autoencoder', params))
    passed = self.bottleneck(model, images, carry, key, step)
    reconstruction = self._reconstruction(passed.output, images, frozen)
    total = reconstruction + passed.loss
    loss = total.mean()
    metrics = {
      'loss': mean_metric(total), 'loss_reconstruction': mean_metric(reconstruction),
      **passed.metrics,
    }
    if self.config.adversarial_weight:
      adversarial, more = self._adversarial(params, frozen, images, passed.output, step)
      loss, metrics = loss + adversarial, metrics | more
    return loss, (metrics, passed.observed)

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
    """Write the autoencoder, in diffusers' layout where it has one; latents that are no codes are
    scaled to unit variance."""
    params, config = under('autoencoder', params), self.autoencoder.config
    edges = first_readable(self.test, 1)[0]['image'].shape[:2]
    scaling = {} if hasattr(config, 'vocabulary') else self._scaling(params, scores.get('test', {}))
    config = dataclasses.replace(config, sample_size=max(edges), **scaling)
    save_params(directory, config, params, dtype=self.config.export_dtype)

  def _scaling(self, params: Params, scored: Mapping[str, float]) -> dict[str, float]:
    """Return the fields of a config that bring latents to mean 0 and variance 1."""
    if 'latent_mean' in scored:
      mean, deviation = scored['latent_mean'], scored['latent_std']
    else:  # Nothing was scored, or scoring has failed.
      images = np.stack([record['image'] for record in first_readable(self.test, SCALED_BY)])
      mesh = make_mesh(MeshConfig(), jax.local_devices()[:1])
      with jax.set_mesh(mesh):  # Only this process is here.
        mean, deviation = latent_moments(self.autoencoder, params, images, mesh)
    return {'shift_factor': round(mean, 6), 'scaling_factor': round(1 / deviation, 6)}
