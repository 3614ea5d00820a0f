"""Train DALL-E 2's autoregressive prior (Ramesh et al. 2022, section 2.2) for a decoder."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import jax
import numpy as np

from diffusion_jax.config import TrainingConfig
from diffusion_jax.data.unreadable import readable
from diffusion_jax.errors import UserError
from diffusion_jax.files import check_folder
from diffusion_jax.formats.networks import CONFIG, load_params, read_part, resolve, save_params
from diffusion_jax.models.config import Width
from diffusion_jax.models.embedding_tokens import EmbeddingTokens, EmbeddingTokensConfig
from diffusion_jax.models.embedding_tokens import fitted as fitted_tokens
from diffusion_jax.models.network import Network
from diffusion_jax.models.token_transformer import TokenTransformer
from diffusion_jax.parallel.mesh import in_batches
from diffusion_jax.pipelines.image_tokens import AUTOENCODER, CLIP, TRANSFORMER, make, save
from diffusion_jax.pipelines.token_prior import KIND, TokenPrior
from diffusion_jax.pixels import to_float
from diffusion_jax.train.tasks.image_tokens import ImageTokensTask, TokensTaskConfig, of_clip
from diffusion_jax.train.tasks.prior import PriorTask
from diffusion_jax.train.tasks.task import Env

TOKENS = 'embedding_tokens'
"""Folder of a workdir with what was measured on the embeddings of its pictures."""
MEASURED_ON = 4096
"""Pictures at most whose embeddings are measured."""
PIECE = 64
"""Pictures that are embedded at a time."""


@dataclasses.dataclass(frozen=True)
class TokenPriorTaskConfig(TokensTaskConfig):
  """decoder: the directory of a model of diffusion that is conditioned on image_embedding, of the
  same CLIP. components, intervals: as of `EmbeddingTokensConfig`."""

  components: Width = 64
  intervals: Width = 256
  decoder: str = dataclasses.field(kw_only=True)


class EmbeddingTokensTask(ImageTokensTask):
  """The transformer on captions and the tokens of embeddings, which are measured first."""

  @classmethod
  def build(cls, config: TrainingConfig, env: Env) -> EmbeddingTokensTask:
    settings, compute = config.settings, cls.compute(config)
    check_folder(resolve(settings.clip))
    clip = read_part(settings.clip).expect((CLIP,))
    tokens = EmbeddingTokensConfig(
      clip.config.projection_dim, settings.components, settings.intervals
    )
    shape = of_clip(
      settings, image_vocab_size=settings.intervals, rows=1, columns=settings.components
    )
    parts = {
      TRANSFORMER: Network.of(TokenTransformer, shape, **compute), CLIP: clip,
      AUTOENCODER: Network.of(EmbeddingTokens, tokens),
    }
    model, weights = make(parts, compute['dtype'], TokenPrior), {CLIP: clip.load(mesh=env.mesh)}
    folder = env.workdir / TOKENS
    if (folder / CONFIG).exists():
      weights[AUTOENCODER] = load_params('embedding_tokens', folder)[1]
    else:
      weights[AUTOENCODER] = fitted_tokens(_embeddings(model, weights, env), tokens)
    return cls(settings, model, weights, env.train, env.test)

  def keep(self, workdir: Path) -> None:
    if not (workdir / TOKENS / CONFIG).exists():
      self._save_tokens(workdir / TOKENS)

  def _save_tokens(self, folder: Path) -> None:
    save_params(folder, self.model.autoencoder.config, self.frozen[AUTOENCODER])

  def export(self, directory, params, scores):
    config = self.config
    self._save_tokens(directory / AUTOENCODER)
    save(
      directory, self.model.transformer.config, params, autoencoder='', clip=config.clip,
      sample=config.sample, dtype=config.export_dtype, kind=KIND,
    )


def _embeddings(model: TokenPrior, weights, env: Env) -> np.ndarray:
  """Return the embeddings of training pictures. UserError for fewer than two."""
  pictures = (record['image'] for record in itertools.islice(readable(env.train), MEASURED_ON))
  embed = jax.jit(lambda weights, x: model.embed(weights, to_float(x)))
  found: list[np.ndarray] = []
  while images := list(itertools.islice(pictures, PIECE)):  # So that few are in memory at a time.
    found += in_batches(embed, weights, np.stack(images), mesh=env.mesh, batch_size=PIECE)
  if sum(map(len, found)) < 2:
    raise UserError('the embeddings of fewer than two pictures cannot be measured; give more.')
  return np.concatenate(found)


class TokenPriorTask(PriorTask):
  """As `PriorTask`, with a prior that draws token by token."""

  Config = TokenPriorTaskConfig
  upgrade_settings = staticmethod(dict)
  name = 'token_prior'
  computing = EmbeddingTokensTask.computing
  inner = EmbeddingTokensTask
