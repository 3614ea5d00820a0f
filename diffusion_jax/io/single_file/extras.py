"""What a single file may hold beside the networks that are converted: left and named, or refused.

A tensor that no network of the family has is harmless where nothing would have been computed with
it: a head of a text encoder, a table, an average, what an optimizer or another program left. It is
not where the file is another model than its family's: then it is refused by name.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from diffusion_jax.diffusion.schedules import Schedule, ScheduleConfig
from diffusion_jax.io.lora_keys import is_lora, of_other_kinds, some
from diffusion_jax.io.single_file import autoencoder, unet
from diffusion_jax.io.single_file.families import FAMILIES, ignored
from diffusion_jax.models.checks import require

_GROUPS = {
  'depth_model.': 'the depth estimator', 'model_ema.': 'averages of the weights',
  'safety_checker.': 'the safety checker',
}
_TOWERS = {
  'clip': ('text_model.',),
  'open_clip': (
    'token_embedding', 'positional_embedding', 'transformer.', 'ln_final', 'text_projection'
  ),
}
"""How the parts of a text encoder begin that a pipeline calls, by the style of its names."""
_OF_AUTOENCODER = ('encoder.', 'decoder.', 'quant_conv.', 'post_quant_conv.', 'quantize.', 'bn.')
_HEADS = re.compile(r'(^|[._])(logit_scale|logit_bias|text_projection|visual|vision_model)\b')
_MODELS = {
  'a ControlNet': re.compile(r'^(control_model|controlnet)\.|^lora_controlnet$|input_hint_block'),
  'the parts of unCLIP': re.compile(r'^(embedder|noise_augmentor)\.'),
  'the parts of a later model': re.compile(
    r'^text_encoders\.|(^|\.)(joint_blocks|double_blocks|single_blocks|x_embedder|context_embedder|'
    r'transformer_blocks\.\d+\.norm1_context)\.'
  ),
  'a model in the names of diffusers': re.compile(r'^(unet|vae|text_encoder|text_encoder_2)\.'),
  'another text encoder': re.compile(r'^(cond_stage_model|conditioner)\.'),
}


def sort_out(names: Iterable[str], family: str, where: str) -> tuple[set[str], list[str]]:
  """The names of the networks of a family, and a sentence on what is left, where anything is.

  Raises:
    UserError: a LoRA, a ControlNet or parts of another model, which cannot be left.
  """
  kept: set[str] = set()
  rest: list[str] = []
  for name in names:
    if ignored(name):
      continue
    if _has(name, family):
      kept.add(name)
    else:
      rest.append(name)
  _refuse(rest, where)
  return kept, _note(rest, where)


def _has(name: str, family: str) -> bool:
  """Whether a tensor is where the networks of a family are; whether they have it is seen later."""
  if name.startswith(unet.PREFIX):
    return True
  if name.startswith(autoencoder.PREFIX):
    return name.removeprefix(autoencoder.PREFIX).startswith(_OF_AUTOENCODER)
  return any(
    name.removeprefix(prefix).startswith(_TOWERS[style])
    for prefix, style in FAMILIES[family].text.values() if name.startswith(prefix)
  )


def _refuse(rest: list[str], where: str) -> None:
  of_models: Mapping[str, list[str]] = {
    'a LoRA': [name for name in rest if is_lora(name)], **of_other_kinds(rest),
    **{
      kind: [n for n in rest if pattern.search(n) and not _HEADS.search(n)]
      for kind, pattern in _MODELS.items()
    },
  }
  for kind, found in of_models.items():
    require(
      not found,
      f'{where} holds {kind} ({some(found)}), without which it would be another model; convert a '
      'file without.',
    )


def _note(rest: list[str], where: str) -> list[str]:
  if not rest:
    return []
  parts, counted = [], 0
  for prefix, what in _GROUPS.items():
    if count := sum(name.startswith(prefix) for name in rest):
      parts.append(f'{what} ({prefix}, {count} tensors)')
      counted += count
  others = [name for name in rest if not name.startswith(tuple(_GROUPS))]
  if others:
    parts.append(f'{len(others)} tensors that no network of it has ({some(others)})')
  return [f'{where}: left out are {", ".join(parts)}.']


def schedule_note(
  tensors: Mapping[str, Any], scheduler: Mapping[str, Any], where: str
) -> list[str]:
  """A sentence where a file's own table of noise is none of its family's, which is written."""
  table = tensors.get('alphas_cumprod')
  steps = scheduler['num_train_timesteps']
  if table is None or tuple(table.shape) != (steps,):
    return []
  known = [
    Schedule(ScheduleConfig(
      scheduler['beta_schedule'], scheduler['beta_start'], scheduler['beta_end'], steps, zero
    )).alpha_bar for zero in (False, True)
  ]
  found = np.asarray(table, np.float64)
  if any(np.abs(found - one).max() < 1e-2 for one in known):  # Half precision is off by 5e-4.
    return []
  return [
    f'{where}: its alphas_cumprod is another noise schedule than scheduler_config.json now says, '
    'which is that of its family; correct beta_start, beta_end or beta_schedule there.'
  ]
