"""Sampling: a user's choices, split for compilation.

A `Program` is compiled, `Numbers` are its arguments: another guidance scale, interval, spacing,
strength or number of steps runs the same program.
"""

import inspect
import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.config import typed
from diffusion_jax.diffusion.denoiser import (
  Denoiser,
  Others,
  Score,
  TextDenoiser,
  classifier_free,
  dynamic_threshold,
  every_kth,
  gradient_guidance,
  static_threshold,
)
from diffusion_jax.diffusion.free_guidance import plus_plus, zero_star
from diffusion_jax.diffusion.noise import NoiseSchedule
from diffusion_jax.diffusion.parameterization import Parameterization
from diffusion_jax.diffusion.samplers import (
  Grid,
  info,
  padded,
  part_way,
  sampler,
  section,
  shifted,
  size_shift,
)
from diffusion_jax.diffusion.samplers.grid import sampling_grid, spaced_timesteps
from diffusion_jax.diffusion.samplers.resampling import stacked, stretches
from diffusion_jax.errors import UserError, require
from diffusion_jax.pipelines.options import (
  EXTRAPOLATED,
  GUIDES,
  PLUS_PLUS,
  SIZING,
  ZERO_STAR,
  Option,
  SampleOptions,
)
from diffusion_jax.types import Condition

PLACES = ('steps_offset', 'drop_last', 'fractional', 'set_alpha_to_one')
"""Fields of a `SampleConfig` that `sampling_grid` takes as they are."""

SIZE_SHIFT = (
  'base_shift', 'max_shift', 'base_image_seq_len', 'max_image_seq_len', 'time_shift_type'
)
"""Among `places`, arguments of `size_shift`; 'shift_terminal' is one of `shifted`."""

GRID_OPTIONS = {
  *inspect.signature(sampling_grid).parameters, *inspect.signature(spaced_timesteps).parameters,
  *SIZE_SHIFT, 'shift_terminal',
} - {'schedule', 'count', 'spacing', 'places', 'total'}
"""What `places` may hold; the others have fields of their own."""

LATENTS = 'latents'
"""In place of one of DECODINGS: latents are left as they are."""

GuideScores = Mapping[str, tuple[Score, str]]
"""(score, what of) of each guide, see `gradient_guidance`."""
NO_SCORES: GuideScores = MappingProxyType({})

BUCKETS = (8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768)
"""Grids are padded to the next of these lengths; one longer stays as it is."""


def _bucket(count: int) -> int:
  return next((length for length in BUCKETS if length >= count), count)


class Numbers(NamedTuple):
  """Arguments of a compiled program: the grid, padded, and scalars, all float32.

  low, high: bounds of the interval. limit, percentile: of the threshold. start: deviation of the
  initial noise. from_noise: whether all steps are taken. stretches: of the grid, see
  `samplers.resampling.stacked`; None to sample it once. guides: (scale, of how many steps the first
  is guided) of each in force.
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
  perturbed: jax.Array
  autoguidance: jax.Array
  from_noise: jax.Array
  stretches: Grid | None = None
  guides: dict[str, tuple[jax.Array, jax.Array]] = {}  # noqa: RUF012 - A tree of jax.


class Program(NamedTuple):
  """Static choices of a compiled program.

  guided, image_guided: guidance by the text, by the edited picture. everywhere: at all noise
  levels. decoding: one of DECODINGS. options: the sampler's, as pairs. timesteps: one of
  `noise.LABELS`. cut: (height, width) of what is cut out of the images, see `bins.cut_out`.
  low_pass: pixels of the squares whose averages are held, 0 for none. guides: names of those in
  force, see `pipelines.guides`; seldom: those of them that do not guide every step. kind: one of
  GUIDANCES.
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
  perturbed: str = ''
  autoguided: bool = False
  cut: tuple[int, int] | None = None
  low_pass: int = 0
  guides: tuple[str, ...] = ()
  seldom: tuple[str, ...] = ()
  kind: str = EXTRAPOLATED

  def guide(
    self, denoise: TextDenoiser, condition: Condition, negative: Condition, numbers: Numbers,
    parameterization: Parameterization, others: Others = (), scores: GuideScores = NO_SCORES,
  ) -> Denoiser:
    """Return the denoiser with guidance and threshold; scores: of each of `guides`."""
    if self.kind == PLUS_PLUS:
      return plus_plus(denoise, condition, negative, numbers.guidance)
    if self.kind == ZERO_STAR:
      noise = numbers.grid[0][0] == 0  # Part of the way there is a picture to begin with.
      first = jnp.where(noise, numbers.grid[1][0], jnp.inf)
      return zero_star(denoise, condition, negative, numbers.guidance, first)
    edit = {}
    if self.image_guided:
      edit = {'image': negative, 'image_scale': numbers.image_guidance}
      negative = negative._replace(image=jnp.zeros_like(negative.image))
    guided = classifier_free(
      denoise, condition, negative, numbers.guidance if self.guided or edit else 1, **edit,
      others=others, rescale=numbers.rescale, rescale_in=parameterization.rescale_space,
      interval=None if self.everywhere else (numbers.low, numbers.high),
    )
    for name, (score, of) in scores.items():
      scale, every = numbers.guides[name]
      when = every_kth(numbers.grid, every) if name in self.seldom else None
      guided = gradient_guidance(guided, score, scale, of=of, when=when)
    keep = bool(dict(self.options).get('keep_epsilon'))
    if self.threshold == 'static':
      return static_threshold(guided, numbers.limit, keep_estimate=keep)
    if self.threshold == 'dynamic':
      return dynamic_threshold(guided, numbers.percentile, numbers.limit, keep_estimate=keep)
    return guided


