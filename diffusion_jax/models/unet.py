"""The text-conditional U-Net of latent diffusion (Rombach et al. 2022; Ronneberger et al. 2015).

Names and computation follow diffusers' UNet2DConditionModel in the shapes of Stable Diffusion 1,
2 and XL and of the models made from them. The network knows nothing of noise: what its output
means is the denoiser's business.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from diffusion_jax.layout import constrain
from diffusion_jax.models.checks import require
from diffusion_jax.models.layers import Conv
from diffusion_jax.models.norms import GroupNorm
from diffusion_jax.models.unet_blocks import UpBlock
from diffusion_jax.models.unet_config import UNetConfig
from diffusion_jax.models.unet_encoder import Encoder
from diffusion_jax.types import Latents, Residuals, Text, Timesteps

__all__ = ['UNet', 'UNetConfig']


class UNet(Encoder):
  """x, time, text and other conditions -> an array shaped like x (with out_channels)."""

  def __init__(
    self, config: UNetConfig, *, dtype=jnp.float32, param_dtype=jnp.float32, rngs: nnx.Rngs
  ):
    kw = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
    super().__init__(config, **kw)
    width, levels = config.block_out_channels[0], range(len(config.block_out_channels))
    self.up_blocks = nnx.List([UpBlock(config, step, **kw) for step in levels])
    self.conv_norm_out = GroupNorm(config.norm_num_groups, width, config.norm_eps, **kw)
    self.conv_out = Conv(width, config.out_channels, **kw)

  def __call__(
    self, x: Latents, t: Timesteps, text: Text, *, pooled: jax.Array | None = None,
    sizes: jax.Array | None = None, labels: jax.Array | None = None,
    residuals: Residuals | None = None,
  ) -> Latents:
    """x [b h w c], t [b] in [0, T), text [b l d] -> [b h w c].

    Args:
      pooled: [b p], the text encoder's pooled embedding (Stable Diffusion XL).
      sizes: [b 6] in pixels: original height and width, top and left of the crop, target height
        and width (Stable Diffusion XL; Podell et al. 2023, sec. 2.2).
      labels: [b], a class or a noise level; [b p] where class_embed_type is 'projection'.
      residuals: a ControlNet's: arrays to add to the skips, and one for the mid block's result.

    UserError where h or w cannot be halved once per level, a shape does not match the config, or
    a condition is missing or not one of this network's (`config.conditions`).
    """
    self.check(x, t, text, pooled=pooled, sizes=sizes, labels=labels)
    return self.run_all(self._predict, x, t, text, pooled, sizes, labels, residuals)

  def _predict(self, x, t, text, pooled, sizes, labels, residuals: Residuals | None) -> Latents:
    time = self.embed(t, pooled, sizes, labels)
    x, skips = self.descend(constrain(self.conv_in(x), 'image'), time, text)
    if residuals is not None:
      x, skips = _controlled(x, skips, residuals)
    for block in self.up_blocks:
      x = block(x, skips, time, text)
    return self.run(self._finish, x)

  def _finish(self, x: jax.Array) -> Latents:
    return constrain(self.conv_out(self.conv_norm_out(x, activate=True)), 'image')


def _controlled(
  x: jax.Array, skips: list[jax.Array], residuals: Residuals
) -> tuple[jax.Array, list[jax.Array]]:
  """Adds a ControlNet's residuals, which may be [b 1 1 c], in the U-Net's own type."""
  targets, additions = [*skips, x], [*residuals[0], residuals[1]]
  require(
    len(targets) == len(additions),
    f'The residuals must hold {len(skips)} arrays for the skips and one for the mid block, '
    f'not {len(residuals[0])} and one; use a ControlNet made for this U-Net.',
  )
  for n, (target, addition) in enumerate(zip(targets, additions, strict=True)):
    b, _, _, c = target.shape
    require(
      addition.shape in (target.shape, (b, 1, 1, c)),
      f'Residual {n} has shape {list(addition.shape)}, but must have {list(target.shape)}; use a '
      'ControlNet made for this U-Net, and a control image of the size of its images.',
    )
  *skips, x = [y + r.astype(y.dtype) for y, r in zip(targets, additions, strict=True)]
  return x, skips
