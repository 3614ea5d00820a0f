"""Adds to a loaded model what others have trained for it: LoRA, ControlNet, learned words."""

import dataclasses
from pathlib import Path

import numpy as np
from jax.sharding import Mesh

from diffusion_jax.errors import UserError
from diffusion_jax.io.lora import read_lora, to_params
from diffusion_jax.io.pretrained import load_params, resolve
from diffusion_jax.io.textual_inversion import read_textual_inversion
from diffusion_jax.models.controlnet import ControlNet
from diffusion_jax.models.functional import Network
from diffusion_jax.models.lora import Rank, merge_lora
from diffusion_jax.models.text.tokenizer import add_placeholder
from diffusion_jax.pipelines.text_encoders import EXTRA, embedding_table
from diffusion_jax.pipelines.text_to_image import TextToImage
from diffusion_jax.types import Weights


def add_lora(model: TextToImage, weights: Weights, path: str, scale: float = 1.0) -> Weights:
  """The weights with a LoRA merged into them, `scale` times as strong as it was trained.

  Raises:
    UserError: a file that is none, or not one for this model.
  """
  roles = ('unet', *model.text.networks)
  lora = read_lora(resolve(path), {role: model.networks[role].shapes for role in roles})
  out = dict(weights)
  for role, layers in lora.items():
    sizes, params = to_params(layers)
    sizes = {name: Rank(size.rank, scale * size.alpha) for name, size in sizes.items()}
    out[role] = merge_lora({**weights[role], **params}, sizes)
  return out


def add_controlnet(
  model: TextToImage, weights: Weights, path: str, mesh: Mesh | None = None
) -> tuple[TextToImage, Weights]:
  """The model with a ControlNet from a directory. UserError where it is none for this U-Net."""
  config, params = load_params('controlnet', path, mesh=mesh)
  for name in ('block_out_channels', 'cross_attention_dim', 'layers_per_block'):
    own, other = getattr(model.unet.config, name), getattr(config, name)
    if own != other:
      raise UserError(
        f'the ControlNet {path} has {name} {other}, but the U-Net {own}; use one made for it.'
      )
  network = Network.of(ControlNet, config, **model.unet.options)
  model = dataclasses.replace(model, controlnet=network)
  return model, {**weights, 'controlnet': params}


def add_words(model: TextToImage, weights: Weights, path: str) -> Weights:
  """The weights with the rows of a learned word, whose token the model's tokenizers then know.

  Several words may be added one after another; they follow the vocabulary in that order. A text
  encoder for which nothing was learned goes on reading the word as it is spelt.

  Args:
    path: a file, or a directory with one for each text encoder (`io.textual_inversion.FILES`).

  Raises:
    UserError: a file that is none, or one for other text encoders.
  """
  if not model.text.tokenizers:
    raise UserError('the model reads no words; leave --words out, or use a model that does.')
  widths = {role: embedding_table(n)[1] for role, n in model.text.networks.items()}
  learned = read_textual_inversion(Path(resolve(path)), widths)
  out = dict(weights)
  for (role, network), tokenizer in zip(
    model.text.networks.items(), model.text.tokenizers, strict=True
  ):
    if role not in learned.embeddings:
      continue
    rows = learned.embeddings[role]
    ids = add_placeholder(tokenizer, learned.token, len(rows))
    before = np.asarray(out[role].get(EXTRA, np.zeros((0, widths[role]), np.float32)))
    known = embedding_table(network)[2] + len(before)
    if ids[0] != known:
      raise UserError(
        f'the tokenizer gives {learned.token} the id {ids[0]}, but the text encoder has {known} '
        'rows; use the tokenizer that came with it.'
      )
    out[role] = {**out[role], EXTRA: np.concatenate([before, rows]).astype(np.float32)}
  return out