class SampleConfig(SampleOptions):
  """Sampling options, split into a program and its arguments."""

  def __post_init__(self):
    super().__post_init__()
    for name in self.places:
      require(
        name in GRID_OPTIONS,
        f'places has {name}, which no grid takes; leave it out, or give one of '
        f'{", ".join(sorted(GRID_OPTIONS))}.',
      )

  def check(self, noise: NoiseSchedule, parameterization: Parameterization) -> None:
    """Raise UserError for what cannot be sampled."""
    typed(type(self), vars(self), '')
    sampler(self.sampler, **self.own_options)
    grid = self._grid(noise)
    if parameterization.blind_at_zero_snr and noise.zero_terminal:
      raise UserError(
        f'the prediction {parameterization.name!r} says nothing at zero terminal SNR; set '
        'objective.prediction to v_prediction, or schedule.rescale_betas_zero_snr to False.'
      )
    noise.label_as(self.timesteps, grid)
    if self.guidance_kind != EXTRAPOLATED:
      self._check_kind(noise)

  def _check_kind(self, noise: NoiseSchedule) -> None:
    kind, default = self.guidance_kind, SampleConfig()
    if kind == PLUS_PLUS and (self.sampler != 'ddim' or not 0 <= self.guidance <= 1):
      raise UserError(
        f'guidance_kind plus_plus is of the sampler ddim and a guidance from 0 to 1, not of '
        f'{self.sampler} and {self.guidance:g}; change them, or leave it at extrapolated.'
      )
    if kind == ZERO_STAR and noise.config.process != 'flow':
      raise UserError(
        'guidance_kind zero_star is of models of a flow; leave it at extrapolated.'
      )
    for name in ('image_guidance', 'guidance_rescale', 'guidance_interval', 'threshold',
                 'perturbed_attention', 'autoguidance', *GUIDES):
      if getattr(self, name) != getattr(default, name):
        raise UserError(f'{name} has no effect with guidance_kind {kind}; leave one of them out.')

  @property
  def program(self) -> Program:
    """The static choices, normalised where they have no effect."""
    guided, edited = self.guidance != 1, self.image_guidance != 1
    perturbed = self.perturbed_part if self.perturbed_attention else ''
    autoguided = self.autoguidance != 1
    some = guided or edited or perturbed or autoguided
    everywhere = not some or self.guidance_interval == (0.0, None)
    # Of all steps, also where a picture to start from leaves some of them out.
    settle = lambda name, value: (
      self.steps < value if name == 'lower_order_final' and type(value) is int else value
    )
    options = {name: settle(name, value) for name, value in self.own_options.items()}
    kind = self.guidance_kind if guided or self.guidance_kind == PLUS_PLUS else EXTRAPOLATED
    if kind == PLUS_PLUS:
      options['keep_epsilon'] = True
    if self.denoising_end < 1:  # The last steps are another model's.
      taken = inspect.signature(info(self.sampler).function).parameters
      options |= {n: False for n in ('lower_order_final', 'euler_at_final') if n in taken}
    return Program(
      self.sampler, guided, edited, everywhere, self.threshold, self.clip_skip, self.decoding,
      tuple(sorted(options.items())), self.timesteps, perturbed, autoguided, kind=kind,
      guides=self.guides,
      seldom=tuple(n for n in self.guides if getattr(self, f'{n}_every') > 1),
    )

  @property
  def own_options(self) -> dict[str, Option]:
    """The sampler's options."""
    return self.options if self.eta is None else {**self.options, 'eta': self.eta}

  def _grid(self, noise: NoiseSchedule, tokens: int | None = None) -> Grid:
    places = {name: getattr(self, name) for name in PLACES} | self.places
    by_size = {name: places.pop(name) for name in SIZE_SHIFT if name in places}
    terminal = places.pop('shift_terminal', None)
    grid = noise.grid(self.steps, self.spacing, **places)
    if not by_size and terminal is None:
      return grid
    tokens = by_size.get('base_image_seq_len', 0) if tokens is None else tokens
    return shifted(grid, size_shift(tokens, **by_size) if by_size else 1.0, terminal)

  def numbers(
    self, noise: NoiseSchedule, strength: float = 1.0, tokens: int | None = None
  ) -> Numbers:
    """Return what the program is given, host arrays; `strength` is the fraction of steps taken.

    tokens: patches that the network reads of an image, where noise levels depend on its size.

    Raises:
      UserError: for a strength that leaves no step.
    """
    whole = jax.tree.map(np.asarray, self._grid(noise, tokens))
    grid = part_way(whole, strength, up=self.strength_steps == 'up')
    if self.denoising_start > 0 or self.denoising_end < 1:
      grid = section(grid, *(
        None if part in (0, 1) else noise.after(part)
        for part in (self.denoising_start, self.denoising_end)
      ))
    cut = stretches(grid, self.resample_jump, self.resample) if self.resample > 1 else []
    blocks = stacked(cut, _bucket(len(cut)), _bucket(self.resample_jump)) if cut else None
    grid = padded(grid, _bucket(len(grid[0]) - 1))
    low, high = self.guidance_interval
    scalars = (
      self.guidance, self.image_guidance, self.guidance_rescale, low,
      math.inf if high is None else high, self.threshold_limit, self.threshold_percentile,
      self._start(noise, grid), self.perturbed_attention, self.autoguidance, strength == 1,
    )
    guides = {
      name: (np.float32(getattr(self, name)), np.int32(getattr(self, f'{name}_every')))
      for name in self.program.guides
    }
    return Numbers(grid, *map(np.float32, scalars), blocks, guides)

  def _start(self, noise: NoiseSchedule, grid: Grid) -> float:
    """Return the deviation of the noise to start from; on a process, of data of unit variance."""
    alpha, sigma = float(grid[0][0]), float(grid[1][0])
    if noise.table is None:
      return math.hypot(alpha, sigma)
    return sigma if self.scaled_noise else 1.0

  def in_force(self) -> dict[str, str]:
    """Return name -> value of what has an effect, for a picture's metadata."""
    names = ['sampler', 'steps', 'spacing', 'guidance']
    default, program = SampleConfig(), self.program
    guided = program.guided or program.image_guided or program.perturbed or program.autoguided
    later = ('guidance_kind', 'eta', 'options', *PLACES, 'places', 'timesteps', 'scaled_noise',
             'image_guidance', 'distilled_guidance', 'perturbed_attention', 'autoguidance',
             'clip_skip', 'decoding', 'prompt_syntax', 'binning', *SIZING, 'denoising_start',
             'denoising_end', 'resample', *GUIDES)
    names += [name for name in later if getattr(self, name) != getattr(default, name)]
    names += ['perturbed_part'] * bool(program.perturbed)
    names += ['resample_jump'] * (self.resample > 1)
    more = (f'{name}_every' for name in program.guides)
    names += [name for name in more if getattr(self, name) != 1]
    names += ['guidance_rescale'] * bool(guided and self.guidance_rescale != 0)
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
