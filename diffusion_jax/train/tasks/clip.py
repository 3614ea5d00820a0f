"""Train CLIP: images and captions that belong together get similar embeddings.

With SigLIP's loss (Zhai et al. 2023) instead, or, as LiT (Zhai et al. 2022), one tower beside a
pretrained one that stays as it is.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from diffusion_jax.config import TrainingConfig
from diffusion_jax.data.unreadable import captions_of
from diffusion_jax.errors import UserError
from diffusion_jax.formats.clip import HALF, PREPROCESSOR, pixel_statistics
from diffusion_jax.formats.networks import Part, read_part, resolve, save_params
from diffusion_jax.formats.tensors import write_json
from diffusion_jax.limits import FileDtype, Positive, Range, same_size
from diffusion_jax.models.network import Network
from diffusion_jax.models.text.clip import CLIP, CLIPConfig
from diffusion_jax.models.text.tokenizer import (
  Tokenize,
  load_tokenizer,
  save_tokenizer,
  train_tokenizer,
)
from diffusion_jax.registry import EVALUATORS, load
from diffusion_jax.train.contrastive import CHUNK, contrastive_loss, sigmoid_loss
from diffusion_jax.train.meter import mean_metric
from diffusion_jax.train.tasks.task import Carry, Env, Frozen, Task
from diffusion_jax.types import Params, Scores, Source

if TYPE_CHECKING:
  from transformers import PreTrainedTokenizerBase

TOKENIZER = 'tokenizer'
"""Folder of a workdir with the vocabulary that was trained on its captions."""
MAX_LOGIT_SCALE = math.log(100.0)


TOWERS = {
  'image': ('vision_model.', 'visual_projection.'), 'text': ('text_model.', 'text_projection.')
}
"""How the names of each tower's parameters begin; its projection is part of it."""
LOCKED = 'locked'
"""The role of a locked tower's parameters."""
BIAS = 'logit_bias'
"""SigLIP's parameter beside those of CLIP."""
Number = Annotated[float, Range(-1e6, 1e6)]


@dataclasses.dataclass(frozen=True)
class SigmoidConfig:
  """Where the logits of SigLIP begin: ln(1 / temperature), and b (Zhai et al. 2023, sec. 3.2)."""

  logit_scale_init_value: Number = math.log(10.0)
  logit_bias_init_value: Number = -10.0


@dataclasses.dataclass(frozen=True)
class CLIPTaskConfig:
  """loss: over all pairs of the batch, 'softmax' as CLIP or 'sigmoid' as SigLIP, whose logits begin
  as `sigmoid` says. chunk: texts that the images of a device are compared with at once.
  label_smoothing: of softmax, fraction of each target spread over the whole batch; 0 is CLIP's own
  loss. locked: the tower that is not trained, with its projection, that of the CLIP in the
  directory `locked_from`, whose config of that tower takes the place of `clip`'s.

  The vocabulary, of at most text_config.vocab_size, is trained on the captions, unless the tower of
  texts is locked; max_position_embeddings is the length in tokens.
  """

  clip: CLIPConfig = CLIPConfig()
  label_smoothing: Annotated[float, Range(0, 1, below=True)] = 0.0
  export_dtype: FileDtype = 'float16'
  loss: Literal['softmax', 'sigmoid'] = 'softmax'
  sigmoid: SigmoidConfig = SigmoidConfig()
  chunk: Positive = CHUNK
  locked: Literal['none', 'image', 'text'] = 'none'
  locked_from: str = ''

  def __post_init__(self):
    if self.loss == 'sigmoid' and self.label_smoothing:
      raise UserError(
        f'settings.label_smoothing is {self.label_smoothing:g}, which the sigmoid loss has not; '
        'set it to 0.'
      )
    if (self.locked == 'none') != (not self.locked_from):
      raise UserError(
        f'settings.locked is {self.locked!r} and settings.locked_from {self.locked_from!r}; give '
        'both, a tower (image or text) and the directory of its CLIP, or neither (none and \'\').'
      )


def with_locked(settings: CLIPTaskConfig) -> tuple[CLIPTaskConfig, Part | None]:
  """Return the settings with the locked tower's config in place of their own, and where it lies.

  UserError where there is none.
  """
  if settings.locked == 'none':
    return settings, None
  part = read_part(settings.locked_from).expect(('clip',))
  tower = 'vision_config' if settings.locked == 'image' else 'text_config'
  clip = dataclasses.replace(
    settings.clip, projection_dim=part.config.projection_dim,
    **{tower: getattr(part.config, tower)},
  )
  return dataclasses.replace(settings, clip=clip), part


