"""Families of published models: their parts in single files, and what shapes do not determine.

Extra tensors that no computation would use are left out and named: a text encoder's head, a table,
an average, remains of an optimizer or another program. Those that make it another model than its
family's are refused.
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Any

from diffusion_jax.errors import require
from diffusion_jax.formats.adapter_names import is_lora, of_other_kinds
from diffusion_jax.formats.published import some
from diffusion_jax.formats.single_file_names import AUTOENCODER, UNET
from diffusion_jax.formats.transformer_names import STARTS

FLOW = 'flow'
"""The prediction of models whose scheduler says none."""

NONE = [None, None]
"""In place of a part of a pipeline that is not there."""


@dataclasses.dataclass(frozen=True)
class Family:
  """One family.

  text: name of a text encoder -> (prefix in a single file, a row of TEXT_STYLES or 't5'). heads:
  attention heads at every level of the U-Net; None for one per 64 channels. pipelines: input
  channels of the denoiser -> the class in diffusers' model_index.json. predictions: input channels
  -> prediction, where all published ones agree. sample_sizes: prediction -> edge of the training
  latents. sizes: how many numbers the U-Net is given beside a pooled text. index: more of
  model_index.json. denoiser: its folder, and the style of its names. vae: prefix of the
  autoencoder. vae_values: of its config.json, which shapes do not tell. optional: text encoders
  that the model may do without.
  """

  text: dict[str, tuple[str, str]]
  heads: int | None
  scaling_factor: float
  pipelines: dict[int, str]
  predictions: dict[int, str]
  sample_sizes: dict[str, int]
  sizes: int = 0
  index: Mapping[str, Any] = dataclasses.field(
    default_factory=lambda: dict.fromkeys(('safety_checker', 'feature_extractor'), NONE)
  )
  denoiser: tuple[str, str] = ('unet', 'unet')
  vae: str = AUTOENCODER
  vae_values: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  optional: tuple[str, ...] = ()

  @property
  def places(self) -> dict[str, tuple[str, str]]:
    """(prefix in a single file, style of names) of every network, by part."""
    folder, style = self.denoiser
    return {**self.text, folder: (UNET, style), 'vae': (self.vae, 'vae')}

  def stored_name(self, name: str) -> str:
    """A tensor's name in a single file with the prefix that it has here.

    Some files have another one before the autoencoder, none before the transformer, or leave CLIP's
    out.
    """
    start = name.partition('.')[0]
    if start in STARTS.get(self.denoiser[1], ()):
      return UNET + name
    if self.denoiser[1] in STARTS and f'{start}.' in _AUTOENCODERS:
      return self.vae + name.partition('.')[2]
    for prefix, style in self.text.values():
      inner = name.removeprefix(prefix)
      if style == 'clip' and inner != name and inner.startswith(_TOWER):
        return f'{prefix}text_model.{inner}'
    return name


_AUTOENCODERS = (AUTOENCODER, 'vae.')
_TOWER = ('embeddings.', 'encoder.', 'final_layer_norm.')
_UNQUANTIZED = {'use_quant_conv': False, 'use_post_quant_conv': False, 'force_upcast': True}
_OPEN_CLIP = {'text_encoder': ('cond_stage_model.model.', 'open_clip')}

FAMILIES: dict[str, Family] = {
  'sd1': Family(
    {'text_encoder': ('cond_stage_model.transformer.', 'clip')}, 8, 0.18215,
    {4: 'StableDiffusionPipeline', 9: 'StableDiffusionInpaintPipeline',
     8: 'StableDiffusionInstructPix2PixPipeline'},
    {4: 'epsilon', 9: 'epsilon', 8: 'epsilon'}, {'epsilon': 64, 'v_prediction': 96},
  ),
  'sd2': Family(
    _OPEN_CLIP, None, 0.18215,
    {4: 'StableDiffusionPipeline', 9: 'StableDiffusionInpaintPipeline',
     5: 'StableDiffusionDepth2ImgPipeline'},
    {9: 'epsilon', 5: 'epsilon'}, {'epsilon': 64, 'v_prediction': 96},
  ),
  'x4_upscaler': Family(
    _OPEN_CLIP, 8, 0.08333, {7: 'StableDiffusionUpscalePipeline'}, {7: 'v_prediction'},
    {'epsilon': 128, 'v_prediction': 128},
  ),
  'sdxl': Family(
    {'text_encoder': ('conditioner.embedders.0.transformer.', 'clip'),
     'text_encoder_2': ('conditioner.embedders.1.model.', 'open_clip')},
    None, 0.13025,
    {4: 'StableDiffusionXLPipeline', 9: 'StableDiffusionXLInpaintPipeline',
     8: 'StableDiffusionXLInstructPix2PixPipeline'},
    {4: 'epsilon', 9: 'epsilon', 8: 'epsilon'}, {'epsilon': 128, 'v_prediction': 128}, 6,
    {'force_zeros_for_empty_prompt': True}, vae_values={'force_upcast': True},
  ),
  'sdxl_refiner': Family(
    {'text_encoder_2': ('conditioner.embedders.0.model.', 'open_clip')}, None, 0.13025,
    {4: 'StableDiffusionXLImg2ImgPipeline'}, {4: 'epsilon'},
    {'epsilon': 128, 'v_prediction': 128}, 5, {
      'text_encoder': NONE, 'tokenizer': NONE, 'requires_aesthetics_score': True,
      'force_zeros_for_empty_prompt': False,
    }, vae_values={'force_upcast': True},
  ),
  'sd3': Family(
    {'text_encoder': ('text_encoders.clip_l.transformer.', 'clip_identity'),
     'text_encoder_2': ('text_encoders.clip_g.transformer.', 'clip_projection'),
     'text_encoder_3': ('text_encoders.t5xxl.transformer.', 't5')},
    None, 1.5305, {16: 'StableDiffusion3Pipeline'}, {16: FLOW}, {FLOW: 128}, index={},
    denoiser=('transformer', 'mmdit'), vae_values=_UNQUANTIZED | {'shift_factor': 0.0609},
    optional=('text_encoder_3',),
  ),
  'flux_dev': Family(
    {'text_encoder': ('text_encoders.clip_l.transformer.', 'clip'),
     'text_encoder_2': ('text_encoders.t5xxl.transformer.', 't5')},
    None, 0.3611, {64: 'FluxPipeline'}, {64: FLOW}, {FLOW: 128}, index={},
    denoiser=('transformer', 'flux'), vae='vae.',
    vae_values=_UNQUANTIZED | {'shift_factor': 0.1159},
  ),
}
FAMILIES['flux_schnell'] = FAMILIES['flux_dev']

IGNORED = (
  # Tables of the noise schedule, which follow from the scheduler's config.
  'alphas_cumprod', 'alphas_cumprod_prev', 'betas', 'log_one_minus_alphas_cumprod', 'logvar',
  'posterior_log_variance_clipped', 'posterior_mean_coef1', 'posterior_mean_coef2',
  'posterior_variance', 'sqrt_alphas_cumprod', 'sqrt_one_minus_alphas_cumprod',
  'sqrt_recip_alphas_cumprod', 'sqrt_recipm1_alphas_cumprod', 'lvlb_weights', 'scale_factor',
  'denoiser.sigmas', 'global_step',
  # Read as facts, not as parameters.
  'v_pred', 'ztsnr',
  # Parts of CLIP that no pipeline calls.
  'cond_stage_model.logit_scale', 'cond_stage_model.model.logit_scale',
  'cond_stage_model.model.text_projection',
  'cond_stage_model.transformer.text_projection.weight',
  'conditioner.embedders.0.model.logit_scale', 'conditioner.embedders.1.model.logit_scale',
  # A second name of T5's table of tokens.
  'text_encoders.t5xxl.transformer.encoder.embed_tokens.weight',
)
IGNORED_PREFIXES = (
  'low_res_model.',  # The upscaler's second noise schedule.
  'first_stage_model.loss.',
  # OpenCLIP's last layer: Stable Diffusion 2 takes the text of the last but one.
  'cond_stage_model.model.transformer.resblocks.23.',
)


def ignored(name: str) -> bool:
  """Return whether a tensor of a single file follows from its family, or no pipeline calls it."""
  return name in IGNORED or name.startswith(IGNORED_PREFIXES) or (
    name.endswith(('.embeddings.position_ids', '.attn_mask'))
  )


_GROUPS = {
  'depth_model.': 'the depth estimator', 'model_ema.': 'averages of the weights',
  'safety_checker.': 'the safety checker',
}
_INSIDE = {
  'unet': ('',), 'mmdit': ('',), 'flux': ('',), 'clip': ('text_model.',),
  'clip_identity': ('text_model.',), 'clip_projection': ('text_model.', 'text_projection.'),
  't5': ('shared.', 'encoder.'),
  'vae': ('encoder.', 'decoder.', 'quant_conv.', 'post_quant_conv.', 'quantize.', 'bn.'),
  'open_clip': (
    'token_embedding', 'positional_embedding', 'transformer.', 'ln_final', 'text_projection'
  ),
}
"""How the parts of a network begin that a pipeline calls, by the style of its names."""
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
  """The names of a family's networks, and a sentence on extra ones left out.

  UserError: a LoRA, a ControlNet or parts of another model.
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
  """Return whether a tensor is where a family has its networks; they may still not have it."""
  return any(
    name.removeprefix(prefix).startswith(_INSIDE[style])
    for prefix, style in FAMILIES[family].places.values() if name.startswith(prefix)
  )


