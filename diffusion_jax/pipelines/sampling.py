"""How to sample: what a user chooses, and what of it a compiled program depends on.

A `Program` is compiled; `Numbers` are handed to it, so that another guidance scale, interval,
spacing, strength or number of steps runs the same program.
"""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.diffusion.denoiser import (
  Denoiser,
  TextDenoiser,
  classifier_free,
  classifier_free_edit,
  dynamic_threshold,
  static_threshold,
)
from diffusion_jax.diffusion.noise import LABELS, NoiseSchedule
from diffusion_jax.diffusion.parameterization import Parameterization
from diffusion_jax.diffusion.samplers import Grid, padded, part_way, sampler
from diffusion_jax.errors import UserError
from diffusion_jax.types import Condition

Option = bool | int | float | str
"""The value of a sampler's option."""

DECODINGS = ('whole', 'sliced', 'tiled')
"""How latents become images: a batch at once, image by image, or in overlapping tiles."""

THRESHOLDS = ('none', 'static', 'dynamic')

PLACES = ('steps_offset', 'drop_last', 'fractional', 'set_alpha_to_one')
"""Fields of a `SampleConfig` that `sampling_grid` takes as they are."""

BUCKETS = (8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768)
"""Grids are padded to the next of these lengths; one longer stays as it is."""


class Numbers(NamedTuple):
  """What a compiled program is given: the grid, padded, and scalars, all float32.

  low and high are the interval's bounds; limit and percentile those of the threshold; start is the
  deviation of the noise that is started from.
  """

  grid: Grid
  guidance: jax.Array
  image_guidance: jax.Array
  rescale: jax.Array
  low: jax.Array
  high: jax.Array
  limit: jax.Array
  percentile: jax.Array
  start: jax.Array


class Program(NamedTuple):
  """What is compiled.

  guided, image_guided: whether there is guidance by the text, and by the picture that is edited.
  everywhere: whether at all noise levels. decoding: one of DECODINGS. options: the sampler's, as
  pairs. timesteps: one of `schedules.LABELS`.
  """

  sampler: str
  guided: bool
  image_guided: bool
  everywhere: bool
  threshold: str
  clip_skip: int = 0
  decoding: str = 'whole'
  options: tuple[tuple[str, Option], ...] = ()
  timesteps: str = 'exact'

  def guide(
    self, denoise: TextDenoiser, told: Condition, negative: Condition, numbers: Numbers,
    parameterization: Parameterization,
  ) -> Denoiser:
    """The denoiser with guidance and threshold."""
    how = {
      'rescale': numbers.rescale,
      'rescale_in': parameterization.rescale_space,
      'interval': None if self.everywhere else (numbers.low, numbers.high),
    }
    if self.image_guided:
      blind = negative._replace(image=jnp.zeros_like(negative.image))
      scales = numbers.guidance, numbers.image_guidance
      guided = classifier_free_edit(denoise, told, negative, blind, *scales, **how)
    else:
      scale = numbers.guidance if self.guided else 1
      guided = classifier_free(denoise, told, negative, scale, **how)
    keep = bool(dict(self.options).get('keep_epsilon'))
    if self.threshold == 'static':
      return static_threshold(guided, numbers.limit, keep_estimate=keep)
    if self.threshold == 'dynamic':
      return dynamic_threshold(guided, numbers.percentile, numbers.limit, keep_estimate=keep)
    return guided


MOST_STEPS = 10_000
"""Of sampling, whose grid is made beforehand."""


