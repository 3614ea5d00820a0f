"""Trains a denoiser of points in the plane: every family of model, in seconds, to look at."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from diffusion_jax.config import TrainingConfig
from diffusion_jax.data.sources import open_data
from diffusion_jax.data.sources.arrays import POINT_SETS, ArraySource
from diffusion_jax.diffusion.denoiser import Denoiser
from diffusion_jax.diffusion.likelihood import flow_likelihood
from diffusion_jax.diffusion.noise import NoiseConfig, NoiseSchedule, ScheduleConfig
from diffusion_jax.diffusion.objective import Losses, ObjectiveConfig
from diffusion_jax.diffusion.parameterization import Parameterization
from diffusion_jax.diffusion.samplers import initial_noise, sampler
from diffusion_jax.errors import UserError
from diffusion_jax.formats.networks import format_of, save_params
from diffusion_jax.limits import FileDtype
from diffusion_jax.models.mlp import MLPConfig
from diffusion_jax.models.network import prefixed, under
from diffusion_jax.pipelines.model import DENOISER, Diffusion
from diffusion_jax.pipelines.spaces import VectorSpace
from diffusion_jax.registry import EVALUATORS, load
from diffusion_jax.train.tasks.diffusion import DiffusionTask
from diffusion_jax.train.tasks.task import Env, Frozen
from diffusion_jax.types import Condition, Params, Scores, Source, Weights

PROCESS = 'noise'
LIKELIHOOD_STEPS = 40


@dataclasses.dataclass(frozen=True)
class ToySampleConfig:
  """Names of `SAMPLERS` and `SPACINGS`; options of the sampler, such as {'corrections': 2}."""

  sampler: str = 'ddpm'
  steps: int = 100
  spacing: str = 'trailing'
  options: dict[str, int | float] = dataclasses.field(default_factory=dict)

  def __post_init__(self):
    sampler(self.sampler, **self.options)

  def check(self, noise: NoiseSchedule, parameterization: Parameterization) -> None:
    """Raise UserError for steps that cannot be placed."""
    del parameterization
    noise.grid(self.steps, self.spacing)


@dataclasses.dataclass(frozen=True)
class ToyTaskConfig:
  """process: table, for the T timesteps of `schedule`, a name of `processes.PROCESSES` with its
  options, such as {'sigma_max': 50.0}, or learned. sub_vp: the sub-VP process of that one. width,
  depth: of the network. likelihood_points: test points whose bits are counted at the end, 0 for
  none."""

  process: str = 'table'
  process_options: dict[str, float] = dataclasses.field(default_factory=dict)
  sub_vp: bool = False
  schedule: ScheduleConfig = ScheduleConfig()
  objective: ObjectiveConfig = ObjectiveConfig()
  sample: ToySampleConfig = ToySampleConfig()
  width: int = 96
  depth: int = 3
  likelihood_points: int = 512
  export_dtype: FileDtype = 'float32'
  cache: ClassVar[bool] = False
  caption_dropout: ClassVar[float] = 0.0
  encoder_dropout: ClassVar[tuple[float, ...]] = ()

  def __post_init__(self):
    NoiseSchedule.of(self.noise)

  @property
  def noise(self) -> NoiseConfig:
    """Noise levels of training."""
    label = 'timestep' if self.process == 'table' else 'log_snr'
    return NoiseConfig(
      **dataclasses.asdict(self.schedule), process=self.process, sub_vp=self.sub_vp, label=label,
      process_options=self.process_options,
    )


class PointDiffusion(Diffusion):
  """A model of points, whose denoiser is rescaled around the network.

  It sees x at unit variance; a score is its output over sigma (Song & Ermon 2020, technique 3), as
  scores at little noise are large.
  """

  def network(self, weights: Weights) -> Callable:
    network, prediction = super().network(weights), self.parameterization

    def scaled(x, t, condition):
      alpha, sigma = (part[:, None] for part in self.noise.at_label(t))
      if not prediction.scales_input:
        x = x / jnp.sqrt(alpha**2 + sigma**2)
      output = network(x, t, condition)
      return output / sigma if prediction.name == 'score' else output

    return scaled

  def check_sampling(self, config: ToySampleConfig, negative: str = '') -> None:
    config.check(self.noise, self.parameterization)

  def estimate(self, weights: Weights, variance: bool = False) -> Denoiser:
    """Return D(x [n 2], alpha, sigma) -> estimate of the clean points."""
    denoise = self.denoise(weights, variance)
    return lambda x, alpha, sigma: denoise(x, alpha, sigma, Condition())

  def points(self, sample: ToySampleConfig) -> Callable:
    """Return a compiled (weights, seed, count) -> points [count 2]."""
    grid = self.noise.grid(sample.steps, sample.spacing)
    variance = self.learned_variance and sample.sampler == 'ddpm'
    more = {'variance': 'learned'} if variance else {}
    draw = sampler(sample.sampler, **sample.options, **more)

    def points(weights: Weights, seed: int, count: int) -> jax.Array:
      noise, keys = initial_noise(seed, 0, count, (2,))
      x = grid[1][0].astype(noise.dtype) * noise
      return draw(self.estimate(weights, variance), x, grid, keys)

    return jax.jit(points, static_argnums=2)

  def scores(self, weights: Weights, x: jax.Array, ratios: jax.Array) -> jax.Array:
    """Return learned scores [k n 2] of the data with noise sigma / alpha, at alpha x [n 2]."""

    def one(ratio):
      level = self.noise.at_ratio(ratio[None])
      alpha, sigma = level.alpha[0], level.sigma[0]
      x0 = self.estimate(weights)(alpha * x, alpha, sigma)
      # Of x / alpha, so that all levels are drawn on the scale of the data.
      return alpha**2 * (x0 - x) / sigma**2

    return jax.lax.map(one, ratios)

  def bits(self, weights: Weights, x: jax.Array) -> jax.Array:
    """Return bits per dimension [n] of points [n 2]."""
    keys = jax.random.split(jax.random.key(0), len(x))
    return flow_likelihood(
      self.estimate(weights), x, self.noise.process, keys, trace='exact', solver='heun',
      steps=LIKELIHOOD_STEPS, t_min=self.noise.t_min,
    ).bits


class ToyTask(DiffusionTask):
  """Parameters are the denoiser's and, under 'noise', those of a learned process."""

  Config = ToyTaskConfig
  upgrade_settings = staticmethod(dict)
  name, title = 'toy', 'Denoiser of points in the plane'
  pictures = captioned = False
  computing = ()

  def __init__(self, config: ToyTaskConfig, test: ArraySource):
    noise, objective = NoiseSchedule.of(config.noise), config.objective
    mlp = MLPConfig(
      width=config.width, depth=config.depth, label_range=noise.label_range,
      out_features=4 if objective.learned_variance else 2,
    )
    network = format_of(mlp).network(mlp)
    model = PointDiffusion(VectorSpace(), network, {}, noise, objective.parameterization)
    super().__init__(config, model, {}, test, test)
    self.test = np.concatenate([test[i]['points'] for i in range(len(test))])

  @classmethod
  def described(cls, size: int) -> tuple[str, str]:
    return f'records of {size} points', 'points in the plane'

  @classmethod
  def check_data(cls, config: TrainingConfig) -> None:
    if config.data.transforms:
      raise UserError('data.transforms have no effect on points; empty them.')

  @classmethod
  def open_sources(cls, config: TrainingConfig, synthetic: bool) -> tuple[Source, Source]:
    """Points are random numbers anyway."""
    return open_data(config.data)

  @classmethod
  def build(cls, config: TrainingConfig, env: Env) -> 'ToyTask':
    if 'points' not in env.test[0]:
      raise UserError(
        f'data.dataset is {config.data.dataset!r}, which holds no points; choose one of '
        f'{", ".join(POINT_SETS)}.'
      )
    return cls(config.settings, env.test)

  def initialize(self, key: jax.Array) -> Params:
    noise = self.model.noise
    process = noise.initialize(jax.random.fold_in(key, 1)) if noise.learnable else {}
    return super().initialize(key) | prefixed(PROCESS, process)

  def weights(self, params: Params, frozen: Frozen) -> Weights:
    return {DENOISER: {name: params[name] for name in self.model.denoiser.shapes}}

  def losses(self, params, frozen, carry, batch, key) -> Losses:
    if not self.model.noise.learnable:
      return super().losses(params, frozen, carry, batch, key)
    x0 = self.model.space.encode({}, batch['points'])

    def network(params):
      network = self.loss_model.network(self.weights(params, {}))
      return lambda x, t: network(x, t, Condition())

    return self.objective.losses_of_learned(network, params, under(PROCESS, params), x0, key)

  def evaluators(self, mesh: Mesh) -> list[Any]:
    sample, points = self.config.sample, self.config.likelihood_points
    return [
      load(EVALUATORS, 'points_preview')(sample, self.test),
      load(EVALUATORS, 'points')(sample, self.test, points),
    ]

  def export(self, directory: Path, params: Params, scores: Scores) -> None:
    """Write the network; `config.json` of the run describes its training.

    A learned process is left out: samples and likelihoods depend on its ends alone.
    """
    mlp = self.weights(params, {})[DENOISER]
    save_params(directory, self.model.denoiser.config, mlp, dtype=self.config.export_dtype)
