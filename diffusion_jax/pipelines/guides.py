"""Conditions that the denoiser knows nothing of: gradients of a score lead samples to them.

A guide is a conditioner whose name is an option of sampling, its scale, beside NAME_every. It gives
a score, whose gradient changes the denoiser's estimates (`diffusion.denoiser.gradient_guidance`).
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.diffusion.denoiser import Score
from diffusion_jax.diffusion.parameterization import expand, noise_label
from diffusion_jax.errors import UserError
from diffusion_jax.formats.clip import HALF
from diffusion_jax.models.network import Network
from diffusion_jax.models.text.clip import unit
from diffusion_jax.pipelines.conditioners import Conditioner, Request
from diffusion_jax.pipelines.options import GUIDES
from diffusion_jax.types import Images, Latents, PerExample, Weights

if TYPE_CHECKING:
  from diffusion_jax.models.text.tokenizer import Tokenize
  from diffusion_jax.pipelines.spaces import Space

CLIP_GUIDANCE, CLASSIFIER_GUIDANCE = GUIDES
"""The names of the guides by CLIP and by a classifier, and of their options."""
GUIDING_CLIP, GUIDING_CLASSIFIER = 'guiding_clip', 'guiding_classifier'
"""The roles of their weights."""
SMALLEST = 0.5
"""The least edge of a cut-out, as a fraction of the image's."""


class Guide(Conditioner):
  """A condition by the gradient of a score, [b], of the noised z or of its estimate."""

  of: ClassVar[str] = 'noised'
  """One of `diffusion.denoiser.GUIDED_BY`."""

  def encode(self, weights, rows):
    return {}

  @abc.abstractmethod
  def score(
    self, weights: Weights, rows: Mapping[str, jax.Array], space: Space
  ) -> Score:
    """Return (z, alpha, sigma) -> log-probability of what each of the rows asks for; pure."""


def check_guides(conditioners: Mapping[str, Conditioner], names: Sequence[str]) -> None:
  """Raise UserError where a model lacks one of the guides whose scales are not 0."""
  for name in names:
    if name not in conditioners:
      raise UserError(
        f'{name} is given, but the model has no such guide; add one (`pipelines.adapters`), as the '
        'command sample does, or set it to 0.'
      )


def scores_of(
  conditioners: Mapping[str, Conditioner], names: Sequence[str], weights: Weights,
  rows: Mapping[str, jax.Array], space: Space,
) -> dict[str, tuple[Score, str]]:
  """Return (the score, what it is of) of each guide of these names."""
  guides = {name: conditioners[name] for name in names}
  return {name: (guide.score(weights, rows, space), guide.of) for name, guide in guides.items()}


@dataclasses.dataclass(frozen=True)
class CLIPGuide(Guide):
  """CLIP's similarity of the decoded estimate to the prompt, divided by CLIP's temperature.

  A scale of 1 so takes exp(logit_scale cos) for p(prompt | image). cutouts: random squares, of half
  the image's edges or more, over which it is averaged, the same for all images and others at each
  noise level; 0 for the whole image alone. mean, std: of the pixels in [0, 1] that CLIP sees.
  """

  networks: Mapping[str, Network] = dataclasses.field()
  tokenize: Tokenize
  mean: tuple[float, ...] = HALF
  std: tuple[float, ...] = HALF
  cutouts: int = 0
  of: ClassVar = 'estimate'

  def rows(self, request):
    return {f'{CLIP_GUIDANCE}_tokens': self.tokenize.batch(request.prompts)}

  def score(self, weights, rows, space):
    params, network = weights[GUIDING_CLIP], self.networks[GUIDING_CLIP]
    clip, size = network.bind(params), network.config.vision_config.image_size
    texts = unit(clip.encode_text(rows[f'{CLIP_GUIDANCE}_tokens'])[1].astype(jnp.float32))
    scale = jnp.exp(params['logit_scale'].astype(jnp.float32))

    def score(z, alpha, sigma):
      pixels = (space.decode(weights, z) + 1) / 2
      views = views_of(pixels, size, self.cutouts, alpha, sigma)
      views = (views - jnp.asarray(self.mean)) / jnp.asarray(self.std)
      found = clip.encode_image(views.reshape(-1, *views.shape[2:])).astype(jnp.float32)
      cosines = (unit(found).reshape(len(views), *texts.shape) * texts).sum(axis=-1)
      return scale * cosines.mean(axis=0)

    return score


