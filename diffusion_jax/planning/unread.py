"""Stand-ins for pretrained pipelines that are not here: their configs alone, by the name."""

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from diffusion_jax.formats.autoencoder import AUTOENCODERS
from diffusion_jax.formats.networks import CONFIG, format_of
from diffusion_jax.formats.pipeline import INDEX, SCHEDULER, export_scheduler
from diffusion_jax.formats.tensors import write_json
from diffusion_jax.models.text.tokenizer import save_tokenizer, train_tokenizer, train_unigram
from diffusion_jax.pipelines.architectures import (
  ARCHITECTURES,
  DENOISERS,
  ENCODERS,
  architecture_model,
)
from diffusion_jax.pipelines.directory import scheduler_of
from diffusion_jax.pipelines.published import FIRST, published
from diffusion_jax.pipelines.sampling import SampleConfig
from diffusion_jax.pipelines.text_conditioners import tokenizer_role

WORDS = ('the quick brown fox jumps over the lazy dog',)
"""What tokenizers are made of: of their texts only the length is asked."""


@contextlib.contextmanager
def with_model(config: dict[str, Any]) -> Iterator[dict[str, Any]]:
  """Yield the config with the configs of settings.architecture in place of an empty settings.model,
  whose weights are not read by who asks for shapes; any other config as it is."""
  settings = config['settings']
  if settings.get('model') != '' or settings.get('architecture', '') not in ARCHITECTURES:
    yield config
    return
  with tempfile.TemporaryDirectory() as folder:
    write_configs(settings['architecture'], Path(folder), settings['train'] == 'embeddings')
    yield {**config, 'settings': {**settings, 'model': folder}}


def write_configs(name: str, folder: Path, whole: bool = False) -> None:
  """Write a pipeline without weights: configs, a scheduler, and tokenizers of few words.

  whole: tokenizers as large as the encoders' tables, behind which new words come.
  """
  a, model = ARCHITECTURES[name], architecture_model(name)
  row = published(a.kind, a.roles[: len(a.text)])
  size = '' if FIRST in row.encoders and len(row.encoders) == 1 else 'XL'
  kind = a.kind or f'StableDiffusion{size}Pipeline'
  configs = {row.denoiser: DENOISERS[a.denoiser], 'vae': AUTOENCODERS[a.autoencoder]}
  configs |= dict(zip(row.encoders, (ENCODERS[text] for text in a.text), strict=True))
  index: dict[str, Any] = {'_class_name': kind, 'scheduler': ['diffusers', 'Scheduler']}
  for role, config in configs.items():
    spec = format_of(config)
    (folder / role).mkdir()
    write_json(folder / role / CONFIG, spec.describe(config))
    index[role] = ['diffusers', type(config).__name__]
    if role not in row.encoders:
      continue
    length = model.text.readers[role].length
    t5 = row.encoders[role].kinds == ('t5',)
    words = train_unigram(WORDS, 400) if t5 else train_tokenizer(WORDS, 300, length)
    if whole:
      words.add_tokens([f'<{number}>' for number in range(len(words), config.vocab_size)])
    save_tokenizer(words, folder / tokenizer_role(role))
    index[tokenizer_role(role)] = ['transformers', 'Tokenizer']
  flow = {'_class_name': 'FlowMatchEulerDiscreteScheduler', 'shift': a.noise.shift}
  if a.prediction == 'flow_prediction':
    write_json(folder / 'scheduler' / SCHEDULER, flow)
  else:
    export_scheduler(folder, scheduler_of(model, SampleConfig()))
  write_json(folder / INDEX, index)
