"""Array types, dimension letters and value ranges that the whole package shares.

Letters: b batch, h height, w width, c channels, l text length, d text width, p embedding width.
Images are NHWC. On disk and in sources they are uint8 in [0, 255]; networks see floats in [-1, 1].
Latents are what the denoiser sees: (autoencoder latent - shift_factor) * scaling_factor, so that
they have about unit variance. Timesteps are integers in [0, T).
"""

from typing import TypedDict

import numpy as np
from jaxtyping import Array, Float, Int

Images = Float[Array, 'b h w c']
Latents = Float[Array, 'b h w c']
Text = Float[Array, 'b l d']
Tokens = Int[Array, 'b l']
Timesteps = Float[Array, 'b'] | Int[Array, 'b']
PerExample = Float[Array, 'b']
Residuals = tuple[list[Float[Array, 'b h w c']], Float[Array, 'b h w c']]
"""A ControlNet's: what to add to the U-Net's skips, and to its mid block's result."""
Params = dict[str, Array]
"""Parameters by dotted name, such as 'down_blocks.0.resnets.1.conv1.kernel'."""


class Record(TypedDict):
  """What a data source yields: one decoded image with every caption it may be shown with."""

  image: np.ndarray
  captions: list[str]
  id: str
