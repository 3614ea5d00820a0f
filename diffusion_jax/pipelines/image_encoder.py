"""CLIP's view of a picture in place of a text: models that draw variations of a picture."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.errors import UserError
from diffusion_jax.models.functional import Network
from diffusion_jax.types import Condition, Text, Weights

ROLE = 'image_encoder'
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""Of the pixels in [0, 1] that CLIP was trained on (Radford et al. 2021)."""


@dataclasses.dataclass(frozen=True, eq=False)
class ImageEncoder:
  """CLIP's vision tower with its projection, without weights, where others have text encoders.

  Prompts say nothing to such a model: it is told a picture (`conditions.Inputs.reference`), and,
  where guidance asks for what it draws without one, zeros.

  Attributes:
    mean, std: of each channel of the pixels in [0, 1]; the tower sees (pixel - mean) / std.
  """

  network: Network
  mean: tuple[float, ...] = MEAN
  std: tuple[float, ...] = STD
  tokenizers: tuple = ()

  def replaced(self, networks: dict[str, Network]) -> 'ImageEncoder':
    """The same with another network."""
    return dataclasses.replace(self, network=networks[ROLE])

  @property
  def networks(self) -> dict[str, Network]:
    """By role."""
    return {ROLE: self.network}

  @property
  def size(self) -> int:
    """Edge of the pictures that it sees, in pixels."""
    return self.network.config.image_size

  @property
  def width(self) -> int:
    """d of what it says, [b 1 d]."""
    return self.network.config.projection_dim

  def tokens(self, prompts: Sequence[str], on_long: str = 'truncate') -> np.ndarray:
    """int32 [n 0 0]: no prompt says anything."""
    del on_long
    return np.zeros((len(prompts), 0, 0), np.int32)

  def encode(self, weights: Weights, tokens: jax.Array, clip_skip: int = 0) -> Condition:
    """What the model is told where there is no picture: zeros [b 1 d]."""
    del weights
    if clip_skip:
      raise UserError('the model has no text encoder; leave clip_skip at 0.')
    return Condition(jnp.zeros((len(tokens), 1, self.width), jnp.float32))

  def see(self, weights: Weights, images: jax.Array) -> Text:
    """Images uint8 [b s s 3] -> float32 [b 1 d]."""
    pixels = (images / jnp.float32(255) - jnp.asarray(self.mean)) / jnp.asarray(self.std)
    seen = self.network.bind(weights[ROLE]).encode_image(pixels.astype(jnp.float32))
    return seen.astype(jnp.float32)[:, None]
