"""One description of a generative diffusion model, without weights and without a size.

A model is a space (what is noised), a denoiser (any network of x, t and fields of `Condition`),
conditioners by name, a noise schedule and a parameterization: for training, sampling, editing,
export, evaluation and likelihood. Height and width are arguments of sampling, which compiles a
program for each shape.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from diffusion_jax.backend import xla
from diffusion_jax.diffusion.conversion import converted, own_terms
from diffusion_jax.diffusion.denoiser import (
  Denoiser,
  Label,
  Others,
  TextDenoiser,
  make_denoiser,
)
from diffusion_jax.diffusion.noise import NoiseConfig, NoiseSchedule
from diffusion_jax.diffusion.parameterization import Parameterization
from diffusion_jax.diffusion.projection import Projection, projected
from diffusion_jax.diffusion.samplers import initial_noise, sampler
from diffusion_jax.diffusion.samplers.resampling import resampled
from diffusion_jax.errors import UserError
from diffusion_jax.limits import check_seed
from diffusion_jax.models.network import Network
from diffusion_jax.parallel.mesh import in_batches, whole_batch
from diffusion_jax.pipelines import between
from diffusion_jax.pipelines.conditioners import (
  Arrays,
  Conditioner,
  Request,
  Spec,
)
from diffusion_jax.pipelines.distilled import (
  imitates_guidance,
  predicts_mean_velocity,
  told_interval,
)
from diffusion_jax.pipelines.generator import Generator
from diffusion_jax.pipelines.guides import CLASSIFIER_GUIDANCE, check_guides, scores_of
from diffusion_jax.pipelines.image_conditioners import CONTROLNET, Editing
from diffusion_jax.pipelines.image_sizes import ImageSizes
from diffusion_jax.pipelines.inputs import Inputs
from diffusion_jax.pipelines.known import PAINTED, free_places, pasted, projection
from diffusion_jax.pipelines.options import AS_DRAWN, PLAIN, Sizing
from diffusion_jax.pipelines.rules import check_imitation, checked_noise, output_channels
from diffusion_jax.pipelines.sampling import (
  LATENTS,
  NO_SCORES,
  GuideScores,
  Numbers,
  Program,
  SampleConfig,
)
from diffusion_jax.pipelines.size_conditions import check_sizing
from diffusion_jax.pipelines.spaces import Space
from diffusion_jax.pipelines.text_conditioners import TextEncoders
from diffusion_jax.pixels import to_float
from diffusion_jax.types import Condition, Images, Latents, Weights

DENOISER, WORSE = 'denoiser', 'worse'
"""The roles of the weights of the denoiser, and of the one that autoguidance leads away from."""


@dataclasses.dataclass(frozen=True, eq=False)
class Diffusion(ImageSizes, Generator):
  """A generative model without its weights; `conditioners` are by name, in a fixed order.

  worse: another denoiser of the same x, t and condition, which autoguidance leads away from.
  size: (height, width) in pixels of the training images; None: as the denoiser's config tells.
  programs: the keys of all that were compiled for sampling, one for each size, batch and `Program`.
  """

  space: Space
  denoiser: Network
  conditioners: Mapping[str, Conditioner]
  noise: NoiseSchedule
  parameterization: Parameterization
  worse: Network | None = None
  size: tuple[int, int] | None = None
  programs: set = dataclasses.field(init=False, default_factory=set, repr=False)
  drawn_by: ClassVar = (DENOISER,)
  takes_pictures: ClassVar = True
  interpolates: ClassVar = 'noise'

  @property
  def likelihood(self) -> str:
    """The row of `registry.EVALUATORS` that measures its likelihood."""
    return 'pixel_likelihood' if self.space.name == 'pixels' else 'likelihood'

  @property
  def networks(self) -> dict[str, Network]:
    """Every network by the role of its weights."""
    out = {DENOISER: self.denoiser, **self.space.networks}
    out |= {WORSE: self.worse} if self.worse else {}
    for conditioner in self.conditioners.values():
      out |= conditioner.networks
    return out

  @property
  def text(self) -> TextEncoders | None:
    """The conditioner of prompts, if there is one."""
    return next((c for c in self.conditioners.values() if isinstance(c, TextEncoders)), None)

  @property
  def takes_classes(self) -> bool:
    return CLASSIFIER_GUIDANCE in self.conditioners

  @property
  def numbers(self) -> bool:
    return self.space.numbers

  @property
  def embedding_dim(self) -> int | None:
    return self.space.embedding_dim

  def drawn(self, batch: np.ndarray) -> np.ndarray:
    return self.space.drawn(batch)

  def inputs(self, height: int, width: int) -> dict[str, Spec]:
    """Return the fields of `Inputs` that it must be given for images of height x width pixels."""
    parts = [conditioner.inputs(height, width) for conditioner in self.conditioners.values()]
    return {name: spec for part in parts for name, spec in part.items()}

  @property
  def learned_variance(self) -> bool:
    """True if the denoiser predicts a variance, in as many channels again."""
    return output_channels(self.denoiser.config) == 2 * self.space.channels

  def replaced(self, networks: Mapping[str, Network]) -> 'Diffusion':
    """Return the same model with other networks for the denoiser or the conditioners, by role."""
    conditioners = {name: c.replaced(networks) for name, c in self.conditioners.items()}
    denoiser = networks.get(DENOISER, self.denoiser)
    return dataclasses.replace(self, denoiser=denoiser, conditioners=conditioners)

  def with_conditioner(self, name: str, conditioner: Conditioner) -> 'Diffusion':
    """Return the same model with one conditioner more, or another one of that name."""
    return dataclasses.replace(self, conditioners={**self.conditioners, name: conditioner})

  @property
  def network_terms(self) -> tuple[str, NoiseConfig]:
    """The prediction and the noise of its network, of which those of the model may be made."""
    return own_terms(self.parameterization, self.noise.config)

  def in_terms(self, prediction: str, noise: NoiseConfig, exact: bool = True) -> 'Diffusion':
    """Return a model with another prediction and noise schedule, of the same network.

    Args:
      prediction: one of PREDICTIONS.
      noise: config of the schedule.
      exact: convert what the network says (`diffusion.conversion`), so that the model means what it
        did; else its output is taken for the new prediction as it is, which it has yet to learn.
    """
    before = self.parameterization
    after = converted(before, self.noise.config, prediction, noise) if exact else (
      Parameterization(prediction, before.data_std)
    )
    return dataclasses.replace(self, noise=NoiseSchedule.of(noise), parameterization=after)

  def with_compute(self, **changes: str) -> 'Diffusion':
    """The same model with other `models.network.Compute`.

    attention and matmul_precision: of the denoiser and a ControlNet (an autoencoder's one head is
    too wide for kernels). remat: not of the space's networks, through which no gradient passes.
    """
    def changed(role: str, network: Network) -> Network:
      main, frozen = role in (DENOISER, CONTROLNET), role in self.space.networks
      wanted = lambda name: not frozen if name == 'remat' else main
      return network.with_compute(**{name: how for name, how in changes.items() if wanted(name)})

    return self.replaced({role: changed(role, n) for role, n in self.networks.items()})

  def check_prompts(self, prompts: Sequence[str], syntax: str = PLAIN) -> None:
    """Raise UserError for a prompt that does not fit the model."""
    if syntax != PLAIN:
      self._with_text('prompt_syntax', PLAIN).weighted(prompts)
    elif self.text is not None:
      self.text.tokens(prompts, on_long='error')
    else:
      self.rows(prompts)

  def _with_text(self, name: str, default: Any) -> TextEncoders:
    """Return the text encoders, without which a setting of that name does nothing: UserError."""
    if self.text is None:
      raise UserError(f'the model has no text encoder; leave {name} at {default}.')
    return self.text

  def prompt(self, record: Mapping[str, Any]) -> str:
    """Return the prompt for which the model should sample a record of a source, '' for none."""
    found = (conditioner.prompt(record) for conditioner in self.conditioners.values())
    return next((prompt for prompt in found if prompt is not None), '')

  def rows(
    self, prompts: Sequence[str], negative: str = '', inputs: Inputs | None = None,
    height: int | None = None, width: int | None = None, guidance: float | None = None,
    syntax: str = PLAIN, sizing: Sizing = AS_DRAWN,
  ) -> dict[str, np.ndarray]:
    """Host arrays [n ...] of all conditions and images; UserError for what does not fit."""
    height, width = self.size_of(height, width)
    inputs = inputs or Inputs()
    request = Request(prompts, negative, inputs, height, width, guidance, syntax, sizing)
    out = inputs.rows(self, len(prompts), height, width)
    for conditioner in self.conditioners.values():
      out |= conditioner.rows(request)
    return out

  def condition(self, weights: Weights, rows: Mapping[str, jax.Array]) -> Condition:
    """Return the condition of rows of prompts and images; pure."""
    return joined(c.encode(weights, rows) for c in self.conditioners.values())

  def conditions(
    self, weights: Weights, rows: Mapping[str, jax.Array], clip_skip: int = 0
  ) -> tuple[Condition, Condition]:
    """Return (the condition, the one that guidance leads away from) of rows; pure.

    Where the rows are on a way, see `pipelines.between`, that of both its ends in proportion.
    """
    if between.TOWARD in rows:
      ends = (self.conditions(weights, end, clip_skip) for end in between.ends(rows))
      return between.mixed(rows[between.TOWARD], *ends)
    pairs = [c.pair(weights, rows, clip_skip) for c in self.conditioners.values()]
    return tuple(joined(pair[i] for pair in pairs) for i in (0, 1))

  def network(self, weights: Weights) -> Callable[[Latents, jax.Array, Condition], Latents]:
    """Return (x [b ...], t [b], condition) -> the denoiser's output, given all that it takes."""
    denoiser = self.denoiser.bind(weights[DENOISER])

    def predict(x: Latents, t: jax.Array, condition: Condition) -> Latents:
      more = {}
      for conditioner in self.conditioners.values():
        more |= conditioner.at_step(weights, x, t, condition)
      return denoiser(x, t, condition, **more)

    return predict

  def denoise(
    self, weights: Weights, variance: bool = False, label: Label | None = None
  ) -> TextDenoiser:
    """Return D(x, alpha, sigma, condition) -> estimate of the clean z, without guidance."""
    network, label = self.network(weights), label or self.noise.label

    def denoise(x, alpha, sigma, condition):
      bound = lambda x, t: network(x, t, condition)
      return make_denoiser(bound, self.parameterization, label, variance=variance)(x, alpha, sigma)

    return denoise

  def sample_z(
    self, weights: Weights, x: Latents, keys: jax.Array, condition: Condition,
    negative: Condition, program: Program, numbers: Numbers, project: Projection | None = None,
    scores: GuideScores = NO_SCORES,
  ) -> Latents:
    """Denoise x [b ...], noise or noised z, with a key for each and conditions [b ...], to z.

    project: holds what is known of z in every estimate. scores: of the guides in force.
    """
    variance = self.learned_variance and program.sampler == 'ddpm'
    guided = self.guided(weights, condition, negative, program, numbers, variance, scores)
    if project is not None:
      guided = projected(guided, project, variance=variance)
    options = dict(program.options) | ({'variance': 'learned'} if variance else {})
    run = sampler(program.sampler, **options)
    if numbers.stretches is not None:
      return resampled(run, guided, x, numbers.stretches, keys)
    return run(guided, x, numbers.grid, keys)

  def guided(
    self, weights: Weights, condition: Condition, negative: Condition, program: Program,
    numbers: Numbers, variance: bool = False, scores: GuideScores = NO_SCORES,
  ) -> Denoiser:
    """Return the denoiser of conditions [b ...], guided as a sampler is given it."""
    label = self.noise.label_as(program.timesteps, numbers.grid)
    denoise = self.denoise(weights, variance, label)
    if predicts_mean_velocity(self.denoiser.config):
      denoise = told_interval(denoise, program.sampler, numbers.grid)
    others = self._others(weights, condition, program, numbers, label)
    return program.guide(
      denoise, condition, negative, numbers, self.parameterization, others, scores
    )

  def _others(self, weights, condition, program: Program, numbers: Numbers, label: Label) -> Others:
    """Return what guidance leads away from besides the null condition: (denoiser, scale)."""
    others = []
    if program.perturbed:
      perturbed = self.denoiser.with_compute(perturbed=program.perturbed)
      others.append((perturbed, DENOISER, numbers.perturbed))
    if program.autoguided:
      others.append((self.worse, WORSE, numbers.autoguidance - 1))

    def bound(network: Network, role: str) -> Denoiser:
      model = dataclasses.replace(self, denoiser=network)
      denoise = model.denoise({**weights, DENOISER: weights[role]}, label=label)
      return lambda x, alpha, sigma: denoise(x, alpha, sigma, condition)

    return [(bound(network, role), scale) for network, role, scale in others]

  @functools.partial(xla.jit, static_argnums=(0, 3))
  def _sample(self, weights: Weights, rows: dict, program: Program, numbers: Numbers) -> Images:
    condition, negative = self.conditions(weights, rows, program.clip_skip)
    keys = jax.random.wrap_key_data(rows['keys'])
    if LATENTS in rows:  # Those before have used its own keys.
      x, keys = rows[LATENTS], jax.vmap(lambda key: jax.random.fold_in(key, 2**31 - 2))(keys)
    elif 'start' in rows:
      alpha, sigma = numbers.grid[0][0], numbers.grid[1][0]
      start = self.space.encode(weights, to_float(rows['start']))
      x = alpha * start + sigma * rows['x']
    else:
      x = numbers.start * rows['x']
    project = None
    if PAINTED in rows and 'masks' not in rows:  # Else the denoiser sees them itself.
      free = free_places(self.space, rows[PAINTED] > 0)
      x = jnp.where(free & (numbers.from_noise > 0), numbers.start * rows['x'], x)
      project = projection(self.space, start, free)
    elif program.low_pass:
      project = projection(self.space, start, low_pass=program.low_pass)
    scores = scores_of(self.conditioners, program.guides, weights, rows, self.space)
    z = self.sample_z(weights, x, keys, condition, negative, program, numbers, project, scores)
    if program.decoding == LATENTS:
      return z
    cut = {'size': program.cut} if program.cut else {}
    images = self.space.decode(weights, z, program.decoding, **cut)
    return pasted(images, to_float(rows['images']), rows[PAINTED]) if PAINTED in rows else images

  def sample(
    self, weights: Weights, prompts: Sequence[str], config: SampleConfig, *, seed: int, mesh: Mesh,
    negative: str = '', batch_size: int = 16, first: int = 0, inputs: Inputs | None = None,
    noise: np.ndarray | None = None, height: int | None = None, width: int | None = None,
    latents: bool = False, toward: tuple[Sequence[str], np.ndarray] | None = None,
  ) -> Iterator[np.ndarray]:
    """Yield images, float32 [b h w 3] in [-1, 1], batch after batch; one compilation for all.

    Image i depends on the seed, its number first + i and its prompt, and on the batch size by
    rounding alone. Memory does not grow with the number of prompts. Compilation depends on the
    config's `program`, the batch size, the images' size, and which inputs there are. Empty prompts
    and `negative` leave out guidance, without effect there.

    Args:
      seed: from 0 to 2**32 - 1.
      inputs: images to start from, masks, controls: what the model takes with the prompt.
      noise: float32 [n ...] of z's shape, the sampler's or an image's initial noise; None for unit
        Gaussian noise of the seed. Later noise is always that of the seed.
      height, width: of the images, in pixels; None for those of the training. With the config's
        `binning` they are cut out of others, unless there are inputs.
      latents: whether to yield z as it is left, for `Inputs.latents` of another model.
      toward: other prompts, and which fraction [n] of the way to their condition each image is.

    UserError: a config that cannot be sampled, and inputs that do not fit the model.
    """
    self.check_sampling(config, negative)
    check_seed(seed)
    inputs, count = inputs or Inputs(), len(prompts)
    binning = config.binning if inputs.empty else 'none'
    (height, width), shown = self.drawn_size(height, width, binning)
    shape = self.space.shape(height, width)
    inputs.check(self, config, height, width)
    given, says = self._given(
      prompts, toward, negative=negative, inputs=inputs, height=height, width=width,
      guidance=config.distilled_guidance, syntax=config.prompt_syntax, sizing=config.sizing,
    )
    if noise is not None:
      given['x'] = checked_noise(noise, (count, *shape))
    if not says and not config.clip_skip:
      config = dataclasses.replace(config, guidance=1.0)
    numbers = config.numbers(self.noise, inputs.fraction(self), self.tokens(height, width))
    cut = None if shown == (height, width) else shown
    program = config.program._replace(cut=cut, low_pass=inputs.low_pass)
    program = program._replace(decoding=LATENTS) if latents else program
    size = whole_batch(batch_size, mesh)
    lengths = (part.shape for part in jax.tree.leaves(numbers))
    self.programs.add((height, width, size, program, *lengths, *given))
    for start in range(0, count, size):
      x, keys = initial_noise(seed, first + start, min(size, count), shape)
      own = {'x': np.asarray(x), 'keys': np.asarray(jax.random.key_data(keys))}
      rows = {name: column[: min(size, count - start)] for name, column in own.items()}
      rows |= {name: column[start : start + size] for name, column in given.items()}
      yield from self._batch(weights, rows, program, numbers, mesh, size)

  def _given(
    self, prompts: Sequence[str], toward: tuple[Sequence[str], np.ndarray] | None, **how: Any
  ) -> tuple[dict[str, np.ndarray], bool]:
    """Return (`rows` of what is asked for, whether any of it differs from no condition)."""
    ends = [self.rows(asked, **how) for asked in (prompts, *([] if toward is None else toward[:1]))]
    says = not all(c.same(rows) for c in self.conditioners.values() for rows in ends)
    return ends[0] | ({} if toward is None else between.way(*ends, toward[1])), says

  def _batch(
    self, weights: Weights, rows: dict[str, np.ndarray], program: Program, numbers: Numbers,
    mesh: Mesh, size: int,
  ) -> Iterator[np.ndarray]:
    """Yield what is drawn of rows [n ...] of one batch, of `size` images at most."""
    draw = lambda weights, *columns: self._sample(
      weights, dict(zip(rows, columns, strict=True)), program, numbers
    )
    yield from in_batches(draw, weights, *rows.values(), mesh=mesh, batch_size=size)

  def check_config(self, config: SampleConfig) -> None:
    config.check(self.noise, self.parameterization)

  def check_sampling(self, config: SampleConfig, negative: str = '') -> None:
    """Raise UserError for what the model cannot sample."""
    self.check_config(config)
    check_sizing(config, self.conditioners.get('sizes'))
    edits = any(isinstance(c, Editing) for c in self.conditioners.values())
    if config.image_guidance != 1 and not edits:
      raise UserError(
        f'image_guidance is {config.image_guidance:g}, but the model edits no picture; leave it at '
        '1.'
      )
    if config.autoguidance != 1 and self.worse is None:
      raise UserError(
        f'autoguidance is {config.autoguidance}, but there is no worse model; give --worse DIR, or '
        'set it to 1.'
      )
    check_guides(self.conditioners, config.program.guides)
    distilled = 'guidance' in getattr(self.denoiser.config, 'conditions', ())
    if config.distilled_guidance is not None and not distilled:
      raise UserError(
        f'distilled_guidance is {config.distilled_guidance:g}, but the denoiser is told of none; '
        'leave it out, or use guidance.'
      )
    if imitates_guidance(self.denoiser.config):
      check_imitation(config, negative)
    for name, default in (('clip_skip', 0), ('prompt_syntax', PLAIN)):
      if getattr(config, name) != default:
        self._with_text(name, default)


def joined(parts: Iterable[Arrays]) -> Condition:
  """Return one condition of the fields that several conditioners give."""
  fields = {name: value for part in parts for name, value in part.items()}
  more = {name: fields.pop(name) for name in list(fields) if name not in Condition._fields}
  return Condition(**fields, more=more or None)
