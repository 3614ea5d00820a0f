"""The training loss of a network, put together from its parts by a configuration.

A prediction, a weighting, a distribution of noise levels and an error make the published losses:

  DDPM            prediction epsilon                                  Ho et al. 2020
  IDDPM           loss hybrid, learned_variance, times importance     Nichol & Dhariwal 2021
  NCSN, score SDE prediction score, weighting snr                     Song & Ermon 2019, Song 2021
  VDM             loss vdm, stratified                                Kingma et al. 2021
  EDM             prediction edm, weighting edm, times log_normal     Karras et al. 2022
  flow matching   prediction flow_prediction, times logit_normal      Esser et al. 2024

Every distribution of times or sigmas is a quantile function of u, uniform in [0, 1), which is
plainly random or stratified.
"""

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Annotated, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import ndtri

from diffusion_jax.diffusion import bounds, losses
from diffusion_jax.diffusion.bounds import learned_log_variance, log_variances
from diffusion_jax.diffusion.denoiser import Denoiser, make_denoiser
from diffusion_jax.diffusion.losses import WEIGHTINGS, Error, weighting
from diffusion_jax.diffusion.noise import Level, NoiseSchedule
from diffusion_jax.diffusion.parameterization import PREDICTIONS, Parameterization, expand
from diffusion_jax.errors import UserError
from diffusion_jax.limits import OneOf, Range
from diffusion_jax.types import Latents, Params, PerExample


def uniform(key: jax.Array, count: int, stratified: bool = False) -> PerExample:
  """u [count] in [0, 1), independent or stratified: (u_0 + i / count) mod 1 with one random u_0.

  Stratified ones are uniform each and evenly spaced together, so the mean loss of a batch varies
  less (Kingma et al. 2021, appendix I.1).
  """
  if not stratified:
    return jax.random.uniform(key, (count,))
  return jnp.mod(jax.random.uniform(key, ()) + jnp.arange(count) / count, 1.0)


def _normal(u: jax.Array) -> jax.Array:
  """Standard normal quantile, finite at 0 and 1."""
  eps = jnp.finfo(u.dtype).eps
  return ndtri(jnp.clip(u, eps, 1 - eps))


def mode(u: jax.Array, scale: float = 1.29) -> jax.Array:
  """t = 1 - v - scale (cos^2(pi v / 2) - 1 + v), v = 1 - u (Esser et al. 2024, eq. 20).

  Grows with u. scale 0 is uniform; above 0 prefers the middle, below 0 the ends. Monotone for scale
  in [-1, 2 / (pi - 2)].
  """
  v = 1 - u
  return u - scale * (jnp.cos(jnp.pi * v / 2) ** 2 - u)


QUANTILES: dict[str, Callable[..., jax.Array]] = {
  'uniform': lambda u: u,
  # logit(t) ~ N(mean, std^2) (Esser et al. 2024, eq. 19).
  'logit_normal': lambda u, mean=0.0, std=1.0: jax.nn.sigmoid(mean + std * _normal(u)),
  'mode': mode,
  # sigma (not t) at alpha = 1, ln sigma ~ N(mean, std^2) (Karras et al. 2022, table 1).
  'log_normal': lambda u, mean=-1.2, std=1.2: jnp.exp(mean + std * _normal(u)),
}
"""Distributions of times: u -> t, growing, with options."""


class LossHistory(NamedTuple):
  """The last losses at each timestep, [T, n], and how many of them are filled, [T]."""

  losses: jax.Array
  count: jax.Array


def init_history(steps: int, length: int = 10) -> LossHistory:
  """Return an empty history of `length` losses at each timestep."""
  return LossHistory(jnp.zeros((steps, length)), jnp.zeros((steps,), jnp.int32))


def update_history(history: LossHistory, t: jax.Array, loss: PerExample) -> LossHistory:
  """Add unweighted losses [b] at timesteps t [b], oldest out first; a t may occur repeatedly."""

  def add(history, pair):
    index, value = pair
    row = history.losses[index]
    count = history.count[index]
    full = count >= row.shape[0]
    row = jnp.where(full, jnp.roll(row, -1), row).at[jnp.where(full, -1, count)].set(value)
    counts = history.count.at[index].set(jnp.where(full, count, count + 1))
    return LossHistory(history.losses.at[index].set(row), counts), None

  return jax.lax.scan(add, history, (t, loss.astype(history.losses.dtype)))[0]


