"""DALL-E 2 (Ramesh et al. 2022): a prior draws the embedding of a picture, a decoder the picture.

The decoder is a diffusion model, the prior another, or one of tokens (`token_prior`). A directory
has them as folders of their own, so that the decoder alone varies a given picture (section 3.1).
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np

from diffusion_jax.diffusion.inversion import arc
from diffusion_jax.diffusion.samplers import initial_noise
from diffusion_jax.errors import require
from diffusion_jax.files import INDEX, inside, reading
from diffusion_jax.formats.networks import Part, resolve
from diffusion_jax.formats.pipeline import own_path
from diffusion_jax.formats.tensors import read_json, write_json
from diffusion_jax.models.network import prefixed, under
from diffusion_jax.pipelines.directory import read_model
from diffusion_jax.pipelines.generator import CLASS, OfOneSize, read_generator
from diffusion_jax.pipelines.image_conditioners import ImageEncoder
from diffusion_jax.pipelines.inputs import Inputs
from diffusion_jax.pipelines.model import Diffusion
from diffusion_jax.pipelines.sampling import SampleConfig
from diffusion_jax.pipelines.token_prior import TokenPrior

KIND = 'UnCLIP'
PRIOR, DECODER = 'prior', 'decoder'
"""The folders, and what stands before the roles of their networks."""


@dataclasses.dataclass(frozen=True, eq=False)
class UnCLIP(OfOneSize):
  """Prompts -> embeddings, as the settings of sampling say -> images, as `decoding` says."""

  prior: Diffusion | TokenPrior
  decoder: Diffusion
  decoding: SampleConfig

  interpolates: ClassVar = 'embeddings'

  def __post_init__(self):
    width = self.prior.embedding_dim
    require(
      width is not None, 'the prior draws no embeddings; give one whose space is embeddings.'
    )
    require(
      self.encoder is not None and self.encoder.width == width,
      f'the prior draws embeddings of {width} numbers, which the decoder does not read; '
      'give one that was trained on those of the same CLIP.',
    )

  @property
  def encoder(self) -> ImageEncoder | None:
    """The decoder's conditioner of pictures, as whose embeddings it reads those that are drawn."""
    found = (c for c in self.decoder.conditioners.values() if isinstance(c, ImageEncoder))
    return next(found, None)

  @property
  def networks(self):
    return {**prefixed(PRIOR, self.prior.networks), **prefixed(DECODER, self.decoder.networks)}

  @property
  def drawn_by(self) -> tuple[str, ...]:
    parts = {PRIOR: self.prior, DECODER: self.decoder}
    return tuple(f'{name}.{role}' for name, part in parts.items() for role in part.drawn_by)

  @property
  def text(self):
    return self.prior.text

  @property
  def trained_size(self):
    return self.decoder.trained_size

  def check_config(self, config):
    self.prior.check_config(config)

  def check_sampling(self, config, negative=''):
    self.prior.check_sampling(config, negative)

  def check_prompts(self, prompts, syntax='plain'):
    self.prior.check_prompts(prompts, syntax)

  def rows(self, prompts, *arguments, **how):
    return self.prior.rows(prompts, *arguments, **how)

  def prompt(self, record):
    return self.prior.prompt(record)

  def embeddings(
    self, weights: Mapping[str, Any], prompts: Sequence[str], config: Any, **how
  ) -> np.ndarray:
    """Draw embeddings of pictures, float32 [n p]; `how` as of `Diffusion.sample`."""
    return np.concatenate(list(self.prior.sample(under(PRIOR, weights), prompts, config, **how)))

  def embed(self, weights: Mapping[str, Any], pictures: np.ndarray) -> np.ndarray:
    """Pictures uint8 [n h w 3] -> CLIP's embeddings of them, float32 [n p]."""
    rows = self.encoder.examples(pictures)
    return np.asarray(self.encoder.encode(under(DECODER, weights), rows)['text'])[:, 0]

  def strip(self, weights: Mapping[str, Any], ends: np.ndarray, frames: int, *, seed: int, **how):
    """Yield images on the arc between two embeddings [2 p], of one noise (section 3.2)."""
    shape = self.decoder.space.shape(*self.trained_size)
    noise = np.repeat(np.asarray(initial_noise(seed, 0, 1, shape)[0]), frames, axis=0)
    yield from self.decode(
      weights, np.asarray(arc(ends, frames)), noise=noise, seed=seed, **how
    )

  def decode(self, weights: Mapping[str, Any], embeddings: np.ndarray, **how):
    """Yield images of embeddings [n p], float32 [b h w 3]; `how` as of `Diffusion.sample`."""
    prompts, inputs = [''] * len(embeddings), Inputs(embedding=embeddings)
    yield from self.decoder.sample(
      under(DECODER, weights), prompts, self.decoding, inputs=inputs, **how
    )

  def sample(
    self, weights, prompts, config, *, negative='', inputs=None, height=None, width=None, **how
  ):
    """Yield images, float32 [b h w 3] in [-1, 1], batch after batch."""
    self.drawn_size(height, width)
    found = self.embeddings(weights, prompts, config, negative=negative, **how)
    yield from self.decode(weights, found, **how)


def read(path: str, dtype=jnp.float32) -> tuple[UnCLIP, dict[str, Part], Any]:
  """As `pipelines.generator.read_generator`, of a directory with a prior and a decoder."""
  directory = resolve(path)
  where = directory / INDEX
  index = read_json(inside(where, directory))
  with reading(where, 'describes no model', 'export it again'):
    folders = {name: own_path(str(index[name]), directory) for name in (PRIOR, DECODER)}
  prior, parts, sample = read_generator(folders[PRIOR], dtype)
  decoder, others, decoding = read_model(folders[DECODER], dtype)
  model = UnCLIP(prior, decoder, decoding)
  return model, {**prefixed(PRIOR, parts), **prefixed(DECODER, others)}, sample


def save_index(directory: Path, decoder: str) -> None:
  """Write the index of a directory whose prior is there; decoder: its folder, or 'asset:NAME'."""
  write_json(directory / INDEX, {CLASS: KIND, PRIOR: PRIOR, DECODER: decoder})
