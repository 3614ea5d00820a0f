"""ControlNet (Zhang et al. 2023), a copy of a U-Net's encoder that steers it by an image.

Names and computation follow diffusers' ControlNetModel.
"""

import dataclasses
import itertools
from typing import Literal

import jax
from flax import nnx

from diffusion_jax.errors import require
from diffusion_jax.models.attention import masked
from diffusion_jax.models.config import Width, Widths
from diffusion_jax.models.layers import Conv, pointwise
from diffusion_jax.models.unet import Encoder, EncoderConfig, UNetConfig
from diffusion_jax.parallel.layout import constrain
from diffusion_jax.types import Condition, Latents, Params, Residuals, Timesteps

zeros = nnx.initializers.zeros


@dataclasses.dataclass(frozen=True)
class ControlNetConfig(EncoderConfig):
  """Shape of a ControlNet; the defaults are those for Stable Diffusion 1.

  conditioning_embedding_out_channels: widths of the network that shrinks the control image to the
  latents' size, halving it between each two. controlnet_conditioning_channel_order: 'bgr' where the
  weights expect blue first; users give RGB. global_pool_conditions: residuals are averaged over all
  positions (the 'shuffle' ControlNet).
  """

  conditioning_channels: Width = 3
  conditioning_embedding_out_channels: Widths = (16, 32, 96, 256)
  controlnet_conditioning_channel_order: Literal['rgb', 'bgr'] = 'rgb'
  global_pool_conditions: bool = False

  def check(self) -> None:
    super().check()
    self.require(self.mid_block_type is not None, 'mid_block_type', 'must name a block')

  @classmethod
  def for_unet(cls, unet: UNetConfig, **changes) -> 'ControlNetConfig':
    """The ControlNet that fits a U-Net, with `changes` to the fields that a U-Net lacks."""
    shared = {f.name: getattr(unet, f.name) for f in dataclasses.fields(EncoderConfig)}
    return cls(**shared, **changes)

  @property
  def image_factor(self) -> int:
    """Pixels of the control image along one side of a position of the latents."""
    return 2 ** (len(self.conditioning_embedding_out_channels) - 1)


class ControlNetConditioningEmbedding(nnx.Module):
  """Convolutions that halve the control image until it fits the latents: [b H W 3] -> [b h w o]."""

  def __init__(self, config: ControlNetConfig, **kw):
    widths = config.conditioning_embedding_out_channels
    self.conv_in = Conv(config.conditioning_channels, widths[0], **kw)
    blocks = []
    for i, o in itertools.pairwise(widths):
      blocks += [Conv(i, i, **kw), Conv(i, o, stride=2, **kw)]
    self.blocks = nnx.List(blocks)
    self.conv_out = Conv(widths[-1], config.block_out_channels[0], init=zeros, **kw)

  def __call__(self, image: jax.Array) -> jax.Array:
    x = nnx.silu(self.conv_in(image))
    for block in self.blocks:
      x = nnx.silu(block(x))
    return self.conv_out(x)


class ControlNet(Encoder):
  """x, time, text, control image -> residuals of a U-Net's skips and mid block, zero at first."""

  def __init__(self, config: ControlNetConfig, **kw):
    super().__init__(config, **kw)
    self.controlnet_cond_embedding = ControlNetConditioningEmbedding(config, **kw)
    widths = config.block_out_channels
    outputs = [widths[0]]
    for level, width in enumerate(widths):
      halves = level < len(widths) - 1
      outputs += [width] * (config.layers[level] + halves)
    self.controlnet_down_blocks = nnx.List([pointwise(o, o, init=zeros, **kw) for o in outputs])
    self.controlnet_mid_block = pointwise(widths[-1], widths[-1], init=zeros, **kw)

  def __call__(self, x: Latents, t: Timesteps, condition: Condition) -> Residuals:
    """The U-Net's `residuals`, times the control's strength [b] (None: 1).

    condition: as the U-Net's, without its guidance. Its control is [b H W 3] in [0, 1], NOT [-1,
    1], with H = h * image_factor and W = w * image_factor. UserError: as the U-Net; another shape
    of control.
    """
    control = condition.control
    condition = condition._replace(image=None, guidance=None)
    x = self.join(x, t, condition)
    self._check_image(x, control)
    return self.run_all(self._steer, x, t, condition)

  def _steer(self, x, t, condition: Condition) -> Residuals:
    image, strength = condition.control, condition.strength
    if self.config.controlnet_conditioning_channel_order == 'bgr':
      image = image[..., ::-1]
    time = self.embed(t, condition)
    seen = self.run(self.controlnet_cond_embedding, image)
    x = constrain(self.conv_in(x) + seen, 'image')
    x, skips = self.descend(x, time, masked(condition.text, condition.mask))

    def finish(y: jax.Array) -> jax.Array:
      y = self._pool(y)
      return y if strength is None else y * strength[:, None, None, None].astype(y.dtype)

    convs = zip(self.controlnet_down_blocks, skips, strict=True)
    return [finish(conv(y)) for conv, y in convs], finish(self.controlnet_mid_block(x))

  def _pool(self, y: jax.Array) -> jax.Array:
    return y.mean((1, 2), keepdims=True) if self.config.global_pool_conditions else y

  def _check_image(self, x: jax.Array, image: jax.Array | None) -> None:
    require(image is not None, 'A ControlNet needs the control image; pass it in the condition.')
    b, h, w, _ = x.shape
    factor = self.config.image_factor
    wanted = (b, h * factor, w * factor, self.config.conditioning_channels)
    require(
      image.shape == wanted,
      f'The control image must have shape {list(wanted)} for latents of {h}x{w}, not '
      f'{list(image.shape)}; resize it.',
    )


def from_unet(fresh: Params, unet: Params) -> Params:
  """Initial parameters of a ControlNet from a U-Net (Zhang et al. 2023, sec. 3.1).

  fresh: new parameters, used for what a U-Net lacks, or shapes. unet: parameters of the U-Net to
  steer. UserError where shapes differ.
  """
  own = ('controlnet_cond_embedding.', 'controlnet_down_blocks.', 'controlnet_mid_block.')
  params = {}
  for name, value in fresh.items():
    params[name] = value if name.startswith(own) else unet.get(name)
    found = None if params[name] is None else list(params[name].shape)
    require(
      found == list(value.shape),
      f'{name} is {list(value.shape)} in the ControlNet and {found or "missing"} in the U-Net; '
      'make the ControlNet with ControlNetConfig.for_unet.',
    )
  return params
