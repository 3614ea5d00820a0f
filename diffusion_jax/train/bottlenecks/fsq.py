"""Rounding to a fixed grid (Mentzer et al. 2023), which needs no loss of its own."""

import dataclasses
from typing import Annotated

import jax.numpy as jnp

from diffusion_jax.limits import Length
from diffusion_jax.models.fsq import FSQConfig, FSQModel, Level, to_indices
from diffusion_jax.train.bottlenecks.bottleneck import Bottleneck, Passed, code_metrics, config_of


@dataclasses.dataclass(frozen=True)
class FSQ(Bottleneck):
  """levels: of each channel of a code; see `models.fsq.FSQConfig`."""

  levels: Annotated[tuple[Level, ...], Length(1, 16)] = (8, 5, 5, 5)
  title, network = 'FSQ autoencoder', FSQModel

  def config(self, shape):
    return config_of(FSQConfig, shape, levels=self.levels)

  def __call__(self, model, images, carry, key, step):
    codes = model.quantize(model.encode(images))
    output = model.decode_codes(codes).astype(jnp.float32)
    metrics = code_metrics(to_indices(codes, self.levels), model.config.vocabulary)
    return Passed(output, jnp.zeros(len(images)), dict(metrics))
