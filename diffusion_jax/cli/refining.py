"""A refiner that takes the last steps of sampling (Podell et al. 2023, sec. 2.5)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any

from diffusion_jax.cli.options import with_values
from diffusion_jax.errors import UserError, require
from diffusion_jax.limits import Help
from diffusion_jax.pipelines.options import SIZING

if TYPE_CHECKING:
  import numpy as np

HAND_OVER = 0.8
"""Fraction of the noise's timesteps after which a refiner goes on, if nothing is said."""


@dataclasses.dataclass(frozen=True)
class RefinerOptions:
  """Another model for the last steps."""

  refiner: Annotated[str, Help(
    'a model that takes the last steps, such as Stable Diffusion XL refiner, from --denoising_end '
    f'on (default: {HAND_OVER})', 'DIR'
  )] = ''

  def read(self, model, config, values: Mapping[str, Any]) -> tuple[Any, Refiner | None]:
    """Return (the settings of the first model, the refiner without its weights), or (config, None).

    values: options, which hold for both where both know them. UserError where the refiner is none
    of the same latents.
    """
    if not self.refiner:
      return config, None
    from diffusion_jax.pipelines.directory import read_model

    require(hasattr(model, 'space'), '--refiner is for models of diffusion; leave it out.')
    other, parts, sample = read_model(self.refiner)
    if other.text is None:
      raise UserError(f'--refiner {self.refiner} reads no prompts; leave it out.')
    require(
      _space(other) == _space(model),
      f'--refiner {self.refiner} is of other latents than the model; use one that was made for it.',
    )
    end = config.denoising_end if config.denoising_end < 1 else HAND_OVER
    own = {name: value for name, value in values.items() if name != 'denoising_end'}
    sample = dataclasses.replace(with_values(sample, own), steps=config.steps, denoising_start=end)
    first = dataclasses.replace(config, denoising_end=end)
    sample = _read_by(other, model, sample)
    other.check_sampling(sample)
    sample.numbers(other.noise)  # That steps are left for it is known before the first model draws.
    return _read_by(model, other, first), Refiner(other, parts, sample)

  def named(self, refiner: Refiner | None) -> dict[str, str]:
    """Return what a picture's metadata say of it."""
    if refiner is None:
      return {}
    own = refiner.sample.in_force()
    scores = {name: own[name] for name in SIZING if name in own}
    return {**scores, 'refiner': self.refiner, 'refiner_guidance': own['guidance']}


def _read_by(model, other, config):
  """Return the settings of a model without sizes that the other alone is conditioned on."""
  reads, others = (getattr(m.conditioners.get('sizes'), 'reads', ()) for m in (model, other))
  usual = {name: SIZING[name] for name in others if name not in reads}
  return dataclasses.replace(config, **usual)


@dataclasses.dataclass(frozen=True)
class Refiner:
  """A model, its parts, and its settings."""

  model: Any
  parts: Mapping[str, Any]
  sample: Any

  def generate(
    self, latents: Callable[[], Iterable[np.ndarray]], prompts: list[str], *, mesh, **how
  ) -> Iterator[np.ndarray]:
    """Yield images, uint8 [b h w 3], of what `latents` leaves; its weights come after that."""
    import numpy as np

    from diffusion_jax.pipelines.inputs import Inputs

    inputs = Inputs(latents=np.concatenate(list(latents())))
    weights = {role: part.load(mesh=mesh) for role, part in self.parts.items()}
    yield from self.model.generate(
      weights, prompts, self.sample, mesh=mesh, inputs=inputs, **how
    )


def _space(model) -> tuple:
  """Return what latents of a model are."""
  config = getattr(getattr(model.space, 'autoencoder', None), 'config', None)
  names = ('latent_channels', 'factor', 'scaling_factor', 'shift_factor')
  of = tuple(getattr(config, name, None) for name in names)
  return type(model.space), model.space.channels, model.space.factor, of
