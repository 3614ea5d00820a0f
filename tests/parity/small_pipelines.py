"""Pipelines of diffusers with networks as small as they can be and weights of moderate size.

One level between text and latents, an autoencoder that halves once; all weights random. The
autoencoder's variance is tiny, so that what diffusers draws of it is the mean, which we take.
"""

import diffusers
import torch
import transformers

SIZE, LATENT, LENGTH, WIDTH = 16, 8, 10, 8
T5_LENGTH, T5_WIDTH = 13, 20
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


def vae(levels: int = 2, **changes) -> diffusers.AutoencoderKL:
  return diffusers.AutoencoderKL(**dict(
    block_out_channels=(8,) * levels, layers_per_block=1, norm_num_groups=4, latent_channels=4,
    down_block_types=['DownEncoderBlock2D'] * levels,
    up_block_types=['UpDecoderBlock2D'] * levels,
    sample_size=SIZE, scaling_factor=0.9,
  ) | changes)


def vae_16() -> diffusers.AutoencoderKL:
  return vae(
    latent_channels=16, shift_factor=0.1, use_quant_conv=False, use_post_quant_conv=False
  )


def t5_tokenizer() -> transformers.T5Tokenizer:
  pieces = ['<pad>', '</s>', '<unk>', '\u2581', *'abcdefgh', '\u2581cab', 'ab']
  vocab = [(piece, -float(i)) for i, piece in enumerate(pieces)]
  return transformers.T5Tokenizer(vocab=vocab, extra_ids=0, model_max_length=T5_LENGTH)


def t5() -> transformers.T5EncoderModel:
  return transformers.T5EncoderModel(transformers.T5Config(
    vocab_size=14, d_model=T5_WIDTH, d_kv=4, d_ff=2 * T5_WIDTH, num_layers=2, num_heads=2,
    feed_forward_proj='gated-gelu', relative_attention_num_buckets=8,
    relative_attention_max_distance=12,
  ))


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
  last, channels = pipeline.vae.quant_conv, pipeline.vae.config.latent_channels
  last = pipeline.vae.encoder.conv_out if last is None else last
  last.weight[channels:] = 0
  last.bias[channels:] = -30
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


def sdxl(**changes):
  more = dict(
    cross_attention_dim=2 * WIDTH, use_linear_projection=True, transformer_layers_per_block=2,
    addition_embed_type='text_time', addition_time_embed_dim=4,
    projection_class_embeddings_input_dim=6 * 4 + 6,
  ) | changes
  return diffusers.StableDiffusionXLPipeline(
    **parts(**more), text_encoder_2=text_encoder(6, 'gelu'), tokenizer_2=tokenizer('!'),
    add_watermarker=False,
  )


def refiner():
  more = dict(
    use_linear_projection=True, addition_embed_type='text_time', addition_time_embed_dim=4,
    projection_class_embeddings_input_dim=5 * 4 + 6,
  )
  return diffusers.StableDiffusionXLImg2ImgPipeline(
    **parts(**more) | {'text_encoder': None, 'tokenizer': None},
    text_encoder_2=text_encoder(6, 'gelu'), tokenizer_2=tokenizer('!'), add_watermarker=False,
    requires_aesthetics_score=True, force_zeros_for_empty_prompt=False,
  )


def consistent(pipeline):
  """With the scheduler of consistency models, told the guidance."""
  scheduler = diffusers.LCMScheduler(
    beta_start=0.00085, beta_end=0.012, beta_schedule='scaled_linear'
  )
  return type(pipeline)(**pipeline.components | {'scheduler': scheduler}, **(
    {'add_watermarker': False} if hasattr(pipeline, 'text_encoder_2')
    else {'requires_safety_checker': False}
  ))


def lcm():
  return consistent(diffusers.LatentConsistencyModelPipeline(
    **parts(time_cond_proj_dim=6), **NO_CHECK
  ))


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


