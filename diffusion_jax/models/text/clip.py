"""CLIP (Radford et al. 2021): a text tower and a vision tower with one embedding space.

Names and computation follow transformers' CLIPModel.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from diffusion_jax.models.text.clip_config import CLIPConfig
from diffusion_jax.models.text.clip_layers import dense
from diffusion_jax.models.text.clip_text import CLIPTextTransformer
from diffusion_jax.models.text.clip_vision import CLIPVisionTransformer
from diffusion_jax.types import Images, Text, Tokens


class CLIP(nnx.Module):
  """Both towers with their projections; `logit_scale` is the log of 1/temperature, a scalar."""

  def __init__(
    self, config: CLIPConfig, *, dtype=jnp.float32, param_dtype=jnp.float32, rngs: nnx.Rngs
  ):
    kw = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
    text, vision, p = config.text_config, config.vision_config, config.projection_dim
    project = lambda d: dense(d, p, d**-0.5, use_bias=False, **kw)
    self.config = config
    self.text_model = CLIPTextTransformer(text, **kw)
    self.vision_model = CLIPVisionTransformer(vision, **kw)
    self.text_projection = project(text.hidden_size)
    self.visual_projection = project(vision.hidden_size)
    self.logit_scale = nnx.Param(jnp.asarray(config.logit_scale_init_value, param_dtype))

  def encode_text(
    self, ids: Tokens, *, skip: int = 0, normalize: bool = True,
    extra_embeddings: jax.Array | None = None,
  ) -> tuple[Text, jax.Array]:
    """ids [b l] -> (hidden states [b l d], embedding [b p]).

    The embedding is projected but not normalised. The rest is as in CLIPTextModel.encode_text.
    """
    hidden, pooled = self.text_model(
      ids, skip=skip, normalize=normalize, extra_embeddings=extra_embeddings
    )
    return hidden, self.text_projection(pooled)

  def encode_image(self, pixels: Images) -> jax.Array:
    """Pixels [b s s c], already normalised -> embedding [b p], projected but not normalised."""
    return self.visual_projection(self.vision_model(pixels))
