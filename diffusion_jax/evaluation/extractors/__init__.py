"""Networks that turn images into features; commands and configs name them KIND:PATH."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Protocol

import jax
from jax.sharding import Mesh
from jaxtyping import Array, Float, UInt8

from diffusion_jax.backend.xla import jit
from diffusion_jax.errors import require
from diffusion_jax.evaluation.metrics.metric import outputs_of
from diffusion_jax.models.features.inception import InceptionConfig
from diffusion_jax.registry import EXTRACTORS, check_paths, load
from diffusion_jax.types import Params


class Extractor(Protocol):
  """Images -> features, as a pure function of parameters.

  Attributes:
    name: network, file of weights, resize rule: features of different names do not compare.
    widths: of each output by name.
    params: arguments of `apply`.
    size, resizing: edge of the network's images, and the rule of `resize.RULES` to it; float32
      images of 0-255 are resized already.
  """

  name: str
  widths: dict[str, int]
  params: Params
  size: int
  resizing: str

  def apply(
    self, params: Params, images: UInt8[Array, 'b h w 3']
  ) -> dict[str, Float[Array, 'b d']]:
    """Return float32 features of uint8 images of any size; pure."""
    ...


def compiled(extractor: Extractor) -> Callable[[Params, jax.Array], dict[str, jax.Array]]:
  """Return the jitted `apply`, with the options under which convolutions are quickest."""
  return jit(extractor.apply)


def load_extractor(
  name: str, path: str | os.PathLike, *, outputs: Sequence[str] = (), mesh: Mesh | None = None
) -> Extractor:
  """Load an extractor of `registry.EXTRACTORS` with the weights at a path, on the mesh or the host.

  outputs: of Inception, which computes no further; default 'pool3'. UserError: no weights, or no
  such output.
  """
  loader, rule = load(EXTRACTORS, name), name.partition('/')[2]
  made = loader(path, rule, outputs or ('pool3',), mesh=mesh) if rule else loader(path, mesh=mesh)
  missing = sorted(set(outputs) - set(made.widths))
  require(not missing, f'{name} has no {", ".join(missing)}; choose of {", ".join(made.widths)}.')
  return made


def load_named(
  named: Sequence[str], metrics: Sequence[str], mesh: Mesh, option: str = '--features'
) -> list[Extractor]:
  """An extractor for each KIND:PATH, on the mesh, with Inception's outputs that metrics need.

  UserError: another form, an unknown metric, or unreadable weights.
  """
  check_paths(EXTRACTORS, named, option)
  found = []
  for text in named:
    kind, _, path = text.partition(':')
    inception = kind.startswith('inception')
    # ImageNet's logits know nothing of the classes of one's own.
    widths = {k: v for k, v in InceptionConfig().widths.items() if k != 'logits'}
    outputs = outputs_of(metrics, widths) if inception else ()
    found.append(load_extractor(kind, path, outputs=outputs, mesh=mesh))
  return found