def sd3(with_t5: bool = True, scheduler: dict | None = None, **changes):
  transformer = diffusers.SD3Transformer2DModel(**dict(
    sample_size=LATENT, patch_size=2, in_channels=16, out_channels=16, num_layers=2,
    attention_head_dim=4, num_attention_heads=2, joint_attention_dim=T5_WIDTH,
    caption_projection_dim=8, pooled_projection_dim=2 * WIDTH, pos_embed_max_size=12,
  ) | changes)
  return diffusers.StableDiffusion3Pipeline(
    transformer, diffusers.FlowMatchEulerDiscreteScheduler(**scheduler or {'shift': 3.0}),
    vae_16(), text_encoder(WIDTH), tokenizer(), text_encoder(WIDTH, 'gelu'), tokenizer('!'),
    t5() if with_t5 else None, t5_tokenizer() if with_t5 else None,
  )


def sd35():
  return sd3(qk_norm='rms_norm', dual_attention_layers=(0,))


def flux(guidance_embeds: bool, **scheduler):
  transformer = diffusers.FluxTransformer2DModel(
    in_channels=64, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
    joint_attention_dim=T5_WIDTH, pooled_projection_dim=WIDTH, axes_dims_rope=(2, 2, 4),
    guidance_embeds=guidance_embeds,
  )
  return diffusers.FluxPipeline(
    diffusers.FlowMatchEulerDiscreteScheduler(**scheduler), vae_16(), text_encoder(), tokenizer(),
    t5(), t5_tokenizer(), transformer,
  )


def flux_dev():
  """The shift depends on the size as that of the published one does, at smaller sizes."""
  return flux(
    True, shift=3.0, use_dynamic_shifting=True, base_image_seq_len=4, max_image_seq_len=64
  )


def pixart(kind: str, levels: int = 2, **changes):
  transformer = diffusers.PixArtTransformer2DModel(**dict(
    num_attention_heads=3, attention_head_dim=4, in_channels=4, out_channels=8, num_layers=2,
    sample_size=LATENT, cross_attention_dim=12, caption_channels=T5_WIDTH,
  ) | changes)
  scheduler = diffusers.DPMSolverMultistepScheduler(beta_end=0.02, beta_schedule='linear')
  return getattr(diffusers, kind)(
    tokenizer=t5_tokenizer(), text_encoder=t5(), vae=vae(levels), transformer=transformer,
    scheduler=scheduler,
  )


def dit():
  transformer = diffusers.DiTTransformer2DModel(
    num_attention_heads=2, attention_head_dim=4, in_channels=4, out_channels=8, num_layers=2,
    sample_size=LATENT,  # The pipeline guides away from class 1000.
  )
  return diffusers.DiTPipeline(transformer, vae(), diffusers.DDIMScheduler(**DDIM))


PIPELINES = {
  'dit': dit,
  # Told the picture's size, as the pipeline does where sample_size is 128.
  'pixart_alpha': lambda: pixart('PixArtAlphaPipeline', sample_size=128),
  'pixart_sigma': lambda: pixart('PixArtSigmaPipeline'),
  # Of 256 pixels, for which there are bins.
  'pixart_256': lambda: pixart('PixArtSigmaPipeline', 4, sample_size=32),
  'sd3': sd3, 'sd3_without_t5': lambda: sd3(False), 'sd35': sd35, 'flux_dev': flux_dev,
  'flux_schnell': lambda: flux(False),
  'sd1': sd1, 'sd2_v': sd2_v, 'sdxl': sdxl,
  'refiner': refiner, 'lcm': lcm,
  'lcm_xl': lambda: consistent(sdxl(time_cond_proj_dim=6)),
  'inpaint': inpaint, 'edit': edit, 'upscale': upscale,
  'depth': depth, 'controlled': controlled, 'variation': variation,
}


def make(name: str) -> diffusers.DiffusionPipeline:
  """One of PIPELINES, with the same weights each time."""
  torch.manual_seed(0)
  return disturbed(PIPELINES[name]())
