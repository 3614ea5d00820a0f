"""Train DALL-E's transformer (Ramesh et al. 2021, section 2.2) on captions and images' tokens."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh

from diffusion_jax.config import TrainingConfig
from diffusion_jax.errors import UserError
from diffusion_jax.files import check_folder
from diffusion_jax.formats.autoencoder import QUANTIZED
from diffusion_jax.formats.networks import read_part, resolve
from diffusion_jax.limits import FileDtype, Fraction, Length
from diffusion_jax.models.network import Network
from diffusion_jax.models.text.tokenizer import load_tokenizer
from diffusion_jax.models.token_transformer import TokenTransformer, TokenTransformerConfig
from diffusion_jax.pipelines.image_tokens import (
  AUTOENCODER,
  CLIP,
  TRANSFORMER,
  ImageTokens,
  TokenSampleConfig,
  make,
  save,
)
from diffusion_jax.registry import EVALUATORS, load
from diffusion_jax.train.meter import mean_metric
from diffusion_jax.train.tasks.diffusion_settings import EvaluationConfig
from diffusion_jax.train.tasks.task import Env, Frozen, Task
from diffusion_jax.types import Params, Scores, Source, Tokens, Weights


@dataclasses.dataclass(frozen=True)
class TokensTaskConfig:
  """clip: of the captions' vocabulary, and what chooses among candidates. transformer: its
  vocabularies, lengths and size follow from the other parts.

  text_weight: of the captions' cross-entropy, the images' has the rest; both are means over tokens.
  caption_dropout: fraction of the captions that are left out, so that guidance can be used.
  """

  clip: str = 'asset:clip-openmoji-64'
  transformer: TokenTransformerConfig = TokenTransformerConfig()
  text_weight: Fraction = 0.125
  caption_dropout: Fraction = 0.1
  sample: TokenSampleConfig = TokenSampleConfig()
  evaluation: EvaluationConfig = EvaluationConfig()
  preview_captions: Annotated[tuple[str, ...], Length(1, 1000)] = ('red apple', 'grinning cat')
  export_dtype: FileDtype = 'float16'


@dataclasses.dataclass(frozen=True)
class ImageTokensTaskConfig(TokensTaskConfig):
  """autoencoder: the directory of one whose latents are codes, such as the model of a run with
  settings.bottleneck gumbel, vq or fsq."""

  autoencoder: str = dataclasses.field(kw_only=True)


def fitted(config: ImageTokensTaskConfig, size: tuple[int, int]) -> TokenTransformerConfig:
  """Return the transformer's config for its tokens of images of that height and width.

  UserError: the autoencoder or CLIP cannot be read, or cannot divide such images.
  """
  for path in (config.autoencoder, config.clip):
    check_folder(resolve(path))  # It is copied when training ends.
  codes = read_part(config.autoencoder).expect(QUANTIZED).config
  if any(edge % codes.factor for edge in size):
    raise UserError(
      f'data.size is {size[0]}x{size[1]}, but the autoencoder of settings.autoencoder takes '
      f'multiples of {codes.factor}; choose such a size.'
    )
  return of_clip(
    config, image_vocab_size=codes.vocabulary, rows=size[0] // codes.factor,
    columns=size[1] // codes.factor,
  )


def of_clip(config: TokensTaskConfig, **more: int) -> TokenTransformerConfig:
  """Return the transformer's config for CLIP's captions, with `more` of its fields."""
  text = read_part(config.clip).expect((CLIP,)).config.text_config
  return dataclasses.replace(
    config.transformer, vocab_size=len(load_tokenizer(resolve(config.clip))),
    text_length=text.max_position_embeddings, **more,
  )


def token_loss(logits: jax.Array, targets: Tokens, real: jax.Array | None = None) -> jax.Array:
  """Mean cross-entropy in nats of logits [b n v] over the targets [b n], those of `real`: [b]."""
  loss = -jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1)[..., 0]
  real = jnp.ones_like(loss) if real is None else real
  return (loss * real).sum(-1) / jnp.maximum(real.sum(-1), 1)


class ImageTokensTask(Task):
  """Parameters are the transformer's."""

  Config = ImageTokensTaskConfig
  name, title = 'image_tokens', 'Text-to-image model of tokens'
  captioned = True
  batch_fields = ('image', 'tokens')

  def __init__(
    self, config: TokensTaskConfig, model: ImageTokens, frozen: Frozen, train: Source,
    test: Source,
  ):
    self.config, self.model, self.frozen = config, model, frozen
    self.train, self.test = train, test
    self.null, self.end = model.tokenize(''), model.tokenize.frame[1][0]

  @classmethod
  def build(cls, config: TrainingConfig, env: Env) -> ImageTokensTask:
    settings, compute = config.settings, cls.compute(config)
    network = Network.of(TokenTransformer, fitted(settings, config.data.shape), **compute)
    parts = {AUTOENCODER: read_part(settings.autoencoder), CLIP: read_part(settings.clip)}
    model = make({TRANSFORMER: network, **parts}, compute['dtype'])
    frozen = {role: part.load(mesh=env.mesh) for role, part in parts.items()}
    return cls(settings, model, frozen, env.train, env.test)

  def context(self) -> dict[str, Any]:
    return {'tokenizer': self.model.tokenize}

  def initialize(self, key: jax.Array) -> Params:
    return self.model.transformer.initialize(key)

  def weights(self, params: Params, frozen: Frozen) -> Weights:
    return {**frozen, TRANSFORMER: params}

  def loss(self, params, frozen, carry, batch, key, step) -> tuple[jax.Array, tuple]:
    image = lax.stop_gradient(self.model.encode(frozen, batch['image']))
    dropped = jax.random.bernoulli(key, self.config.caption_dropout, (len(image), 1))
    text = jnp.where(dropped, self.null, batch['tokens'])
    logits = self.model.transformer.bind(params)(text, image)
    end = text == self.end  # What follows the first is padding.
    real = (jnp.cumsum(end, axis=1) - end == 0).astype(jnp.float32)[:, 1:]
    of_text, of_image = token_loss(logits[0], text[:, 1:], real), token_loss(logits[1], image)
    total = self.config.text_weight * of_text + (1 - self.config.text_weight) * of_image
    metrics = {'loss': total, 'loss_text': of_text, 'loss_image': of_image}
    return total.mean(), ({name: mean_metric(value) for name, value in metrics.items()}, ())

  def evaluators(self, mesh: Mesh) -> list[Any]:
    config = self.config
    preview = load(EVALUATORS, 'caption_preview')(config.preview_captions, config.sample, mesh)
    features = config.evaluation.features or (f'clip:{config.clip}',)
    return [preview, load(EVALUATORS, 'generated_images')(
      features, config.evaluation.metrics, config.sample, self.train, self.test, mesh
    )]

  def export(self, directory: Path, params: Params, scores: Scores) -> None:
    """Write the whole model as a directory that `sample --model` reads."""
    config = self.config
    save(
      directory, self.model.transformer.config, params, autoencoder=config.autoencoder,
      clip=config.clip, sample=config.sample, dtype=config.export_dtype,
    )
