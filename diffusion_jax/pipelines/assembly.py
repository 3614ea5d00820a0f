"""Models put together from configs of their parts."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from diffusion_jax.diffusion.noise import NoiseSchedule, Schedule, ScheduleConfig
from diffusion_jax.diffusion.parameterization import Parameterization
from diffusion_jax.errors import UserError
from diffusion_jax.formats.networks import Part, format_of
from diffusion_jax.models.network import Network
from diffusion_jax.pipelines.conditioners import Conditioner, Context
from diffusion_jax.pipelines.distilled import DistilledGuidance
from diffusion_jax.pipelines.image_conditioners import concatenated
from diffusion_jax.pipelines.model import Diffusion
from diffusion_jax.pipelines.rules import output_channels
from diffusion_jax.pipelines.size_conditions import Sizes
from diffusion_jax.pipelines.spaces import Space
from diffusion_jax.pipelines.text_conditioners import TextEncoders
from diffusion_jax.registry import CONDITIONERS, load


def make_model(
  denoiser: Network, space: Space, conditioners: Mapping[str, Conditioner], noise: NoiseSchedule,
  parameterization: Parameterization, low_resolution: Schedule | None = None,
) -> Diffusion:
  """A model without weights; UserError where its parts do not fit together.

  Input channels that are neither z's nor a conditioner's are an image's, see
  `image_conditioners.CONCATENATED`; low_resolution: the noise levels of an upscaler's.
  """
  config = denoiser.config
  channels, out = space.channels, output_channels(config)
  given = sum(conditioner.channels for conditioner in conditioners.values())
  taken = getattr(config, 'in_channels', channels + given)
  if out not in (channels, 2 * channels) or taken < channels:
    raise UserError(
      f'the denoiser has {taken} input and {out} output channels, but what it is to denoise has '
      f'{channels}; set both to {channels}, or out_channels to {2 * channels} for a learned '
      'variance.'
    )
  if taken < channels + given:
    raise UserError(
      f'the denoiser has {taken} input channels, but z and its conditions have {channels + given}; '
      'set in_channels to that.'
    )
  if 'sizes' in getattr(config, 'conditions', {}):
    texts = (c for c in conditioners.values() if isinstance(c, TextEncoders))
    pooled = sum(text.shape(role).pooled for text in texts for role in text.pooled)
    conditioners = {**conditioners, 'sizes': Sizes.of(config, pooled)}
  if 'guidance' in getattr(config, 'conditions', ()):
    conditioners = {DistilledGuidance.name: DistilledGuidance(), **conditioners}
  found = concatenated(space, taken - channels - given, low_resolution)
  conditioners = {**conditioners, **found}
  for conditioner in conditioners.values():
    conditioner.check(config)
  return Diffusion(space, denoiser, conditioners, noise, parameterization)


def assemble(
  denoiser: Any, space: Any, conditioners: Mapping[str, Mapping[str, Any]],
  schedule: ScheduleConfig, parameterization: Parameterization, *, train: Any = None,
  size: tuple[int, int] | None = None, dtype=jnp.float32,
) -> tuple[Diffusion, dict[str, Part]]:
  """(model of configs, path of each existing part by role).

  UserError: a part cannot be read, or the parts do not fit together.

  Args:
    denoiser: the config of a network of `registry.NETWORKS`.
    space: the `Config` of a row of `registry.SPACES`.
    conditioners: options of rows of `registry.CONDITIONERS`.
    train: the training source, of which conditioners may read the classes.
    size: (height, width) of its images in pixels.
  """
  made, parts = space.build(dtype)
  context, found = Context(made, train, dtype), {}
  for name, options in conditioners.items():
    kind = load(CONDITIONERS, name, 'settings.conditioners')
    found[name], more = kind.build(options, context)
    parts |= more
  network = format_of(denoiser).network(denoiser, dtype=dtype)
  model = make_model(network, made, found, NoiseSchedule.of(schedule), parameterization)
  return dataclasses.replace(model, size=size), parts
