"""A base model and others that enlarge what it draws (Ho et al. 2022; Saharia et al. 2022).

Each stage is a model of its own with the conditioner `upscale`: in training it sees small pictures
with noise of all levels, its label, so that it mends what the stage before has got wrong; while
sampling the level is chosen. A cascade is one directory with a folder for each.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from diffusion_jax.errors import UserError, require, shown
from diffusion_jax.files import INDEX, check_folder, inside
from diffusion_jax.formats.networks import Part, resolve
from diffusion_jax.formats.pipeline import new_directory, own_path
from diffusion_jax.formats.tensors import read_json, write_json
from diffusion_jax.limits import EdgeRule
from diffusion_jax.models.network import Network
from diffusion_jax.pipelines.generator import CLASS, read_generator
from diffusion_jax.pipelines.inputs import OPTIONS, Inputs
from diffusion_jax.pipelines.model import Diffusion
from diffusion_jax.pipelines.sampling import SampleConfig
from diffusion_jax.pixels import to_uint8
from diffusion_jax.types import Weights

CASCADE = 'Cascade'
"""Its class in model_index.json, and row of `registry.MODELS`."""
MOST_STAGES = 8


class Stage(NamedTuple):
  """A model that enlarges, and how it samples."""

  model: Diffusion
  sample: SampleConfig

  @property
  def times(self) -> int:
    """Edge of what it draws in edges of the small picture, which is as large as its z."""
    return self.model.space.factor


def role_of(stage: int, role: str) -> str:
  """Return the role in a cascade of a network of stage 0, the base, or a later one."""
  return f'{stage}.{role}' if stage else role


@dataclasses.dataclass(frozen=True, eq=False)
class Cascade(Diffusion):
  """`base`, whose fields are its own, too, and `stages`; sizes are those of the last pictures."""

  base: Diffusion | None = None
  stages: tuple[Stage, ...] = ()

  @classmethod
  def of(cls, base: Diffusion, stages: Sequence[Stage]) -> Cascade:
    """Return the cascade; UserError for a base that needs pictures, or a stage that does not."""
    need = ', '.join(base.inputs(*base.trained_size))
    require(not need, f'the base of a cascade needs {need}; give a model of prompts alone.')
    for number, stage in enumerate(stages, 1):
      needs = set(stage.model.inputs(*stage.model.trained_size))
      require(
        needs == {'small'} and stage.times > 1,
        f'stage {number} of the cascade enlarges no picture: it needs the conditioner upscale, and '
        'a space whose places are more than a pixel.',
      )
    fields = [field.name for field in dataclasses.fields(Diffusion) if field.init]
    own = {name: getattr(base, name) for name in fields}
    return cls(**own, base=base, stages=tuple(stages))

  @property
  def times(self) -> int:
    """Edge of the pictures in edges of the base's."""
    return int(np.prod([stage.times for stage in self.stages]))

  @property
  def networks(self) -> dict[str, Network]:
    return dict(self.base.networks) | {
      role_of(i, role): network for i, stage in enumerate(self.stages, 1)
      for role, network in stage.model.networks.items()
    }

  @property
  def drawn_by(self) -> tuple[str, ...]:
    stages = enumerate(self.stages, 1)
    more = (role_of(i, role) for i, stage in stages for role in stage.model.drawn_by)
    return (*self.base.drawn_by, *more)

  @property
  def trained_size(self) -> tuple[int, int]:
    height, width = self.base.trained_size
    return height * self.times, width * self.times

  @property
  def edges(self) -> EdgeRule:
    rules, left = [(self.base.edges, self.times)], self.times
    for stage in self.stages:
      left //= stage.times
      rules.append((stage.model.edges, left))
    most = [rule.most * after for rule, after in rules if rule.most]
    multiple = int(np.lcm.reduce([rule.multiple * after for rule, after in rules]))
    return EdgeRule(multiple, min(most) // multiple * multiple if most else None)

  def replaced(self, networks):
    raise UserError('a cascade is neither trained nor changed as one; take the model of a stage.')

  def with_conditioner(self, name, conditioner):
    return self.replaced({})

  def rows(self, prompts, negative='', inputs=None, height=None, width=None, *more, **named):
    """Those of the base."""
    height, width = self.size_of(height, width)
    small = height // self.times, width // self.times
    return self.base.rows(prompts, negative, inputs, *small, *more, **named)

  def check_sampling(self, config: SampleConfig, negative: str = '') -> None:
    self.base.check_sampling(config, negative)
    for stage in self.stages:
      stage.model.check_sampling(stage.sample)

  def sample(
    self, weights: Weights, prompts: Sequence[str], config: SampleConfig, *, seed: int, mesh,
    negative: str = '', batch_size: int = 16, first: int = 0, inputs: Inputs | None = None,
    height: int | None = None, width: int | None = None, latents: bool = False, **more,
  ) -> Iterator[np.ndarray]:
    """As in `Diffusion`: the config and `more`, such as noise, are of the base; the stages sample
    by their own settings, with `inputs.noise_level`, and draw noise of their own from the seed.

    UserError: inputs that are pictures; latents, which a cascade has none of.
    """
    inputs = inputs or Inputs()
    given = [option for name, option in OPTIONS.items() if getattr(inputs, name) is not None]
    require(not given, f'a cascade draws from prompts alone; leave {", ".join(given)} out.')
    require(not latents, 'a cascade leaves no latents to go on from; use one of its models.')
    height, width = self.size_of(height, width)
    draw = dict(mesh=mesh, batch_size=batch_size, negative=negative)
    batches = self.base.sample(
      weights, prompts, config, seed=seed, first=first, height=height // self.times,
      width=width // self.times, **draw, **more,
    )
    done = 0
    for images in batches:
      told = prompts[done : done + len(images)]
      for number, stage in enumerate(self.stages, 1):
        images = self._enlarged(
          weights, number, stage, to_uint8(images), told, level=inputs.noise_level, seed=seed,
          first=first + done, **draw,
        )
      done += len(told)
      yield images

  def _enlarged(
    self, weights: Weights, number: int, stage: Stage, small: np.ndarray, prompts: Sequence[str],
    *, level: int, seed: int, **draw,
  ) -> np.ndarray:
    """Return what a stage makes of uint8 [b h w 3], float32 [b H W 3]."""
    own = {role: weights[role_of(number, role)] for role in stage.model.networks}
    # Else its noise would begin with that of the stage before.
    seed = int(np.random.SeedSequence([seed, number]).generate_state(1)[0])
    height, width = (edge * stage.times for edge in small.shape[1:3])
    draw['negative'] = draw['negative'] if stage.model.text is not None else ''
    return np.concatenate(list(stage.model.sample(
      own, prompts, stage.sample, seed=seed, height=height, width=width,
      inputs=Inputs(small=small, noise_level=level), **draw,
    )))


def _member(path: str, dtype=jnp.float32) -> tuple[Diffusion, dict[str, Part], SampleConfig]:
  model, parts, sample = read_generator(path, dtype)
  require(
    type(model) is Diffusion,
    f'{path} is a {type(model).__name__}; a cascade is of diffusion models, each by itself.',
  )
  return model, parts, sample


def read(path: str, dtype=jnp.float32) -> tuple[Cascade, dict[str, Part], SampleConfig]:
  """(model, parts by role, the base's settings) of a directory, as a row of `registry.MODELS`.

  UserError: as `read_generator` of its models, and stages that do not fit together.
  """
  where = resolve(path)
  folders = read_json(inside(where / INDEX, where)).get('stages')
  require(
    isinstance(folders, list) and 2 <= len(folders) <= MOST_STAGES
    and all(isinstance(name, str) for name in folders),
    f'{where / INDEX}: stages is {shown(folders)}; it must be a list of 2 to {MOST_STAGES} '
    'folders.',
  )
  found = [_member(own_path(name, where), dtype) for name in folders]
  stages = [Stage(model, sample) for model, _, sample in found[1:]]
  parts = {
    role_of(i, role): part for i, (_, own, _) in enumerate(found) for role, part in own.items()
  }
  return Cascade.of(found[0][0], stages), parts, found[0][2]


def save(path: str, sources: Sequence[str]) -> None:
  """Write a cascade as a new directory with copies of models, the base first.

  UserError: models that are not read, that do not fit together, or a path that is taken.
  """
  require(
    2 <= len(sources) <= MOST_STAGES,
    f'a cascade has a base and up to {MOST_STAGES - 1} stages; name each by --stage.',
  )
  base, *stages = (_member(source) for source in sources)
  Cascade.of(base[0], [Stage(model, sample) for model, _, sample in stages])
  names = ['base', *(f'stage_{number}' for number in range(1, len(sources)))]
  with new_directory(Path(path)) as folder:
    for name, source in zip(names, sources, strict=True):
      check_folder(resolve(source))
      shutil.copytree(resolve(source), folder / name)
    write_json(folder / INDEX, {CLASS: CASCADE, 'stages': names})