@dataclasses.dataclass(frozen=True)
class SampleConfig:
  """How to sample: names of `SAMPLERS` and `SPACINGS` in `diffusion.samplers`.

  guidance: the classifier-free scale; 1 means none. guidance_rescale: phi in [0, 1] of Lin et al.
  2024, of what the network predicts if that is epsilon or v, else of x_0. guidance_interval: (low,
  high), noise levels sigma / alpha between which there is guidance; a high of None is no bound.
  threshold: none; static clips x_0 at threshold_limit; dynamic clips each image at its
  threshold_percentile (a share), from 1 to threshold_limit, and divides by that, which leaves it in
  [-1, 1] (Saharia et al. 2022). They are made for pixels. Latents here have unit variance and no
  bounds: the limit of static is in standard deviations, and dynamic takes their contrast away.
  options: of the sampler, such as its order. steps_offset, drop_last, fractional, set_alpha_to_one
  and, in places, the other arguments of `sampling_grid`: as the schedulers of diffusers place their
  steps. timesteps: what the network is told of them, one of `schedules.LABELS`. scaled_noise: start
  from noise of the first level's sigma, not of unit variance.
  image_guidance: of a model that edits a picture, the scale for that (Brooks et al. 2023, s_I).
  clip_skip: layers of the text encoder that are left out at the end for the prompt, beside those
  that the model leaves out anyway; as in diffusers, the negative prompt keeps them. decoding: one
  of DECODINGS; sliced and tiled take less memory, and tiled changes colours a little.
  """

  sampler: str = 'dpmpp_2m'
  steps: int = 20
  guidance: float = 4.0
  spacing: str = 'trailing'
  guidance_rescale: float = 0.0
  guidance_interval: tuple[float, float | None] = (0.0, None)
  threshold: str = 'none'
  threshold_limit: float = 4.0
  threshold_percentile: float = 0.995
  options: dict[str, Option] = dataclasses.field(default_factory=dict, hash=False)
  steps_offset: int = 0
  drop_last: bool = False
  fractional: bool = False
  set_alpha_to_one: bool = True
  places: dict[str, Option] = dataclasses.field(default_factory=dict, hash=False)
  timesteps: str = 'exact'
  scaled_noise: bool = False
  image_guidance: float = 1.0
  clip_skip: int = 0
  decoding: str = 'whole'

  def check(self, noise: NoiseSchedule, parameterization: Parameterization) -> None:
    """Raises a UserError for what cannot be sampled."""
    sampler(self.sampler, **self.options)
    if not 1 <= self.steps <= MOST_STEPS:
      raise UserError(f'steps is {self.steps}; choose 1 to {MOST_STEPS:,}.')
    grid = self._grid(noise)
    if parameterization.blind_at_zero_snr and noise.zero_terminal:
      raise UserError(
        f'the prediction {parameterization.name!r} says nothing at zero terminal SNR; set '
        'objective.prediction to v_prediction, or schedule.rescale_betas_zero_snr to False.'
      )
    self._check_guidance()
    if self.threshold not in THRESHOLDS:
      raise UserError(
        f'threshold {self.threshold!r} is unknown; choose one of {", ".join(THRESHOLDS)}.'
      )
    if not 0 < self.threshold_limit < math.inf:
      raise UserError(
        f'threshold_limit is {self.threshold_limit}; give a number above 0, in standard deviations '
        'of the latents.'
      )
    if self.timesteps not in LABELS:
      raise UserError(
        f'timesteps {self.timesteps!r} is unknown; choose one of {", ".join(LABELS)}.'
      )
    noise.label_as(self.timesteps, grid)
    if self.decoding not in DECODINGS:
      raise UserError(
        f'decoding {self.decoding!r} is unknown; choose one of {", ".join(DECODINGS)}.'
      )
    if self.clip_skip < 0:
      raise UserError(f'clip_skip is {self.clip_skip}; give a number of layers, 0 for none.')
    if not 0 < self.threshold_percentile <= 1:
      raise UserError(
        f'threshold_percentile is {self.threshold_percentile}; give a share above 0 and up to 1.'
      )

  def _check_guidance(self) -> None:
    for name in ('guidance', 'image_guidance'):
      if not math.isfinite(getattr(self, name)):
        raise UserError(f'{name} is {getattr(self, name)}; give a finite scale, 1 for none.')
    if not 0 <= self.guidance_rescale <= 1:
      raise UserError(f'guidance_rescale is {self.guidance_rescale}; give a share from 0 to 1.')
    low, high = self.guidance_interval
    if not 0 <= low < (math.inf if high is None else high):
      raise UserError(
        f'guidance_interval is {low} to {high}; give two noise levels sigma / alpha from 0 on, the '
        'lower one first.'
      )

  @property
  def program(self) -> Program:
    """What is compiled for this; not more of it differs than what matters."""
    guided, edited = self.guidance != 1, self.image_guidance != 1
    everywhere = not (guided or edited) or self.guidance_interval == (0.0, None)
    # Of all steps, also where a picture to start from leaves some of them out.
    settle = lambda name, value: (
      self.steps < value if name == 'lower_order_final' and type(value) is int else value
    )
    options = tuple(sorted((name, settle(name, value)) for name, value in self.options.items()))
    return Program(
      self.sampler, guided, edited, everywhere, self.threshold, self.clip_skip, self.decoding,
      options, self.timesteps,
    )

  def _grid(self, noise: NoiseSchedule) -> Grid:
    places = {name: getattr(self, name) for name in PLACES}
    return noise.grid(self.steps, self.spacing, **places, **self.places)

  def numbers(self, noise: NoiseSchedule, strength: float = 1.0) -> Numbers:
    """What the program is given, host arrays; `strength` is the share of the steps that are taken.

    Raises:
      UserError: for a strength that leaves no step.
    """
    grid = part_way(jax.tree.map(np.asarray, self._grid(noise)), strength)
    steps = len(grid[0]) - 1
    grid = padded(grid, next((length for length in BUCKETS if length >= steps), steps))
    low, high = self.guidance_interval
    scalars = (
      self.guidance, self.image_guidance, self.guidance_rescale, low,
      math.inf if high is None else high, self.threshold_limit, self.threshold_percentile,
      self._start(noise, grid),
    )
    return Numbers(grid, *map(np.float32, scalars))

  def _start(self, noise: NoiseSchedule, grid: Grid) -> float:
    """The deviation of the noise to start from; on a process, as of data of unit variance."""
    alpha, sigma = float(grid[0][0]), float(grid[1][0])
    if noise.table is None:
      return math.hypot(alpha, sigma)
    return sigma if self.scaled_noise else 1.0

  def in_force(self) -> dict[str, str]:
    """Name -> value of what has an effect, for a picture's metadata."""
    names = ['sampler', 'steps', 'spacing', 'guidance']
    default, guided = SampleConfig(), self.program.guided or self.program.image_guided
    later = ('options', *PLACES, 'places', 'timesteps', 'scaled_noise', 'image_guidance',
             'clip_skip', 'decoding')
    names += [name for name in later if getattr(self, name) != getattr(default, name)]
    names += ['guidance_rescale'] * (guided and self.guidance_rescale != 0)
    names += ['guidance_interval'] * (not self.program.everywhere)
    if self.threshold != 'none':
      names += ['threshold', 'threshold_limit']
      names += ['threshold_percentile'] * (self.threshold == 'dynamic')

    def text(value) -> str:
      if isinstance(value, dict):
        return ' '.join(f'{name}={text(part)}' for name, part in value.items())
      if isinstance(value, tuple):
        return ' '.join('inf' if part is None else text(part) for part in value)
      return f'{value:g}' if isinstance(value, float) else str(value)

    return {name: text(getattr(self, name)) for name in names}
