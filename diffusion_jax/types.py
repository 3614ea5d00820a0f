"""Array types, dimension letters and value ranges of the whole package.

Letters: b batch, h height, w width, c channels, l text length, d text width, p embedding width.
Images are NHWC, on disk and in sources uint8 in [0, 255], in networks floats in [-1, 1]. Latents
are the denoiser's: (autoencoder latent - shift_factor) * scaling_factor, of about unit variance.
Timesteps are integers in [0, T).
"""

from typing import Any, NamedTuple, NotRequired, Protocol, TypedDict

import numpy as np
from jaxtyping import Array, Float, Int

Images = Float[Array, 'b h w c']
Latents = Float[Array, 'b h w c']
Text = Float[Array, 'b l d']
Tokens = Int[Array, 'b l']
Timesteps = Float[Array, 'b'] | Int[Array, 'b']
PerExample = Float[Array, 'b']
Scores = dict[str, Any]
"""Metric values by column, such as {'generated': {...}, 'real': {...}}; beside them 'settings', and
sentences in 'measured', on what they were measured, and 'warnings'. The first is a column."""
Residuals = tuple[list[Float[Array, 'b h w c']], Float[Array, 'b h w c']]
"""A ControlNet's: what to add to the U-Net's skips, and to its mid block's result."""
Params = dict[str, Array]
"""Parameters by dotted name, such as 'down_blocks.0.resnets.1.conv1.kernel'."""

Weights = dict[str, Params]
"""Parameters of every network of a model, by role: unet, autoencoder, text_encoder, ..."""


class Condition(NamedTuple):
  """A denoiser's conditions besides x and t; None for unused ones.

  text: [b l d]. mask: [b l], 1 where the text is no padding; None where all of it is read.
  pooled: [b p], the pooled text of SDXL. sizes: [b 6], SDXL's original height and
  width, top and left of the crop, target height and width, in pixels; of its refiner [b 5], with an
  aesthetic score for the target's. labels: [b], a class or the
  level of the noise on `image`. image: [b h w c], channels beside x: masks, depth, other latents.
  control: [b H W 3] in [0, 1], the picture a ControlNet sees, with its strength [b].
  guidance: [b], the scale that a distilled network imitates. more: fields of other names, [b ...].
  """

  text: Text | None = None
  pooled: Array | None = None
  sizes: Array | None = None
  labels: Array | None = None
  image: Array | None = None
  control: Array | None = None
  strength: Array | None = None
  guidance: Array | None = None
  mask: Array | None = None
  more: dict[str, Array] | None = None


class TextShape(NamedTuple):
  """What a text encoder gives: texts [b l width] and, unless it pools nothing, pooled ones
  [b pooled]; length: the most tokens, None where it reads any number."""

  width: int
  pooled: int | None = None
  length: int | None = None


class Record(TypedDict):
  """A record of a data source: one decoded image with all its captions."""

  image: np.ndarray
  captions: list[str]
  id: str
  label: NotRequired[str]
  """The class that the image is of, where the data set has classes."""


class Source(Protocol):
  """Random access to records; see `data.sources` for their fields."""

  def __len__(self) -> int: ...

  def __getitem__(self, index: int) -> dict[str, Any]: ...
