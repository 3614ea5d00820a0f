"""The FID Inception as features, behind the resize rule of each tool."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import jax
from jax.sharding import Mesh

from diffusion_jax.errors import require
from diffusion_jax.evaluation.extractors.resize import OF_INCEPTION, prepare
from diffusion_jax.formats.inception import load_inception
from diffusion_jax.models.features.inception import SIZE
from diffusion_jax.models.network import Network
from diffusion_jax.parallel.mesh import put_params
from diffusion_jax.types import Params


class InceptionExtractor:
  """The FID Inception behind one of `resize.OF_INCEPTION`.

  Outputs are those of `models.inception.Inception`. UserError for an output or a rule that it does
  not have.
  """

  def __init__(
    self, network: Network, params: Params, weights: str, resizing: str = 'tensorflow',
    outputs: Sequence[str] = ('pool3',),
  ):
    require(
      resizing in OF_INCEPTION,
      f'Inception has no resize rule {resizing!r}; choose of {", ".join(OF_INCEPTION)}.',
    )
    known = network.config.widths
    for output in outputs:
      require(output in known, f'Inception has no {output!r}; choose of {", ".join(known)}.')
    self.name = f'inception/{weights}/{resizing}'
    self.widths = {output: known[output] for output in outputs}
    self.network, self.params = network, params
    self.size, self.resizing = SIZE, resizing

  def apply(self, params: Params, images: jax.Array) -> dict[str, jax.Array]:
    """uint8 [b h w 3] -> {output: [b d]}."""
    return self.network.bind(params)(prepare(images, SIZE, self.resizing), tuple(self.widths))


def load_inception_extractor(
  path: str | os.PathLike, rule: str, outputs: Sequence[str], *, mesh: Mesh | None = None
) -> InceptionExtractor:
  """Load the Inception in a file. UserError where it cannot be read or lacks an output."""
  network, params = load_inception(path)
  params = params if mesh is None else put_params(params, mesh)
  return InceptionExtractor(network, params, Path(path).stem, rule, outputs)