class CLIPTask(Task):
  """Both towers and the temperature, from scratch, or one tower beside a locked one."""

  Config = CLIPTaskConfig
  name, title = 'clip', 'CLIP, text and image encoder'
  batch_fields = ('image', 'tokens')

  def __init__(
    self, config: CLIPTaskConfig, tokenizer: PreTrainedTokenizerBase, test: Source,
    locked: Params | None = None, pixels: Mapping[str, Sequence[float]] = MappingProxyType({}),
    **compute: Any,
  ):
    """locked: host arrays of the locked tower. pixels: mean and std, per channel in [0, 1], with
    which a locked tower sees images. `compute`: as of `models.network.Compute`."""
    self.config, self.tokenizer, self.test, self.pixels = config, tokenizer, test, pixels
    self.clip = self.model = Network.of(CLIP, config.clip, **compute)
    self.frozen: Frozen = {LOCKED: locked} if locked else {}
    self.begins_with = config.locked_from

  @classmethod
  def check_data(cls, config: TrainingConfig) -> None:
    settings, _ = with_locked(config.settings)
    size = settings.clip.vision_config.image_size
    same_size('settings.clip.vision_config.image_size', size, config.data.size)
    super().check_data(config)

  @classmethod
  def build(cls, config: TrainingConfig, env: Env) -> CLIPTask:
    """Read the locked tower, if there is one, and its tokenizer or the one that this run trained
    when it began; else train it."""
    settings, part = with_locked(config.settings)
    text, folder = settings.clip.text_config, env.workdir / TOKENIZER
    locked, pixels = None, {}
    if part is not None:
      starts = TOWERS[settings.locked]
      locked = {name: value for name, value in part.load().items() if name.startswith(starts)}
    if settings.locked == 'image':
      pixels = pixel_statistics(*part.json(PREPROCESSOR))
    if settings.locked == 'text':
      tokenizer = load_tokenizer(resolve(settings.locked_from))
      return cls(settings, tokenizer, env.test, locked, **cls.compute(config))
    if (folder / 'tokenizer.json').exists():
      tokenizer = load_tokenizer(folder)
    else:
      captions = itertools.chain.from_iterable(captions_of(env.train))
      tokenizer = train_tokenizer(captions, text.vocab_size, text.max_position_embeddings)
    text = dataclasses.replace(
      text, vocab_size=len(tokenizer), bos_token_id=tokenizer.bos_token_id,
      eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.eos_token_id,
    )
    clip = dataclasses.replace(settings.clip, text_config=text)
    settings = dataclasses.replace(settings, clip=clip)
    return cls(settings, tokenizer, env.test, locked, pixels, **cls.compute(config))

  def context(self) -> dict[str, Any]:
    length = self.clip.config.text_config.max_position_embeddings
    return {'tokenizer': Tokenize(self.tokenizer, length)}

  def keep(self, workdir: Path) -> None:
    if not (workdir / TOKENIZER / 'tokenizer.json').exists():
      save_tokenizer(self.tokenizer, workdir / TOKENIZER)

  def initialize(self, key: jax.Array) -> Params:
    params = self.clip.initialize(key)
    locked = TOWERS.get(self.config.locked, ())
    params = {name: value for name, value in params.items() if not name.startswith(tuple(locked))}
    if self.config.loss == 'sigmoid':
      begin, like = self.config.sigmoid, params['logit_scale']
      params['logit_scale'] = jnp.full_like(like, begin.logit_scale_init_value)
      params[BIAS] = jnp.full_like(like, begin.logit_bias_init_value)
    return params

  def constrain(self, params: Params, carry: Carry) -> Params:
    """Clamps CLIP's temperature so that logits are scaled by 1 to 100 (section 2.5)."""
    if self.config.loss == 'sigmoid':
      return params
    return params | {'logit_scale': jnp.clip(params['logit_scale'], 0.0, MAX_LOGIT_SCALE)}

  def weights(self, params: Params, frozen: Frozen) -> Params:
    """Return all of CLIP's parameters."""
    whole = {**frozen.get(LOCKED, {}), **params}
    return {name: value for name, value in whole.items() if name != BIAS}

  def loss(self, params, frozen, carry, batch, key, step) -> tuple[jax.Array, tuple]:
    model, pixels = self.clip.bind(self.weights(params, frozen)), batch['image']
    if self.pixels:
      mean, std = (jnp.asarray(self.pixels.get(name, HALF)) for name in ('mean', 'std'))
      pixels = ((pixels + 1) / 2 - mean) / std
    images = model.encode_image(pixels).astype(jnp.float32)
    texts = model.encode_text(batch['tokens'])[1].astype(jnp.float32)
    scale, metrics = params['logit_scale'], {}
    if self.config.loss == 'sigmoid':
      loss, accuracy = sigmoid_loss(images, texts, scale, params[BIAS], self.config.chunk)
      metrics = {BIAS: mean_metric(params[BIAS])}
    else:
      smoothing = self.config.label_smoothing
      loss, accuracy = contrastive_loss(images, texts, scale, smoothing, self.config.chunk)
    metrics |= {
      'loss': mean_metric(loss),
      f'retrieval_r1_of_{len(images)}': mean_metric(accuracy),
      'logit_scale': mean_metric(jnp.exp(scale)),
    }
    return loss.mean(), (metrics, ())

  def evaluators(self, mesh: Mesh) -> list[Any]:
    return [
      load(EVALUATORS, name)(self.tokenizer, self.test, mesh, pixels=self.pixels)
      for name in ('retrieval_preview', 'retrieval')
    ]

  def export(self, directory: Path, params: Params, scores: Scores) -> None:
    """CLIP in transformers' layout, with its tokenizer; SigLIP's bias, which ranks nothing, goes.
    """
    params = self.weights(params, self.frozen)
    save_params(directory, self.config.clip, params, dtype=self.config.export_dtype)
    save_tokenizer(self.tokenizer, directory)
    if self.pixels:
      write_json(
        directory / PREPROCESSOR, {f'image_{name}': list(v) for name, v in self.pixels.items()}
      )
