"""Muon: matrices by Newton-Schulz, all else by AdamW."""

import re
from collections.abc import Mapping
from typing import Annotated, Any, NamedTuple

import jax
import optax

from diffusion_jax.config import OptimizerConfig
from diffusion_jax.errors import UserError
from diffusion_jax.limits import Range
from diffusion_jax.train.optimizers.plain import Decay, Mask, NotNegative, Transformation, adamw
from diffusion_jax.types import Params

KERNEL = re.compile(r'(kernel|lora\.[ab])$')
"""Parameters that multiply activations: the last two axes are input and output."""
BY_ADAMW = (
  r'(^|\.)(conv_in|conv_out|patch_embedding)\.|^(\w+\.)?(proj_out\w*|pos_embed|x_embedder|'
  r'context_embedder|norm_out|text_projection|visual_projection|lm_head)\.'
)
"""Layers at a network's ends, which Muon's authors leave to AdamW."""


class MuonState(NamedTuple):
  """States of the two parts, each of its own parameters by name."""

  matrices: Any
  rest: optax.ScaleByAdamState


def axes_of(name: str, shape: tuple[int, ...]) -> tuple[tuple[int, ...], int] | None:
  """(axes that are summed over, axis that comes out) of a matrix by its name; None for no matrix.

  [in out] is one. A convolution [height width in out] is one of height * width * in rows. In front
  of either may be an axis of layers, [layers in out] or [layers height width in out]: one each.
  """
  if not KERNEL.search(name) or len(shape) < 2:
    return None
  window = 2 if len(shape) in (4, 5) else 0
  return tuple(range(len(shape) - 2 - window, len(shape) - 1)), len(shape) - 1


def matrices_of(params: Mapping[str, jax.Array], by_adamw: str) -> dict[str, Any]:
  """The axes of each parameter that is orthogonalised, by name."""
  found = {
    name: axes_of(name, p.shape) for name, p in params.items()
    if not (by_adamw and re.search(by_adamw, name))
  }
  return {name: axes for name, axes in found.items() if axes}


def muon(
  config: OptimizerConfig, schedule: optax.Schedule, mask: Mask, *, momentum: Decay = 0.95,
  nesterov: bool = True, newton_schulz_steps: Annotated[int, Range(1, 20)] = 5,
  rms: NotNegative = 0.2, adamw_factor: NotNegative = 1.0, by_adamw: str = BY_ADAMW,
) -> Transformation:
  """Muon (Jordan et al. 2024), with AdamW of b1, b2 and eps for what is no matrix.

  rms: root mean square of an update before the learning rate, alike for all shapes; 0.2 is that of
  AdamW (Liu et al. 2025, equation 4), so its learning rates serve. 0: Jordan's factor sqrt(max(1,
  out / in)) instead. adamw_factor: on AdamW's learning rate. by_adamw: a regular expression over
  names of matrices that are AdamW's, '' for none. UserError: one that cannot be read.
  """
  from optax import contrib  # Takes a while, and most runs need none of it.

  try:
    re.compile(by_adamw)
  except re.error as error:
    raise UserError(
      f'optimizer.options.by_adamw {by_adamw!r:.80} is no regular expression ({error}); correct it.'
    ) from error

  def numbers(params: Params) -> dict[str, contrib.MuonDimensionNumbers]:
    return {
      name: contrib.MuonDimensionNumbers(*axes)
      for name, axes in matrices_of(params, by_adamw).items()
    }

  moved = contrib.scale_by_muon(
    ns_steps=newton_schulz_steps, beta=momentum, eps=config.eps, nesterov=nesterov,
    weight_dimension_numbers=numbers,
  )
  rest = adamw(config, lambda n: adamw_factor * schedule(n), mask)

  def split(values: Params) -> tuple[Params, Params]:
    own = matrices_of(values, by_adamw)
    return {n: values[n] for n in own}, {n: v for n, v in values.items() if n not in own}

  def init(params: Params) -> MuonState:
    matrices, others = split(params)
    return MuonState(moved.init(matrices), rest.init(others))

  def update(grads: Params, state: MuonState, params: Params, **_):
    (matrices, others), (own, beside) = split(grads), split(params)
    rate = schedule(state.matrices.count)
    directions, after = moved.update(matrices, state.matrices, own)
    updates = {}
    for name, direction in directions.items():
      decay = config.weight_decay * mask[name] * params[name]
      updates[name] = -rate * (_scale(name, direction.shape, rms) * direction + decay)
    others, after_rest = rest.update(others, state.rest, beside)
    return updates | others, MuonState(after, after_rest)

  return Transformation(init, update)


def _scale(name: str, shape: tuple[int, ...], rms: float) -> float:
  """The factor on an orthogonal matrix of these axes."""
  ins, out = axes_of(name, shape)
  rows, columns = 1, shape[out]
  for axis in ins:
    rows *= shape[axis]
  return rms * max(rows, columns)**0.5 if rms else max(1.0, columns / rows)**0.5
