"""Trains a denoiser of points in the plane: every family of model, in seconds, to look at."""

import dataclasses
from pathlib import Path
from typing import Any

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
from diffusion_jax.diffusion.objective import Network as Denoising
from diffusion_jax.diffusion.objective import Objective, ObjectiveConfig
from diffusion_jax.diffusion.samplers import initial_noise, sampler
from diffusion_jax.errors import UserError
from diffusion_jax.formats.networks import save_params
from diffusion_jax.limits import FileDtype
from diffusion_jax.models.mlp import MLP, MLPConfig
from diffusion_jax.models.network import Network, prefixed, under
from diffusion_jax.registry import EVALUATORS, load
from diffusion_jax.train.tasks.diffusion import NoisingTask, history_of
from diffusion_jax.train.tasks.task import Env, Frozen
from diffusion_jax.types import Params, Scores, Source

PROCESS = 'noise'
FIELD_LEVELS = (1.0, 0.4, 0.15)
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

  def __post_init__(self):
    NoiseSchedule.of(self.noise)

  @property
  def noise(self) -> NoiseConfig:
    """Where the network is trained."""
    label = 'timestep' if self.process == 'table' else 'log_snr'
    return NoiseConfig(
      **dataclasses.asdict(self.schedule), process=self.process, sub_vp=self.sub_vp, label=label,
      process_options=self.process_options,
    )


class ToyTask(NoisingTask):
  """Parameters are the MLP's and, under 'noise', those of a learned process."""

  Config = ToyTaskConfig
  name, title = 'toy', 'Denoiser of points in the plane'
  batch_fields = ('points',)
  computing = ()

  def __init__(self, config: ToyTaskConfig, test: ArraySource):
    self.config = config
    self.frozen: Frozen = {}
    self.noise = NoiseSchedule.of(config.noise)
    self.objective = Objective(config.objective, self.noise)
    self.test = np.concatenate([test[i]['points'] for i in range(len(test))])
    self.mlp = Network.of(MLP, MLPConfig(
      width=config.width, depth=config.depth,
      out_features=4 if config.objective.learned_variance else 2,
      label_range=self.noise.label_range,
    ))
    self.grid = self.noise.grid(config.sample.steps, config.sample.spacing)
    self._sample = jax.jit(self._draw, static_argnums=2)
    self._fields = jax.jit(self._scores)
    self._bits = jax.jit(self._likelihood)

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
    process = self.noise.initialize(jax.random.fold_in(key, 1)) if self.noise.learnable else {}
    return self.mlp.initialize(key) | prefixed(PROCESS, process)

  def network(self, params: Params) -> Denoising:
    """The MLP between the scales of its process.

    It sees x at unit variance, and its output is divided by sigma where a score is wanted (Song &
    Ermon 2020, technique 3): the score of little noise is large.
    """
    mlp = self.mlp.bind({name: params[name] for name in self.mlp.shapes})
    parameterization = self.objective.parameterization

    def network(x, label):
      alpha, sigma = (part[:, None] for part in self.noise.at_label(label))
      if not parameterization.scales_input:
        x = x / jnp.sqrt(alpha**2 + sigma**2)
      return mlp(x, label) / sigma if parameterization.name == 'score' else mlp(x, label)

    return network

  def denoiser(self, params: Params) -> Denoiser:
    return self.objective.denoiser(self.network(params))

  def loss(self, params, frozen, carry, batch, key, step) -> tuple[jax.Array, tuple]:
    x0 = batch['points'].reshape(-1, 2)
    if self.noise.learnable:
      process = under(PROCESS, params)
      losses = self.objective.losses_of_learned(self.network, params, process, x0, key)
    else:
      losses = self.objective.losses(self.network(params), x0, key, history_of(carry))
    return self.summary(losses, carry)

  def _draw(self, params: Params, seed: int, count: int) -> jax.Array:
    sample = self.config.sample
    noise, keys = initial_noise(seed, 0, count, (2,))
    variance = self.config.objective.learned_variance and sample.sampler == 'ddpm'
    more = {'variance': 'learned'} if variance else {}
    draw = sampler(sample.sampler, **sample.options, **more)
    denoise = self.objective.denoiser(self.network(params), variance)
    return draw(denoise, self.grid[1][0].astype(noise.dtype) * noise, self.grid, keys)

  def _scores(self, params: Params, x: jax.Array) -> jax.Array:
    """Learned scores [k n 2] of the data with FIELD_LEVELS of noise, at alpha x [n 2]."""

    def one(ratio):
      level = self.noise.at_ratio(ratio[None])
      alpha, sigma = level.alpha[0], level.sigma[0]
      x0 = self.denoiser(params)(alpha * x, alpha, sigma)
      # Of x / alpha, so that all levels are drawn on the scale of the data.
      return alpha**2 * (x0 - x) / sigma**2

    return jax.lax.map(one, jnp.asarray(FIELD_LEVELS))

  def _likelihood(self, params: Params, x: jax.Array) -> jax.Array:
    keys = jax.random.split(jax.random.key(0), len(x))
    return flow_likelihood(
      self.denoiser(params), x, self.noise.process, keys, trace='exact', solver='heun',
      steps=LIKELIHOOD_STEPS, t_min=self.noise.t_min,
    ).bits

  def evaluators(self, mesh: Mesh) -> list[Any]:
    return [
      load(EVALUATORS, 'points_preview')(self._sample, self._fields, FIELD_LEVELS, self.test),
      load(EVALUATORS, 'points')(
        self._sample, self._bits, self.initialize, self.test, self.config.likelihood_points
      ),
    ]

  def export(self, directory: Path, params: Params, scores: Scores) -> None:
    """The network; `config.json` of the run says how it was trained.

    A learned process is left out: samples and likelihoods depend on its ends alone.
    """
    mlp = {name: params[name] for name in self.mlp.shapes}
    save_params(directory, self.mlp.config, mlp, dtype=self.config.export_dtype)
