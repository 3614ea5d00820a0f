"""Train CLIP: images and captions that belong together get similar embeddings."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from diffusion_jax.config import TrainingConfig
from diffusion_jax.data.unreadable import readable
from diffusion_jax.formats.networks import save_params
from diffusion_jax.limits import FileDtype, Range, same_size
from diffusion_jax.models.network import Network
from diffusion_jax.models.text.clip import CLIP, CLIPConfig, unit
from diffusion_jax.models.text.tokenizer import (
  Tokenize,
  load_tokenizer,
  save_tokenizer,
  train_tokenizer,
)
from diffusion_jax.registry import EVALUATORS, load
from diffusion_jax.train.meter import mean_metric
from diffusion_jax.train.tasks.task import Carry, Env, Frozen, Task
from diffusion_jax.types import Params, Scores, Source

if TYPE_CHECKING:
  from transformers import PreTrainedTokenizerBase

TOKENIZER = 'tokenizer'
"""Folder of a workdir with the vocabulary that was trained on its captions."""
MAX_LOGIT_SCALE = math.log(100.0)


@dataclasses.dataclass(frozen=True)
class CLIPTaskConfig:
  """label_smoothing: fraction of each target spread over the whole batch; 0 is CLIP's own loss.

  The vocabulary, of at most text_config.vocab_size, is trained on the captions;
  max_position_embeddings is the length in tokens.
  """

  clip: CLIPConfig = CLIPConfig()
  label_smoothing: Annotated[float, Range(0, 1, below=True)] = 0.0
  export_dtype: FileDtype = 'float16'


def contrastive_loss(
  images: jax.Array, texts: jax.Array, logit_scale: jax.Array, label_smoothing: float = 0.0
) -> tuple[jax.Array, jax.Array]:
  """(loss [b], fraction of images nearest to their own caption []) of the global batch.

  Symmetric cross-entropy over all pairs (Radford et al. 2021, figure 3), logits in float32. images,
  texts: [b p] embeddings of any length, in pairs. logit_scale: ln(1 / temperature).
  """
  logits = jnp.exp(logit_scale) * unit(images) @ unit(texts).T
  b = logits.shape[0]
  targets = (1 - label_smoothing) * jnp.eye(b) + label_smoothing / b
  cross_entropy = lambda x: -(targets * jax.nn.log_softmax(x)).sum(axis=-1)
  loss = (cross_entropy(logits) + cross_entropy(logits.T)) / 2
  return loss, (logits.argmax(axis=-1) == jnp.arange(b)).mean()


class CLIPTask(Task):
  """Both towers and the temperature, trained from scratch."""

  Config = CLIPTaskConfig
  name, title = 'clip', 'CLIP, text and image encoder'
  batch_fields = ('image', 'tokens')

  def __init__(
    self, config: CLIPTaskConfig, tokenizer: PreTrainedTokenizerBase, test: Source, **compute: Any
  ):
    """`compute`: as of `models.network.Compute`."""
    self.config, self.tokenizer, self.test = config, tokenizer, test
    self.clip = self.model = Network.of(CLIP, config.clip, **compute)
    self.frozen: Frozen = {}

  @classmethod
  def check_data(cls, config: TrainingConfig) -> None:
    size = config.settings.clip.vision_config.image_size
    same_size('settings.clip.vision_config.image_size', size, config.data.size)
    super().check_data(config)

  @classmethod
  def build(cls, config: TrainingConfig, env: Env) -> CLIPTask:
    """Train the tokenizer, or read the one that this run trained when it began."""
    settings = config.settings
    text = settings.clip.text_config
    folder = env.workdir / TOKENIZER
    if (folder / 'tokenizer.json').exists():
      tokenizer = load_tokenizer(folder)
    else:
      captions = (caption for record in readable(env.train) for caption in record['captions'])
      tokenizer = train_tokenizer(captions, text.vocab_size, text.max_position_embeddings)
    text = dataclasses.replace(
      text, vocab_size=len(tokenizer), bos_token_id=tokenizer.bos_token_id,
      eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.eos_token_id,
    )
    clip = dataclasses.replace(settings.clip, text_config=text)
    settings = dataclasses.replace(settings, clip=clip)
    return cls(settings, tokenizer, env.test, **cls.compute(config))

  def context(self) -> dict[str, Any]:
    length = self.clip.config.text_config.max_position_embeddings
    return {'tokenizer': Tokenize(self.tokenizer, length)}

  def keep(self, workdir: Path) -> None:
    if not (workdir / TOKENIZER / 'tokenizer.json').exists():
      save_tokenizer(self.tokenizer, workdir / TOKENIZER)

  def initialize(self, key: jax.Array) -> Params:
    return self.clip.initialize(key)

  def constrain(self, params: Params, carry: Carry) -> Params:
    """Clamps the temperature so that logits are scaled by 1 to 100 (section 2.5)."""
    return params | {'logit_scale': jnp.clip(params['logit_scale'], 0.0, MAX_LOGIT_SCALE)}

  def loss(self, params, frozen, carry, batch, key, step) -> tuple[jax.Array, tuple]:
    model = self.clip.bind(params)
    images = model.encode_image(batch['image']).astype(jnp.float32)
    texts = model.encode_text(batch['tokens'])[1].astype(jnp.float32)
    scale = params['logit_scale']
    loss, accuracy = contrastive_loss(images, texts, scale, self.config.label_smoothing)
    metrics = {
      'loss': mean_metric(loss),
      f'retrieval_r1_of_{len(images)}': mean_metric(accuracy),
      'logit_scale': mean_metric(jnp.exp(scale)),
    }
    return loss.mean(), (metrics, ())

  def evaluators(self, mesh: Mesh) -> list[Any]:
    return [
      load(EVALUATORS, name)(self.tokenizer, self.test, mesh)
      for name in ('retrieval_preview', 'retrieval')
    ]

  def export(self, directory: Path, params: Params, scores: Scores) -> None:
    """CLIP in transformers' layout, with its tokenizer."""
    save_params(directory, self.config.clip, params, dtype=self.config.export_dtype)
    save_tokenizer(self.tokenizer, directory)
