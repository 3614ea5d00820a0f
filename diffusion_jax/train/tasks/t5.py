"""Train T5 on text alone: it fills in spans that were left out (Raffel et al. 2020, sec. 3.1.4)."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from diffusion_jax.config import DataConfig, TrainingConfig
from diffusion_jax.data.sources import open_data
from diffusion_jax.data.sources.arrays import ArraySource
from diffusion_jax.data.span_corruption import CorruptSpans, packed, spans_of
from diffusion_jax.data.unreadable import captions_of
from diffusion_jax.errors import UserError
from diffusion_jax.formats.networks import save_params
from diffusion_jax.limits import FileDtype, Range
from diffusion_jax.models.network import Network
from diffusion_jax.models.text.t5 import T5Config
from diffusion_jax.models.text.t5_decoder import T5ForConditionalGeneration, token_losses
from diffusion_jax.models.text.tokenizer import (
  SENTINELS,
  load_tokenizer,
  save_tokenizer,
  train_unigram,
)
from diffusion_jax.registry import EVALUATORS, load
from diffusion_jax.train.meter import Average
from diffusion_jax.train.tasks.task import Env, Frozen, Task
from diffusion_jax.types import Params, Scores, Source

if TYPE_CHECKING:
  from transformers import PreTrainedTokenizerBase

TOKENIZER = 'tokenizer'
"""Folder of a workdir with the vocabulary that was trained on its texts."""
TRAINED_ON = 2**15
"""Texts at most that the vocabulary is made of, spread over all."""


@dataclasses.dataclass(frozen=True)
class T5TaskConfig:
  """The vocabulary is trained on the texts: t5.vocab_size is its largest size.

  captions: a data set whose captions are trained on beside the texts, one example each; '' for
  none. length: tokens of an example before spans are left out, into which whole texts are packed.
  noise_density: fraction of the tokens that is left out, in spans of mean_span on average.
  """

  t5: T5Config = T5Config(feed_forward_proj='gated-gelu')
  captions: str = ''
  length: Annotated[int, Range(2, 2**14)] = 128
  noise_density: Annotated[float, Range(0, 1, above=True, below=True)] = 0.15
  mean_span: Annotated[float, Range(1)] = 3.0
  export_dtype: FileDtype = 'float16'


class T5Task(Task):
  """Encoder and decoder from scratch; the encoder is exported."""

  Config = T5TaskConfig
  name, title = 't5', 'T5, text encoder'
  pictures = False
  computing = ('remat',)
  batch_fields = ('inputs', 'mask', 'targets')

  def __init__(
    self, config: T5TaskConfig, tokenizer: PreTrainedTokenizerBase, test: Source,
    dtype=jnp.float32, remat: str = 'none',
  ):
    self.config, self.tokenizer, self.test = config, tokenizer, test
    self.network = self.model = Network.of(
      T5ForConditionalGeneration, config.t5, dtype=dtype, remat=remat
    )
    self.corrupt = CorruptSpans(
      config.length, tokenizer.convert_tokens_to_ids('<extra_id_0>'), config.t5.eos_token_id,
      config.t5.pad_token_id, config.noise_density, config.mean_span,
    )
    self.frozen: Frozen = {}

  @classmethod
  def check_data(cls, config: TrainingConfig) -> None:
    if config.data.transforms:
      raise UserError('data.transforms are of images; a T5 is trained on text: leave them empty.')
    if config.data.mixture:
      raise UserError('data.mixture has no effect on a T5, whose texts are packed; leave it out.')
    settings = config.settings
    most = spans_of(settings.length, settings.noise_density, settings.mean_span)[1] + 1
    if most > SENTINELS:
      raise UserError(
        f'settings.length {settings.length} leaves out up to {most} spans, but there are '
        f'{SENTINELS} sentinels; make it shorter, or mean_span longer.'
      )

  @classmethod
  def described(cls, size: int) -> tuple[str, str]:
    return 'texts', 'of any length'

  @classmethod
  def build(cls, config: TrainingConfig, env: Env) -> T5Task:
    """Train the vocabulary, or read the one that this run made when it began."""
    settings, folder = config.settings, env.workdir / TOKENIZER
    if (folder / 'tokenizer.json').exists():
      tokenizer = load_tokenizer(folder)
    else:
      places = np.linspace(0, len(env.train) - 1, min(TRAINED_ON, len(env.train))).astype(int)
      texts = (captions[0] for captions in captions_of(env.train, places) if captions)
      tokenizer = train_unigram(texts, settings.t5.vocab_size)
    t5 = dataclasses.replace(
      settings.t5, vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id,
      eos_token_id=tokenizer.eos_token_id,
    )
    settings = dataclasses.replace(settings, t5=t5)
    return cls(settings, tokenizer, env.test, getattr(jnp, config.dtype), config.remat)

  def more_data(self, config: TrainingConfig, env: Env) -> dict[str, Source]:
    """The data set whose captions are trained on, too."""
    if not self.config.captions or env.synthetic:
      return {}
    data = DataConfig(self.config.captions, config.data.size, config.data.data_dir)
    return {'captions': open_data(data)[0]}

  def examples(self, config: TrainingConfig, env: Env) -> tuple[Source, list[Callable]]:
    """Texts packed to `length`, and captions each by itself."""
    texts = itertools.chain.from_iterable(captions_of(env.train))
    found = packed(self.tokens(texts), self.config.length)
    if 'captions' in env.more:
      captions = itertools.chain.from_iterable(captions_of(env.more['captions']))
      found += [tokens[: self.config.length] for tokens in self.tokens(captions)]
    return ArraySource({'tokens': [tokens for tokens in found if len(tokens) > 1]}), [self.corrupt]

  def tokens(self, texts: Iterable[str]) -> list[np.ndarray]:
    """Texts -> int32 [n] each, without an end token."""
    ids = self.tokenizer(list(texts), add_special_tokens=False, verbose=False)['input_ids']
    return [np.asarray(each, np.int32) for each in ids]

  def keep(self, workdir: Path) -> None:
    if not (workdir / TOKENIZER / 'tokenizer.json').exists():
      save_tokenizer(self.tokenizer, workdir / TOKENIZER)

  def initialize(self, key: jax.Array) -> Params:
    return self.network.initialize(key)

  def loss(self, params, frozen, carry, batch, key, step) -> tuple[jax.Array, tuple]:
    fields = (batch[name] for name in self.batch_fields)
    model = self.network.bind(params)
    loss, right, real = token_losses(model, *fields, self.config.t5.pad_token_id)
    mean = lambda x: Average(x.sum(), real.sum())
    metrics = {'loss': mean(loss), 'accuracy': mean(right)}
    return loss.sum() / jnp.maximum(real.sum(), 1), (metrics, ())

  def evaluators(self, mesh: Mesh) -> list[Any]:
    return [load(EVALUATORS, 'span_corruption')(
      self.test, self.tokens, self.corrupt, self.config.t5.pad_token_id, mesh
    )]

  def export(self, directory: Path, params: Params, scores: Scores) -> None:
    """The encoder alone, in transformers' layout, with its tokenizer."""
    encoder = {name: x for name, x in params.items() if not name.startswith(('decoder', 'lm_'))}
    save_params(directory, self.config.t5, encoder, dtype=self.config.export_dtype)
    save_tokenizer(self.tokenizer, directory)