def importance(history: LossHistory, uniform_fraction: float = 0.001) -> jax.Array:
  """Probability [T] of each timestep (Nichol & Dhariwal 2021, eq. 18).

  Proportional to sqrt(E[loss^2]), mixed with a uniform one; uniform until the history is full.
  """
  steps, length = history.losses.shape
  moment = jnp.sqrt((history.losses**2).mean(1))
  total = moment.sum()
  ready = (history.count >= length).all() & (total > 0)
  fraction = jnp.where(ready, moment / jnp.where(ready, total, 1.0), 1 / steps)
  return (1 - uniform_fraction) * fraction + uniform_fraction / steps


def by_importance(u: jax.Array, probability: jax.Array) -> tuple[jax.Array, PerExample]:
  """(timestep [b], weight [b]) for u [b]; weight = 1 / (T p_t) keeps the mean loss unbiased."""
  steps = len(probability)
  t = jnp.searchsorted(jnp.cumsum(probability), u * probability.sum(), side='right')
  t = jnp.minimum(t, steps - 1)
  return t, 1 / (steps * probability[t])


LOSSES = ('simple', 'hybrid', 'bound', 'vdm', 'sliced')
OF_A_TABLE = ('hybrid', 'bound')
TIMES = (*QUANTILES, 'importance')
DECODERS = {'gaussian': bounds.gaussian_log_density, 'discretized': bounds.discretized_gaussian}

Network = Callable[[Latents, PerExample], jax.Array]
"""(x [b ...], label [b]) -> output [b ...], with twice the channels for a learned variance."""


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig:
  """The training loss and the noise levels.

  loss: simple; hybrid (IDDPM); bound (all terms of the variational bound, bits per dimension); vdm
  (its continuous-time form, bits per dimension); sliced (score matching without a target).
  weighting: none, or a name of `WEIGHTINGS` with its options, such as {'gamma': 5.0}. times: of
  sigma / alpha for log_normal, by loss for importance; stratified spreads those of a batch evenly.
  pseudo_huber has a delta from 1 to huber_delta at full noise. offset_noise is usually 0.05 to 0.1,
  input_perturbation 0.1. learned_variance: the network has twice the output channels. bound_weight:
  of the bound in the hybrid loss. decoder: of the bound's last term; discretized for 8-bit images.
  data_std: of the data, for the prediction edm.
  """

  prediction: Annotated[str, OneOf(PREDICTIONS)] = 'epsilon'
  loss: Annotated[str, OneOf(LOSSES)] = 'simple'
  weighting: Annotated[str, OneOf(('none', *WEIGHTINGS))] = 'none'
  weighting_options: dict[str, float] = dataclasses.field(default_factory=dict)
  times: Annotated[str, OneOf(TIMES)] = 'uniform'
  times_options: dict[str, float] = dataclasses.field(default_factory=dict)
  stratified: bool = False
  error: Literal['squared', 'pseudo_huber'] = 'squared'
  huber_delta: Annotated[float, Range(0, above=True)] = 0.1
  offset_noise: Annotated[float, Range(0)] = 0.0
  input_perturbation: Annotated[float, Range(0)] = 0.0
  learned_variance: bool = False
  bound_weight: Annotated[float, Range(0)] = 0.001
  decoder: Annotated[str, OneOf(DECODERS)] = 'gaussian'
  data_std: Annotated[float, Range(0, above=True)] = 1.0

  def __post_init__(self):
    loss, times = self.loss, self.times
    for refused, why in (
      (loss == 'hybrid' and not self.learned_variance,
       'loss hybrid trains a variance; set learned_variance to True'),
      (self.learned_variance and loss not in OF_A_TABLE,
       f'loss {loss} never trains the variance; set learned_variance to False, or loss to hybrid'),
      (self.weighting != 'none' and loss in ('bound', 'sliced'),
       f'weighting has no effect on the loss {loss}; set it to none'),
      (self.error != 'squared' and loss not in ('simple', 'hybrid'),
       f'error has no effect on the loss {loss}; set it to squared'),
      (loss == 'vdm' and times != 'uniform',
       'loss vdm is a mean over uniform times; set times to uniform'),
      (loss == 'bound' and times not in ('uniform', 'importance'),
       'loss bound is a mean over uniform times; set times to uniform or importance'),
      (self.stratified and times == 'importance',
       'stratified has no effect on importance; set it to False'),
    ):
      if refused:
        raise UserError(f'objective.{why}.')
    _check_options('weighting', self.weighting, WEIGHTINGS, self.weighting_options)
    _check_options('times', times, QUANTILES, self.times_options)

  @property
  def parameterization(self) -> Parameterization:
    """The network's prediction, for a model to be made with."""
    return Parameterization(self.prediction, self.data_std)