def views_of(
  images: Images, size: int, cutouts: int, alpha: jax.Array, sigma: jax.Array
) -> jax.Array:
  """Return images [b h w c] as a network of that size sees them: whole, or cut out [n b s s c]."""
  b, h, w, c = images.shape
  whole = (b, size, size, c)
  if not cutouts:
    return jax.image.resize(images, whole, 'cubic', antialias=True)[None]

  def cut(key: jax.Array) -> jax.Array:
    side, top, left = jax.random.uniform(key, (3,))
    side = SMALLEST + (1 - SMALLEST) * side
    scale = size / (side * jnp.asarray([h, w], jnp.float32))
    start = jnp.stack([top, left]) * (1 - side) * jnp.asarray([h, w], jnp.float32)
    return jax.image.scale_and_translate(images, whole, (1, 2), scale, -start * scale, 'linear')

  level = (1e6 * jnp.arctan2(jnp.asarray(sigma), jnp.asarray(alpha))).astype(jnp.int32)
  keys = jax.random.split(jax.random.fold_in(jax.random.key(0), level), cutouts)
  return jax.vmap(cut)(keys)


def of_space(space: Space) -> dict[str, Any]:
  """Return the fields of a `ClassifierConfig` that tell which space's noised z it sees."""
  configs = [network.config for network in space.networks.values()]
  factors = [c.scaling_factor for c in configs if hasattr(c, 'scaling_factor')]
  return {
    'noised': space.name, 'in_channels': space.channels,
    'scaling_factor': float(factors[0]) if factors else 1.0,
  }


def told_noise(
  z: Latents, alpha: jax.Array, sigma: jax.Array
) -> tuple[Latents, PerExample]:
  """Return noised z [b ...] at about unit variance, and t [b] in [0, 1000] of its noise.

  Both depend on z / alpha and sigma / alpha alone: one classifier serves all processes. alpha,
  sigma: [] or [b].
  """
  alpha, sigma = (jnp.broadcast_to(jnp.asarray(part), z.shape[:1]) for part in (alpha, sigma))
  return z / expand(jnp.hypot(alpha, sigma), z), 200 * (noise_label(alpha, sigma) + 2.5)


@dataclasses.dataclass(frozen=True)
class ClassifierGuide(Guide):
  """Log-probability of a class by a classifier of noised z (Dhariwal & Nichol 2021, algorithm 1).

  The class is that of `Inputs.classes`, else the one that the prompt names; an empty prompt asks
  for none and is not guided.
  """

  networks: Mapping[str, Network] = dataclasses.field()

  @property
  def classes(self) -> tuple[str, ...]:
    """Names of the classes."""
    return self.networks[GUIDING_CLASSIFIER].config.class_names

  def check_space(self, space: Space) -> None:
    """Raise UserError unless it was trained on noised z of that space."""
    config, wanted = self.networks[GUIDING_CLASSIFIER].config, of_space(space)
    for name, value in wanted.items():
      if getattr(config, name) != value:
        raise UserError(
          f'the classifier has {name} {getattr(config, name)!r}, but the model draws in a space of '
          f'{value!r}; train one on noised {space.name} of the model (settings.noised).'
        )

  def rows(self, request: Request):
    given = request.inputs.classes if request.inputs is not None else ()
    if given and len(given) not in (1, len(request.prompts)):
      raise UserError(
        f'there are {len(given)} classes and {len(request.prompts)} prompts; give a class for each '
        'prompt, or one for all.'
      )
    names = given or [prompt.strip() for prompt in request.prompts]
    numbers = np.asarray([self._number(name) for name in names], np.int32)
    return {f'{CLASSIFIER_GUIDANCE}_class': np.broadcast_to(numbers, len(request.prompts))}

  def _number(self, name: str) -> int:
    if name and name not in self.classes:
      raise UserError(
        f'{name!r} is no class of the classifier that guides; give --label with one of '
        f'{", ".join(self.classes[:20])} (in code Inputs(classes=...)).'
      )
    return self.classes.index(name) if name else -1

  def score(self, weights, rows, space):
    classifier = self.networks[GUIDING_CLASSIFIER].bind(weights[GUIDING_CLASSIFIER])
    numbers = rows[f'{CLASSIFIER_GUIDANCE}_class']

    def score(z, alpha, sigma):
      log = jax.nn.log_softmax(classifier(*told_noise(z, alpha, sigma))[1])
      found = jnp.take_along_axis(log, jnp.maximum(numbers, 0)[:, None], axis=-1)[:, 0]
      return jnp.where(numbers < 0, 0, found)

    return score
