"""CLIP's vision tower, a ViT (Dosovitskiy et al. 2021), alone and with its projection."""

import jax
import jax.numpy as jnp
from flax import nnx

from diffusion_jax.layout import constrain
from diffusion_jax.models.checks import require
from diffusion_jax.models.layers import Conv
from diffusion_jax.models.norms import LayerNorm
from diffusion_jax.models.text.clip_config import CLIPVisionConfig, CLIPVisionProjectionConfig
from diffusion_jax.models.text.clip_layers import CLIPEncoder, dense, embed
from diffusion_jax.types import Images


class CLIPVisionEmbeddings(nnx.Module):
  """Class token, patches and learned positions: pixels [b s s c] -> [b 1+(s/p)^2 d]."""

  def __init__(self, config: CLIPVisionConfig, *, dtype, param_dtype, rngs: nnx.Rngs):
    kw = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
    d, p = config.hidden_size, config.patch_size
    init = nnx.initializers.normal(d**-0.5)
    self.class_embedding = nnx.Param(init(rngs.params(), (d,), param_dtype))
    self.patch_embedding = Conv(
      config.num_channels, d, p, stride=p, padding=0, use_bias=False, **kw
    )
    self.position_embedding = embed((config.image_size // p) ** 2 + 1, d, 0.02, **kw)

  def __call__(self, pixels: Images) -> jax.Array:
    patches = self.patch_embedding(pixels)
    b, d = patches.shape[0], patches.shape[-1]
    first = jnp.broadcast_to(self.class_embedding[...].astype(patches.dtype), (b, 1, d))
    x = jnp.concatenate([first, patches.reshape(b, -1, d)], axis=1)
    return constrain(x + self.position_embedding(jnp.arange(x.shape[1])), 'tokens')


class CLIPVisionTransformer(nnx.Module):
  """Normalised pixels [b s s c] -> the class token after the last norm [b d]."""

  def __init__(self, config: CLIPVisionConfig, **kw):
    d, eps = config.hidden_size, config.layer_norm_eps
    self.config = config
    self.embeddings = CLIPVisionEmbeddings(config, **kw)
    self.pre_layrnorm = LayerNorm(d, eps, **kw)  # Spelt so in every published checkpoint.
    self.encoder = CLIPEncoder(config, causal=False, **kw)
    self.post_layernorm = LayerNorm(d, eps, **kw)

  def __call__(self, pixels: Images) -> jax.Array:
    size = self.config.image_size
    expected = (size, size, self.config.num_channels)
    require(
      pixels.shape[1:] == expected,
      f'The vision tower takes images {list(expected)}, not {list(pixels.shape[1:])}; resize them.',
    )
    states, _ = self.encoder(self.pre_layrnorm(self.embeddings(pixels)))
    return self.post_layernorm(states[:, 0])


class CLIPVisionModel(nnx.Module):
  """The vision tower alone."""

  def __init__(
    self, config: CLIPVisionConfig, *, dtype=jnp.float32, param_dtype=jnp.float32, rngs: nnx.Rngs
  ):
    self.config = config
    self.vision_model = CLIPVisionTransformer(
      config, dtype=dtype, param_dtype=param_dtype, rngs=rngs
    )

  def encode_image(self, pixels: Images) -> jax.Array:
    """Pixels [b s s c], already normalised -> the class token after the last norm [b d]."""
    return self.vision_model(pixels)


class CLIPVisionModelWithProjection(CLIPVisionModel):
  """The vision tower with its projection: the image encoder of image variations."""

  def __init__(
    self, config: CLIPVisionProjectionConfig, *, dtype=jnp.float32, param_dtype=jnp.float32,
    rngs: nnx.Rngs,
  ):
    kw = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
    super().__init__(config, **kw)
    d = config.hidden_size
    self.visual_projection = dense(d, config.projection_dim, d**-0.5, use_bias=False, **kw)

  def encode_image(self, pixels: Images) -> jax.Array:
    """Pixels [b s s c], already normalised -> embedding [b p], projected but not normalised."""
    return self.visual_projection(super().encode_image(pixels))
