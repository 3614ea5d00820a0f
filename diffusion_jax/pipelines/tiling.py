"""Pictures that continue beyond their opposite edges: patterns to repeat, panoramas."""

import dataclasses

from diffusion_jax.errors import UserError
from diffusion_jax.models.network import Network
from diffusion_jax.pipelines.image_conditioners import CONTROLNET
from diffusion_jax.pipelines.model import Diffusion
from diffusion_jax.pipelines.spaces import LatentSpace


def tiled(model: Diffusion, axes: str) -> Diffusion:
  """Return the same model, of the same weights, whose convolutions wrap around at the edges.

  Attention knows no places in a U-Net, so that rolled noise gives the rolled picture, by multiples
  of what the networks halve. axes: one of `models.network.TILING`. UserError for a denoiser that
  does know them.
  """
  if axes == 'none':
    return model
  wrapped = lambda network: network.with_compute(tiling=axes)
  if not _wraps(model.denoiser):
    raise UserError(
      f'tiling is {axes}, but the denoiser is no U-Net: it tells the edges of a picture by the '
      'places of its patches; leave --tiling out, or use a model with a U-Net.'
    )
  space = model.space
  if isinstance(space, LatentSpace):
    space = dataclasses.replace(space, autoencoder=wrapped(space.autoencoder))

  def of_conditioner(conditioner):
    if hasattr(conditioner, 'space'):
      conditioner = dataclasses.replace(conditioner, space=space)
    control = conditioner.networks.get(CONTROLNET)
    return conditioner.replaced({CONTROLNET: wrapped(control)}) if control else conditioner

  return dataclasses.replace(
    model, space=space, denoiser=wrapped(model.denoiser),
    worse=model.worse and wrapped(model.worse),
    conditioners={name: of_conditioner(one) for name, one in model.conditioners.items()},
  )


def _wraps(network: Network) -> bool:
  """Return whether a network can be without edges."""
  try:
    network.with_compute(tiling='both')
  except UserError:
    return False
  return True