def _check_options(key: str, name: str, table: Mapping, options: Mapping[str, float]) -> None:
  known = list(inspect.signature(table[name]).parameters)[1:] if name in table else []
  for option in options:
    if option not in known:
      remedy = f'choose from {", ".join(known)}' if known else 'it has none'
      raise UserError(f'objective.{key}_options.{option} is not an option of {name}; {remedy}.')


class Losses(NamedTuple):
  """loss [b]: what is minimised. error [b]: of the prediction, unweighted. level: of the noise."""

  loss: PerExample
  error: PerExample
  level: Level


class Objective:
  """A training loss, pure in the network, the data and the key.

  noise and parameterization are the model's own objects. UserError: a loss or distribution that
  needs a table of timesteps, on a process.
  """

  def __init__(
    self, config: ObjectiveConfig, noise: NoiseSchedule,
    parameterization: Parameterization | None = None,
  ):
    self.config, self.noise = config, noise
    self.parameterization = parameterization or config.parameterization
    if noise.learnable and config.loss != 'vdm':
      raise UserError(f'objective.loss {config.loss} learns no process; set it to vdm.')
    needs = config.loss if config.loss in OF_A_TABLE else config.times
    if needs in (*OF_A_TABLE, 'importance') and noise.table is None:
      raise UserError(f'objective: {needs} needs a table of timesteps; choose a discrete schedule.')
    self.weighting = None
    if config.weighting != 'none':
      self.weighting = weighting(config.weighting, **config.weighting_options)

  def history(self) -> LossHistory | None:
    """Return an empty history for importance sampling; None where none is kept."""
    return init_history(len(self.noise.table)) if self.config.times == 'importance' else None

  def denoiser(self, network: Network, variance: bool = False) -> Denoiser:
    """Return the network, trained by this objective, as a denoiser; see `make_denoiser`."""
    return make_denoiser(network, self.parameterization, self.noise.label, variance=variance)

  def sample_levels(self, key: jax.Array, count: int, history: LossHistory | None = None):
    """Return (levels [count], factor [count] or 1 that keeps the mean over times what it was)."""
    config, u = self.config, uniform(key, count, self.config.stratified)
    if config.times == 'importance':
      t, factor = by_importance(u, importance(history))
      return self.noise.at_timestep(t), factor
    return self.levels_at(u), 1.0

  def levels_at(self, u: jax.Array) -> Level:
    """Return the levels at quantiles u [n] of the times; of importance, of uniform ones."""
    config = self.config
    t = QUANTILES.get(config.times, QUANTILES['uniform'])(u, **config.times_options)
    return (self.noise.at_ratio if config.times == 'log_normal' else self.noise.at)(t)

  def losses_at(
    self, network: Network, x0: Latents, eps: Latents, u: jax.Array
  ) -> PerExample:
    """The error of the prediction [b] with this noise at quantiles u [b] of the times.

    Weighted as the loss is; of a bound or a sliced loss it is the simple one. Nothing is random.
    """
    level = self.levels_at(u)
    x = losses.add_noise(x0, eps, level.alpha, level.sigma)
    output = self.parameterization.predict(network, x, level.alpha, level.sigma, level.label)
    return losses.weighted_loss(
      self.parameterization, output, x0, eps, level.alpha, level.sigma, self.weighting,
      error=self._error(level),
    )

  def losses(
    self, network: Network, x0: Latents, key: jax.Array, history: LossHistory | None = None
  ) -> Losses:
    """Losses of a batch x0 [b ...]; noise and levels follow from the key."""
    config = self.config
    key_t, key_noise, key_input, key_directions = jax.random.split(key, 4)
    eps = losses.offset_noise(key_noise, x0.shape, config.offset_noise)
    if config.loss == 'vdm':
      return self._vdm(network, x0, eps, key_t)
    level, factor = self.sample_levels(key_t, len(x0), history)
    noise = losses.perturb_input(key_input, eps, config.input_perturbation)
    x = losses.add_noise(x0, noise, level.alpha, level.sigma)
    if config.loss == 'sliced':
      return self._sliced(network, x0, x, level, key_directions)
    output = self.parameterization.predict(network, x, level.alpha, level.sigma, level.label)
    output, variance = (
      jnp.split(output, 2, axis=-1) if config.learned_variance else (output, None)
    )
    measure = partial(
      losses.weighted_loss, self.parameterization, output, x0, eps, level.alpha, level.sigma,
      error=self._error(level),
    )
    error, loss = measure(), measure(self.weighting)
    if config.loss != 'simple':
      loss = self._bound(x0, x, output, variance, level, loss)
    return Losses(factor * loss, error, level)

  def losses_of_learned(
    self, network: Callable[[Params], Network], params: Params, process: Params, x0: Latents,
    key: jax.Array,
  ) -> Losses:
    """Losses of a network of `params` on a learned process (Kingma et al. 2021, appendix I.2).

    The bound is independent of the process between its ends: its gradient is taken in the network's
    parameters alone, that of its square (the variance but for a constant) in the process's. The
    value is the bound's.
    """
    stop, on = jax.lax.stop_gradient, lambda process: Objective(
      self.config, self.noise.bind(process), self.parameterization
    )
    key, key_square = jax.random.split(key)
    out = on(stop(process)).losses(network(params), x0, key)
    square = on(process).losses(network(stop(params)), x0, key_square).loss ** 2
    return out._replace(loss=out.loss + square - stop(square))

  def _error(self, level: Level) -> Error:
    if self.config.error == 'squared':
      return losses.squared_error
    delta = losses.huber_delta(level.position, self.config.huber_delta)
    return lambda output, wanted: losses.pseudo_huber(output, wanted, delta)

  def _bound(self, x0, x, output, variance, level: Level, simple: PerExample) -> PerExample:
    """The hybrid loss (Nichol & Dhariwal 2021, eq. 16) or the bound, in bits per dimension.

    T times the term of one random timestep.
    """
    config, schedule = self.config, self.noise.table
    steps, t = len(schedule), level.label
    grid = np.append(schedule.alphas[::-1], 1.0), np.append(schedule.sigmas[::-1], 0.0)
    # From step n of a grid, which goes from noise to data, to timestep t = T - 1 - n.
    lower, upper = (bound[::-1][t] for bound in log_variances(grid))
    there = tuple(jnp.asarray(part)[::-1][t] for part in (grid[0][1:], grid[1][1:]))
    log_variance = lower if variance is None else learned_log_variance(variance, lower, upper)
    estimate = self.parameterization.to_x0(output.astype(x.dtype), x, level.alpha, level.sigma)
    if config.loss == 'hybrid':
      estimate = jax.lax.stop_gradient(estimate)  # The bound trains the variance alone.
    term = bounds.bound_term(
      x0, x, estimate, (level.alpha, level.sigma), there, log_variance, DECODERS[config.decoder]
    )
    if config.loss == 'hybrid':
      return simple + config.bound_weight * steps * bounds.bits_per_dim(term, x0)
    last = schedule.alphas[-1], schedule.sigmas[-1]
    prior = bounds.prior_term(x0, *last, float(np.hypot(*last)))
    return bounds.bits_per_dim(prior + steps * term, x0)

  def _vdm(self, network, x0, eps, key) -> Losses:
    """The bound in continuous time; on a table by its interpolated process."""
    u = uniform(key, len(x0), self.config.stratified)
    t = self.noise.t_min + (1 - self.noise.t_min) * u
    alpha, sigma = self.noise.process(t)
    nats = (1 - self.noise.t_min) * bounds.vdm_loss(
      self.denoiser(network), self.noise.process, x0, eps, t, self.weighting
    )
    loss = bounds.bits_per_dim(nats, x0)
    return Losses(loss, loss, Level(alpha, sigma, self.noise.label(alpha, sigma), u))

  def _sliced(self, network, x0, x, level: Level, key) -> Losses:
    """sigma^2 times the sliced loss of the noised data's score, a dimension (Song et al. 2019)."""
    denoise = self.denoiser(network)
    alpha, sigma = (expand(part, x) for part in (level.alpha, level.sigma))
    score = lambda x: (alpha * denoise(x, level.alpha, level.sigma) - x) / sigma**2
    directions = jax.random.rademacher(key, x.shape, x.dtype)
    loss = losses.sliced_score_matching(score, x, directions)
    loss = level.sigma**2 * loss / x0[0].size
    return Losses(loss, loss, level)
