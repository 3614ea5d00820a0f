"""Models put together from configs of their parts."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from diffusion_jax.diffusion.noise import NoiseSchedule, Schedule, ScheduleConfig
from diffusion_jax.diffusion.parameterization import Parameterization
from diffusion_jax.errors import UserError
from diffusion_jax.formats.networks import Part, format_of
from diffusion_jax.models.network import Network
from diffusion_jax.pipelines.conditioners import Conditioner, Context, Sizes, concatenated
from diffusion_jax.pipelines.model import Diffusion, output_channels
from diffusion_jax.pipelines.spaces import Space
from diffusion_jax.registry import CONDITIONERS, load


def make_model(
  denoiser: Network, space: Space, conditioners: Mapping[str, Conditioner], noise: NoiseSchedule,
  parameterization: Parameterization, low_resolution: Schedule | None = None,
) -> Diffusion:
  """A model without weights. UserError where its parts do not fit together.

  Input channels of the denoiser that are neither z's nor taken by a conditioner are those of a
  picture, see `conditioners.CONCATENATED`; `low_resolution` has the noise levels of an upscaler's.
  """
  config = denoiser.config
  for conditioner in conditioners.values():
    wanted, width = getattr(config, 'cross_attention_dim', None), getattr(conditioner, 'width', 0)
    if width and wanted and width != wanted:
      raise UserError(
        f'unet.cross_attention_dim is {wanted}, but the text encoder gives texts of width {width}; '
        f'set it to {width}.'
      )
  channels, out = space.channels, output_channels(config)
  taken = getattr(config, 'in_channels', channels)
  if out not in (channels, 2 * channels) or taken < channels:
    raise UserError(
      f'the denoiser has {taken} input and {out} output channels, but what it is to denoise has '
      f'{channels}; set both to {channels}, or out_channels to {2 * channels} for a learned '
      'variance.'
    )
  label, rows = conditioners.get('class'), getattr(config, 'num_embeds_ada_norm', None)
  if label is not None and rows is not None and rows != len(label.classes):
    raise UserError(
      f'denoiser.num_embeds_ada_norm is {rows}, but there are {len(label.classes)} classes; set it '
      'to that.'
    )
  if getattr(config, 'addition_embed_type', None) == 'text_time':
    conditioners = {**conditioners, 'sizes': Sizes()}
  pictures = taken - channels - sum(c.channels(space) for c in conditioners.values())
  conditioners = {**conditioners, **concatenated(space, pictures, schedule=low_resolution)}
  return Diffusion(space, denoiser, conditioners, noise, parameterization)


def assemble(
  denoiser: Any, space: Any, conditioners: Mapping[str, Mapping[str, Any]],
  schedule: ScheduleConfig, parameterization: Parameterization, *, train: Any = None,
  dtype=jnp.float32,
) -> tuple[Diffusion, dict[str, Part]]:
  """A model of configs, and where the parts lie that are there already, by role.

  Args:
    denoiser: the config of a network of `registry.NETWORKS`.
    space: the `Config` of a row of `registry.SPACES`.
    conditioners: options of rows of `registry.CONDITIONERS`.
    train: the source that is trained on, of which conditioners may ask for the classes.

  Raises:
    UserError: a part cannot be read, or the parts do not fit together.
  """
  made, parts = space.build(dtype)
  context, built = Context(made, train, dtype), {}
  for name, options in conditioners.items():
    kind = load(CONDITIONERS, name, 'settings.conditioners')
    built[name], more = kind.build(options, context)
    parts |= more
  network = format_of(denoiser).network(denoiser, dtype=dtype)
  return make_model(network, made, built, NoiseSchedule.of(schedule), parameterization), parts
