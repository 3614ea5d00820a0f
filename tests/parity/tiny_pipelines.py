"""Stable Diffusion 1, 2, XL with its refiner, and the upscaler, tiny of diffusers and transformers.

Widths are multiples of 64, for the heads that a reader of a single file has to assume, and the
weights random.
"""

import json
from pathlib import Path

import diffusers
import torch
import transformers

VAE_FACTORS = {'sd1': 0.18215, 'sd2': 0.18215, 'x4_upscaler': 0.08333, 'sdxl': 0.13025,
               'sdxl_refiner': 0.13025}


def tokenizer(folder: Path) -> transformers.CLIPTokenizer:
  """A tokenizer of a few tokens, from files as CLIP's come."""
  letters = [chr(ord('a') + i) for i in range(26)]
  tokens = [*letters, *(f'{c}</w>' for c in letters), 'ca', 'cat</w>']
  tokens += ['<|startoftext|>', '<|endoftext|>']
  folder.mkdir(parents=True, exist_ok=True)
  (folder / 'vocab.json').write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
  (folder / 'merges.txt').write_text('#version: 0.2\nc a\nca t</w>\n')
  return transformers.CLIPTokenizer.from_pretrained(folder, model_max_length=77)


def text_encoder(width: int, layers: int, act: str, projection: int | None = None):
  config = transformers.CLIPTextConfig(
    vocab_size=56, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers,
    num_attention_heads=width // 64, hidden_act=act, projection_dim=projection or width,
    bos_token_id=0, eos_token_id=2, pad_token_id=1, max_position_embeddings=12,
  )
  kind = 'CLIPTextModelWithProjection' if projection else 'CLIPTextModel'
  return getattr(transformers, kind)(config)


def vae(family: str) -> diffusers.AutoencoderKL:
  channels = (32, 32, 64) if family == 'sd1' else (32, 64)
  return diffusers.AutoencoderKL(
    block_out_channels=channels, layers_per_block=2 if family == 'sd1' else 1, latent_channels=4,
    down_block_types=['DownEncoderBlock2D'] * len(channels),
    up_block_types=['UpDecoderBlock2D'] * len(channels), scaling_factor=VAE_FACTORS[family],
  )


def unet(family: str, inputs: int = 4, **changes) -> diffusers.UNet2DConditionModel:
  """Between them: one to three levels, one and two layers, depths 1 to 3, all conditions."""
  cross, plain = 'CrossAttnDownBlock2D', 'DownBlock2D'
  up = {cross: 'CrossAttnUpBlock2D', plain: 'UpBlock2D'}
  downs, values = {
    'sd1': ([cross, plain], dict(
      block_out_channels=(32, 64), attention_head_dim=8, cross_attention_dim=64,
      layers_per_block=2,
    )),
    'sd2': ([cross, cross, plain], dict(
      block_out_channels=(32, 64, 64), attention_head_dim=(1, 1, 1), cross_attention_dim=128,
      use_linear_projection=True, layers_per_block=1,
    )),
    'x4_upscaler': ([plain, cross, cross], dict(
      block_out_channels=(32, 32, 64), attention_head_dim=8, cross_attention_dim=128,
      use_linear_projection=True, only_cross_attention=[False, True, True], num_class_embeds=10,
      layers_per_block=1,
    )),
    'sdxl': ([plain, cross, cross], dict(
      block_out_channels=(32, 64, 128), attention_head_dim=(1, 1, 2), cross_attention_dim=192,
      use_linear_projection=True, transformer_layers_per_block=[1, 2, 3], layers_per_block=1,
      addition_embed_type='text_time', addition_time_embed_dim=8,
      projection_class_embeddings_input_dim=6 * 8 + 64,
    )),
    'sdxl_refiner': ([plain, cross, plain], dict(
      block_out_channels=(32, 64, 64), attention_head_dim=(1, 1, 1), cross_attention_dim=64,
      use_linear_projection=True, transformer_layers_per_block=2, layers_per_block=1,
      addition_embed_type='text_time', addition_time_embed_dim=8,
      projection_class_embeddings_input_dim=5 * 8 + 32,
    )),
  }[family]
  return diffusers.UNet2DConditionModel(**values | dict(
    in_channels=inputs, sample_size=8, down_block_types=downs,
    up_block_types=[up[name] for name in downs[::-1]],
  ) | changes)


def pipeline(family: str, folder: Path, prediction: str = 'epsilon') -> diffusers.DiffusionPipeline:
  """One of VAE_FACTORS with every weight random, norms and biases too."""
  tokens = tokenizer(folder / 'tokenizer_files')
  scheduler = diffusers.DDIMScheduler(
    beta_start=0.00085, beta_end=0.012, beta_schedule='scaled_linear', clip_sample=False,
    set_alpha_to_one=False, steps_offset=1, prediction_type=prediction,
  )
  parts = dict(
    vae=vae(family), tokenizer=tokens, unet=unet(family, 7 if 'x4' in family else 4),
    scheduler=scheduler,
  )
  if family == 'sdxl':
    pipe = diffusers.StableDiffusionXLPipeline(
      **parts, text_encoder=text_encoder(64, 2, 'quick_gelu'), tokenizer_2=tokens,
      text_encoder_2=text_encoder(128, 3, 'gelu', projection=64),
    )
  elif family == 'sdxl_refiner':  # By its tenth layer diffusers knows it.
    pipe = diffusers.StableDiffusionXLImg2ImgPipeline(
      **parts | {'tokenizer': None}, text_encoder=None, tokenizer_2=tokens,
      text_encoder_2=text_encoder(64, 10, 'gelu', projection=32),
      requires_aesthetics_score=True, force_zeros_for_empty_prompt=False,
    )
  elif family == 'x4_upscaler':
    pipe = diffusers.StableDiffusionUpscalePipeline(
      **parts, text_encoder=text_encoder(128, 2, 'gelu'),
      low_res_scheduler=diffusers.DDPMScheduler(),
    )
  else:
    encoder = text_encoder(64, 2, 'quick_gelu') if family == 'sd1' else text_encoder(128, 2, 'gelu')
    pipe = diffusers.StableDiffusionPipeline(
      **parts, text_encoder=encoder, safety_checker=None, feature_extractor=None,
      requires_safety_checker=False,
    )
  for module in networks(pipe).values():
    randomize(module)
  return pipe


def networks(pipe: diffusers.DiffusionPipeline) -> dict[str, torch.nn.Module]:
  return {k: v for k, v in pipe.components.items() if isinstance(v, torch.nn.Module)}


@torch.no_grad()
def randomize(module: torch.nn.Module) -> None:
  for parameter in module.parameters():
    parameter.copy_(torch.randn_like(parameter))