def _refuse(rest: list[str], where: str) -> None:
  of_models: Mapping[str, list[str]] = {
    'a LoRA or another adapter': [name for name in rest if is_lora(name)], **of_other_kinds(rest),
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


def of_names(names: Mapping[str, Any], where: str) -> str:
  """Return the family by the names of the tensors. UserError where it is none that can be read."""
  has = lambda prefix: any(name.startswith(prefix) for name in names)
  if not has(f'{UNET}input_blocks.') and (found := _transformer(names)):
    return found
  alone = {'pixart': 'blocks.0.cross_attn.kv_linear.weight', 'dit': 'blocks.0.attn.qkv.weight'}
  kind = next((kind for kind, mark in alone.items() if mark in names), None)
  require(
    kind is None,
    f'{where} holds a transformer alone; give --type {kind} to make a directory of it.',
  )
  require(
    has('model.diffusion_model.input_blocks.') and has('first_stage_model.'),
    f'{where} holds no whole Stable Diffusion (model.diffusion_model. and first_stage_model. must '
    'be in it) nor the transformer of Stable Diffusion 3 or Flux.1; give a whole model.',
  )
  require(
    not {'edm_mean', 'edm_std'} & set(names),
    f"{where} was trained with EDM's preconditioning, which is not implemented here.",
  )
  if has('conditioner.embedders.1.model.'):
    return 'sdxl'
  if has('conditioner.embedders.0.model.'):
    return 'sdxl_refiner'
  require(
    not has('conditioner.'),
    f'{where} has the text encoder of a later model, which is not implemented; give a Stable '
    'Diffusion 1, 2 or XL.',
  )
  if has('cond_stage_model.model.'):
    upscaler = 'model.diffusion_model.label_emb.weight' in names
    return 'x4_upscaler' if upscaler else 'sd2'
  require(
    has('cond_stage_model.transformer.'),
    f'{where} has no text encoder that is known here; give a whole model.',
  )
  return 'sd1'


def _transformer(names: Iterable[str]) -> str | None:
  inner = {name.removeprefix(UNET) for name in names}
  starts = {name.partition('.')[0] for name in inner}
  flux = 'flux_dev' if 'guidance_in.in_layer.weight' in inner else 'flux_schnell'
  marks = {'sd3': {'joint_blocks'}, flux: {'double_blocks', 'single_blocks'}}
  return next((family for family, blocks in marks.items() if blocks <= starts), None)


_TRANSFORMERS = {
  'SD3Transformer2DModel': lambda config: 'sd3',
  'FluxTransformer2DModel': lambda config: (
    'flux_dev' if config.get('guidance_embeds') else 'flux_schnell'
  ),
}


def of_parts(configs: Mapping[str, dict[str, Any]], where: str) -> str:
  """Return the family of a directory by the configs of its parts. UserError where it is none."""
  unet, text = configs.get('unet'), configs.get('text_encoder')
  if found := _TRANSFORMERS.get(configs.get('transformer', {}).get('_class_name')):
    return found(configs['transformer'])
  sizes = unet is not None and unet.get('addition_embed_type') == 'text_time'
  if sizes and text is None and {'vae', 'text_encoder_2'} <= configs.keys():
    return 'sdxl_refiner'
  require(
    unet is not None and text is not None and 'vae' in configs,
    f'{where} has no unet, vae and text_encoder, which a single file must hold; convert to another '
    'layout.',
  )
  require(
    sizes == ('text_encoder_2' in configs),
    f'{where} has {"no" if sizes else "a"} text_encoder_2 but {"the" if sizes else "no"} U-Net of '
    'Stable Diffusion XL; convert to another layout.',
  )
  if sizes:
    return 'sdxl'
  if text.get('hidden_act') == 'quick_gelu':
    return 'sd1'
  return 'x4_upscaler' if unet.get('num_class_embeds') else 'sd2'


_DYNAMIC = {
  'base_shift': 0.5, 'max_shift': 1.15, 'base_image_seq_len': 256, 'max_image_seq_len': 4096
}
_FLOW_SCHEDULERS = {
  'sd3': {'shift': 3.0},
  'flux_dev': _DYNAMIC | {'shift': 3.0, 'use_dynamic_shifting': True},
  'flux_schnell': _DYNAMIC | {'shift': 1.0, 'use_dynamic_shifting': False},
}


def scheduler(family: str, prediction: str, zero_snr: bool) -> dict[str, Any]:
  """Return the scheduler_config.json of a family, as published with it."""
  if family in _FLOW_SCHEDULERS:
    return _FLOW_SCHEDULERS[family] | {
      '_class_name': 'FlowMatchEulerDiscreteScheduler', 'num_train_timesteps': 1000
    }
  values = {
    'num_train_timesteps': 1000, 'beta_schedule': 'scaled_linear', 'beta_start': 0.00085,
    'beta_end': 0.012, 'trained_betas': None, 'prediction_type': prediction, 'steps_offset': 1,
    'timestep_spacing': 'leading',
  }
  if zero_snr:
    values |= {'rescale_betas_zero_snr': True, 'timestep_spacing': 'trailing'}
  if FAMILIES[family].sizes:
    return values | {
      '_class_name': 'EulerDiscreteScheduler', 'interpolation_type': 'linear',
      'use_karras_sigmas': False,
    }
  values |= {'clip_sample': False, 'set_alpha_to_one': False}
  if family == 'x4_upscaler':
    values |= {'beta_start': 0.0001, 'beta_end': 0.02}
  if prediction == 'epsilon' and not zero_snr:
    return values | {'_class_name': 'PNDMScheduler', 'skip_prk_steps': True}
  return values | {'_class_name': 'DDIMScheduler'}


LOW_RES_SCHEDULER = {
  '_class_name': 'DDPMScheduler', 'num_train_timesteps': 1000, 'beta_schedule': 'scaled_linear',
  'beta_start': 0.0001, 'beta_end': 0.02, 'trained_betas': None, 'prediction_type': 'epsilon',
  'clip_sample': True, 'variance_type': 'fixed_small',
}
"""Schedule of the noise on the upscaler's small image."""
