"""A model that stays on the devices, to sample from as often as one likes: in a notebook, a page.

Settings, checks and metadata are those of the command `sample`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

from diffusion_jax.backend.xla import enable_compile_cache
from diffusion_jax.cli.editing import EditOptions
from diffusion_jax.cli.inverting import InvertOptions
from diffusion_jax.cli.options import AdapterOptions, ModelOptions, open_model, with_values
from diffusion_jax.cli.sample import PictureOptions, check_options, checked_inputs, metadata_of
from diffusion_jax.config import typed
from diffusion_jax.limits import check_seed
from diffusion_jax.parallel.mesh import MeshConfig, make_mesh
from diffusion_jax.pipelines.generator import Generator
from diffusion_jax.types import Weights

PICTURES = tuple(field.name for field in dataclasses.fields(PictureOptions))
"""Among the settings of `Session.sample`, those that are pictures, and numbers that go with them.
"""


@dataclasses.dataclass(frozen=True, eq=False)
class Session:
  """A model, its weights on the mesh, its settings of sampling, its name, and metadata of adapters.
  """

  model: Generator
  weights: Weights
  config: Any
  name: str
  mesh: Mesh
  adapters: dict[str, str] = dataclasses.field(default_factory=dict)

  @classmethod
  def of(cls, source: ModelOptions, adapters: AdapterOptions | None = None) -> Session:
    """Open what the options of a command name."""
    enable_compile_cache()
    mesh, adapters = make_mesh(MeshConfig()), adapters or AdapterOptions()
    model, weights, config, name = open_model(source, {}, mesh)
    model, weights = adapters.apply(model, weights, config.guides)
    return cls(model, model.on_mesh(weights, mesh), config, name, mesh, adapters.named())

  @classmethod
  def open(cls, model: str = '', workdir: str = '') -> Session:
    """Open a model directory or 'asset:NAME', or a run; without either the model of the package."""
    return cls.of(ModelOptions(workdir=workdir, model=model))

  @classmethod
  def opened(cls, model: Session | str) -> Session:
    """Return an opened model as it is, and open one of that name."""
    return model if isinstance(model, Session) else cls.open(model)

  @property
  def settings(self) -> set[str]:
    """Names of the settings of sampling that the model has."""
    return {field.name for field in dataclasses.fields(self.config)}

  @property
  def needs(self) -> list[str]:
    """Return which of 'image', 'mask', 'control', 'depth', 'small', 'reference' it must be given.
    """
    if not self.model.takes_pictures:
      return []
    names = {'images': 'image', 'masks': 'mask'}
    return [names.get(name, name) for name in self.model.inputs(*self.model.trained_size)]

  def size(self, size: str = '', **settings: Any) -> tuple[int, int]:
    """Return the (height, width) in pixels that `sample` draws. UserError: see there."""
    config, pictures = self._split(settings)
    binning = getattr(config, 'binning', 'none')
    return pictures.sizes(self.model, size, binning, EditOptions())[1]

  def sample(
    self, prompts: str | Sequence[str], *, negative: str = '', seed: int = 0, size: str = '',
    batch: int = 1, **settings: Any,
  ) -> Iterator[tuple[np.ndarray, dict[str, str]]]:
    """Yield (picture, uint8 [h w 3], and its metadata) for one prompt after another.

    Args:
      negative: what not to draw.
      seed: of the noise; pictures of equal prompts differ by their number.
      size: height x width in pixels, such as '96x64'.
      batch: how many are drawn at a time.
      settings: of sampling in place of the model's own, such as steps=20, and files of pictures
        (`PICTURES`), such as image='cat.png'.

    UserError, before the first picture: anything that does not fit the model.
    """
    model, mesh, edit = self.model, self.mesh, EditOptions()
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    check_seed(seed)
    config, pictures = self._split(settings)
    edit.check(pictures.files())
    fits = lambda model, config: pictures.sizes(model, size, config.binning, edit)
    check_options(model, config, pictures, edit, InvertOptions(), fits)
    drawn, (height, width) = fits(model, config)
    inputs, given = checked_inputs(
      model, config, prompts, negative, drawn, lambda: pictures.read(model, config, *drawn, edit)
    )
    metadata = metadata_of(config, negative, (given, self.adapters), seed, self.name)
    batches = model.generate(
      self.weights, prompts, config, seed=seed, mesh=mesh, negative=negative, height=height,
      width=width, batch_size=batch, inputs=inputs,
    )
    images = (image for batch in batches for image in batch)
    for index, (prompt, image) in enumerate(zip(prompts, images, strict=True)):
      yield image, {'prompt': prompt, 'index': str(index), **metadata}

  def _split(self, settings: dict[str, Any]) -> tuple[Any, PictureOptions]:
    """Return the settings of sampling and the pictures."""
    pictures = {name: value for name, value in settings.items() if name in PICTURES}
    values = {name: value for name, value in settings.items() if name not in PICTURES}
    return with_values(self.config, values), typed(PictureOptions, pictures, '')
