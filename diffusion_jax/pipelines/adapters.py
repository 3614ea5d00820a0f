"""Add to a loaded model what others have trained: LoRA, ControlNet, textual inversion, guides."""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jax.sharding import Mesh

from diffusion_jax.errors import UserError
from diffusion_jax.formats.adapters import denoiser_role, lora_file, read_lora, to_params
from diffusion_jax.formats.clip import PREPROCESSOR, pixel_statistics
from diffusion_jax.formats.networks import load_params, read_network, read_part, resolve
from diffusion_jax.formats.textual_inversion import (
  TextualInversion,
  bundled_inversions,
  read_textual_inversion,
)
from diffusion_jax.models.lora import merge_lora
from diffusion_jax.models.text.tokenizer import Cut, Tokenize, load_tokenizer
from diffusion_jax.pipelines.directory import read_model
from diffusion_jax.pipelines.guides import (
  CLASSIFIER_GUIDANCE,
  CLIP_GUIDANCE,
  GUIDING_CLASSIFIER,
  GUIDING_CLIP,
  ClassifierGuide,
  CLIPGuide,
)
from diffusion_jax.pipelines.image_conditioners import CONTROLNET, ControlNet
from diffusion_jax.pipelines.model import DENOISER, WORSE, Diffusion
from diffusion_jax.pipelines.text_conditioners import EXTRA, embedding_table
from diffusion_jax.types import Weights


def add_lora(model: Diffusion, weights: Weights, path: str, scale: float = 1.0) -> Weights:
  """The weights with a LoRA, or another adapter, merged into them, `scale` times its strength.

  Its words in the same file are added, too. UserError: no LoRA, or not one for this model.
  """
  return add_loras(model, weights, [(path, scale)])


def add_loras(model: Diffusion, weights: Weights, files: Sequence[tuple[str, float]]) -> Weights:
  """The same of several files, each with its scale, whose changes are of the weights without them.

  So their order makes no difference beyond rounding, also of kinds that depend on the weights.
  """
  out = dict(weights)
  for path, scale in files:
    if not math.isfinite(scale):
      raise UserError(f'the scale of the LoRA {path} is {scale}; give a finite number.')
    text, file = model.text.networks if model.text else {}, lora_file(resolve(path))
    denoiser = denoiser_role(model.denoiser.config)
    shapes = {denoiser: model.denoiser.shapes, **{role: n.shapes for role, n in text.items()}}
    for name, layers in read_lora(file, shapes, inversions=True).items():
      role = DENOISER if name == denoiser else name
      sizes, params = to_params(layers)
      out[role] = merge_lora({**out[role], **params}, sizes, scale, base=weights[role])
    for learned in bundled_inversions(file, _widths(model) if model.text else None):
      out = _with_word(model, out, learned)
  return out


def read_controlnet(model: Diffusion, path: str) -> ControlNet:
  """Return the ControlNet of a directory without weights; UserError for one of another model."""
  network = read_network(CONTROLNET, path).network(compute=model.denoiser.compute)
  control = ControlNet({CONTROLNET: network})
  control.check(model.denoiser.config)
  return control


def add_controlnet(
  model: Diffusion, weights: Weights, path: str, mesh: Mesh | None = None
) -> tuple[Diffusion, Weights]:
  """Return the model with the ControlNet of a directory, as `read_controlnet`."""
  model = model.with_conditioner('control', read_controlnet(model, path))
  return model, {**weights, CONTROLNET: load_params(CONTROLNET, path, mesh=mesh)[1]}


def add_worse(
  model: Diffusion, weights: Weights, path: str, mesh: Mesh | None = None
) -> tuple[Diffusion, Weights]:
  """The model with a directory's denoiser as the worse one of autoguidance (Karras et al. 2024).

  A smaller one, or one trained for less long. UserError where it has other inputs.
  """
  other, parts, _ = read_model(path, model.denoiser.compute.dtype)
  own = model.denoiser.config
  for what, left, right in (
    ('noise schedule', other.noise.config, model.noise.config),
    ('prediction', other.parameterization, model.parameterization),
    ('input', other.denoiser.config.in_channels, own.in_channels),
    ('conditions', other.denoiser.config.conditions, own.conditions),
  ):
    if left != right:
      raise UserError(f'{path} has another {what} than the model; give a worse version of it.')
  params = {WORSE: parts[DENOISER].load(mesh=mesh)}
  return dataclasses.replace(model, worse=other.denoiser), {**weights, **params}


def add_clip_guide(
  model: Diffusion, weights: Weights, path: str, cutouts: int = 0, mesh: Mesh | None = None
) -> tuple[Diffusion, Weights]:
  """Return the model with the CLIP of a directory, both towers, for `clip_guidance`; see
  `guides.CLIPGuide`. UserError where there is none."""
  part = read_part(path).expect(('clip',))
  network, tokenizer = part.network(), load_tokenizer(resolve(path))
  length = network.config.text_config.max_position_embeddings
  tokenize = Tokenize(tokenizer, length, cut=Cut(reader=path))
  pixels = pixel_statistics(*part.json(PREPROCESSOR))
  guide = CLIPGuide({GUIDING_CLIP: network}, tokenize, **pixels, cutouts=cutouts)
  model = model.with_conditioner(CLIP_GUIDANCE, guide)
  return model, {**weights, GUIDING_CLIP: part.load(mesh=mesh)}


def add_classifier_guide(
  model: Diffusion, weights: Weights, path: str, mesh: Mesh | None = None
) -> tuple[Diffusion, Weights]:
  """Return the model with a directory's classifier for `classifier_guidance`; see
  `guides.ClassifierGuide`. UserError where there is none of noised z of the model's space."""
  part = read_part(path).expect(('classifier',))
  guide = ClassifierGuide({GUIDING_CLASSIFIER: part.network()})
  guide.check_space(model.space)
  model = model.with_conditioner(CLASSIFIER_GUIDANCE, guide)
  return model, {**weights, GUIDING_CLASSIFIER: part.load(mesh=mesh)}


def add_textual_inversion(model: Diffusion, weights: Weights, path: str) -> Weights:
  """The weights with the rows of a learned word, whose token the tokenizers then know.

  Several words follow the vocabulary in order. A text encoder without rows of its own reads the
  word as spelt. path: a file, or a directory with one for each text encoder
  (`formats.textual_inversion.FILES`). UserError: no such file, or one for other text encoders.
  """
  learned = read_textual_inversion(Path(resolve(path)), _widths(model))
  return _with_word(model, weights, learned)


def _widths(model: Diffusion) -> dict[str, int]:
  """Return the width of each text encoder's table of tokens. UserError where there is none."""
  if model.text is None:
    raise UserError(
      'the model reads no words; leave --textual_inversion out, or use a model that does.'
    )
  return {role: embedding_table(n)[1] for role, n in model.text.towers.items()}


def _with_word(model: Diffusion, weights: Weights, learned: TextualInversion) -> Weights:
  rows, widths = learned.embeddings, _widths(model)
  before = {
    role: np.asarray(weights[role].get(EXTRA, np.zeros((0, widths[role]), np.float32)))
    for role in rows
  }
  sizes = lambda arrays: {role: len(array) for role, array in arrays.items()}
  model.text.add_word(learned.token, sizes(rows), sizes(before))
  joined = {role: np.concatenate([before[role], rows[role]]).astype(np.float32) for role in rows}
  return weights | {role: {**weights[role], EXTRA: table} for role, table in joined.items()}
