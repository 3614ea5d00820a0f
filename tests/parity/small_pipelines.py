"""Pipelines of diffusers with networks as small as they can be and weights of moderate size.

One level between text and latents, an autoencoder that halves once; all weights random. The
autoencoder's variance is tiny, so that what diffusers draws of it is the mean, which we take.
"""

import diffusers
import torch
import transformers

SIZE, LATENT, LENGTH, WIDTH = 16, 8, 10, 8
WORDS = ['!', *'abcdefgh', *(f'{c}</w>' for c in 'abcdefgh'), 'ab</w>', 'cab</w>',
         '<|startoftext|>', '<|endoftext|>']
DDIM = dict(
  beta_start=0.00085, beta_end=0.012, beta_schedule='scaled_linear', clip_sample=False,
  set_alpha_to_one=False, steps_offset=1,
)
TOWER = dict(
  hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_hidden_layers=2, num_attention_heads=2
)
NO_CHECK = dict(safety_checker=None, feature_extractor=None, requires_safety_checker=False)


def tokenizer(pad: str = '<|endoftext|>') -> transformers.CLIPTokenizer:
  return transformers.CLIPTokenizer(
    vocab={word: i for i, word in enumerate(WORDS)}, merges=[('a', 'b</w>'), ('c', 'ab</w>')],
    model_max_length=LENGTH, pad_token=pad,
  )


def text_encoder(projection: int | None = None, act: str = 'quick_gelu'):
  """Its eos_token_id is the true one: with the published 2, transformers pools at learned words."""
  config = transformers.CLIPTextConfig(
    **TOWER, vocab_size=len(WORDS), max_position_embeddings=LENGTH, hidden_act=act,
    bos_token_id=len(WORDS) - 2, eos_token_id=len(WORDS) - 1,
    projection_dim=projection or WIDTH,
  )
  kind = 'CLIPTextModelWithProjection' if projection else 'CLIPTextModel'
  return getattr(transformers, kind)(config)


def vae() -> diffusers.AutoencoderKL:
  return diffusers.AutoencoderKL(
    block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4, latent_channels=4,
    down_block_types=['DownEncoderBlock2D'] * 2, up_block_types=['UpDecoderBlock2D'] * 2,
    sample_size=SIZE, scaling_factor=0.9,
  )


def unet(inputs: int = 4, **changes) -> diffusers.UNet2DConditionModel:
  """Sees the text in the middle alone: other blocks would add to every compilation."""
  return diffusers.UNet2DConditionModel(**dict(
    in_channels=inputs, sample_size=LATENT, block_out_channels=(WIDTH,), layers_per_block=1,
    norm_num_groups=4, cross_attention_dim=WIDTH, attention_head_dim=2,
    down_block_types=['DownBlock2D'], up_block_types=['UpBlock2D'],
  ) | changes)


@torch.no_grad()
def disturbed(pipeline: diffusers.DiffusionPipeline) -> diffusers.DiffusionPipeline:
  torch.manual_seed(0)
  for module in pipeline.components.values():
    if isinstance(module, torch.nn.Module):
      for parameter in module.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
      module.eval()
  pipeline.vae.quant_conv.weight[4:] = 0
  pipeline.vae.quant_conv.bias[4:] = -30
  pipeline.vae.decoder.conv_out.weight.mul_(0.5)
  if 'controlnet' in pipeline.components:  # Whose outputs are zero when it is made.
    for layer in (*pipeline.controlnet.controlnet_down_blocks,
                  pipeline.controlnet.controlnet_cond_embedding.conv_out):
      layer.weight.add_(0.5 * torch.randn_like(layer.weight))
  pipeline.set_progress_bar_config(disable=True)
  return pipeline


def parts(inputs: int = 4, prediction: str = 'epsilon', **changes) -> dict:
  """What most pipelines have in common."""
  return dict(
    vae=vae(), text_encoder=text_encoder(), tokenizer=tokenizer(), unet=unet(inputs, **changes),
    scheduler=diffusers.DDIMScheduler(**DDIM, prediction_type=prediction),
  )


def sd1():
  return diffusers.StableDiffusionPipeline(**parts(), **NO_CHECK)


def sd2_v():
  more = dict(use_linear_projection=True, prediction='v_prediction')
  return diffusers.StableDiffusionPipeline(**parts(**more), **NO_CHECK)


def sdxl():
  more = dict(
    cross_attention_dim=2 * WIDTH, use_linear_projection=True, transformer_layers_per_block=2,
    addition_embed_type='text_time', addition_time_embed_dim=4,
    projection_class_embeddings_input_dim=6 * 4 + 6,
  )
  return diffusers.StableDiffusionXLPipeline(
    **parts(**more), text_encoder_2=text_encoder(6, 'gelu'), tokenizer_2=tokenizer('!'),
    add_watermarker=False,
  )


def inpaint():
  return diffusers.StableDiffusionInpaintPipeline(**parts(9), **NO_CHECK)


def edit():
  return diffusers.StableDiffusionInstructPix2PixPipeline(**parts(8), **NO_CHECK)


def upscale():
  low = diffusers.DDPMScheduler(beta_schedule='scaled_linear', beta_start=0.0001, beta_end=0.02)
  return diffusers.StableDiffusionUpscalePipeline(
    **parts(7, 'v_prediction', num_class_embeds=30), low_res_scheduler=low, max_noise_level=350
  )


def depth():
  return diffusers.StableDiffusionDepth2ImgPipeline(
    **parts(5), depth_estimator=None, feature_extractor=None
  )


def controlled():
  own = parts()
  controlnet = diffusers.ControlNetModel.from_unet(
    own['unet'], conditioning_embedding_out_channels=(4, 8)
  )
  return diffusers.StableDiffusionControlNetPipeline(**own, controlnet=controlnet, **NO_CHECK)


def variation():
  own = parts()
  del own['text_encoder'], own['tokenizer']
  encoder = transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(
    **TOWER, image_size=LATENT, patch_size=4, projection_dim=WIDTH
  ))
  extractor = transformers.CLIPImageProcessor(
    size={'shortest_edge': LATENT}, crop_size={'height': LATENT, 'width': LATENT}
  )
  return diffusers.StableDiffusionImageVariationPipeline(
    **own, image_encoder=encoder, safety_checker=None, feature_extractor=extractor,
    requires_safety_checker=False,
  )


PIPELINES = {
  'sd1': sd1, 'sd2_v': sd2_v, 'sdxl': sdxl, 'inpaint': inpaint, 'edit': edit, 'upscale': upscale,
  'depth': depth, 'controlled': controlled, 'variation': variation,
}


def make(name: str) -> diffusers.DiffusionPipeline:
  """One of PIPELINES, with the same weights each time."""
  torch.manual_seed(0)
  return disturbed(PIPELINES[name]())
