"""The error of bfloat16 for each family of networks, beside PyTorch on the same weights.

Each network is made by its reference library with random weights, at a fraction of its published
width. The figure is the root-mean-square difference of the bfloat16 output from the float32 output,
as a share of that output's own: ours computing in bfloat16 with float32 parameters (as training
does), ours all in bfloat16, and the reference cast to bfloat16.

  python benchmarks/half_precision.py --json FILE
"""

import argparse
import copy
import json
import platform
import tempfile
from pathlib import Path

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers

from diffusion_jax import __version__
from diffusion_jax.formats.networks import load_params, network_format
from diffusion_jax.types import Condition

CROSS, PLAIN, UP_CROSS, UP_PLAIN = (
  'CrossAttnDownBlock2D', 'DownBlock2D', 'CrossAttnUpBlock2D', 'UpBlock2D'
)
TOWER = dict(hidden_size=256, intermediate_size=1024, num_hidden_layers=12, num_attention_heads=4)


def unet(**changes):
  """A U-Net and its input, at a fifth of Stable Diffusion's width."""
  config = dict(
    block_out_channels=(64, 128, 256, 256), attention_head_dim=4, cross_attention_dim=256,
    down_block_types=(CROSS, CROSS, CROSS, PLAIN), up_block_types=(UP_PLAIN, *[UP_CROSS] * 3),
  )
  return diffusers.UNet2DConditionModel(**config | changes)


def references() -> dict:
  """Name -> (kind, reference network, its call, our call), on inputs of a fixed seed."""
  rng = np.random.default_rng(0)
  normal = lambda *shape: rng.normal(size=shape).astype(np.float32)
  x, t, text, image = normal(2, 32, 32, 4), np.array([50, 700]), normal(2, 77, 256), normal(
    1, 64, 64, 3)
  pooled, sizes = normal(2, 64), np.full((2, 6), 512.0, np.float32)
  ids = rng.integers(3, 900, (2, 77))
  nchw = lambda a: torch.tensor(a.transpose(0, 3, 1, 2))
  with_unet = lambda m, d: m(nchw(x).to(d), torch.tensor(t), torch.tensor(text).to(d)).sample
  added = lambda d: {'text_embeds': torch.tensor(pooled).to(d), 'time_ids': torch.tensor(sizes)}
  sdxl = unet(
    block_out_channels=(64, 128, 256), down_block_types=(PLAIN, CROSS, CROSS),
    up_block_types=(UP_CROSS, UP_CROSS, UP_PLAIN), attention_head_dim=(1, 2, 4),
    transformer_layers_per_block=(1, 2, 10), use_linear_projection=True,
    addition_embed_type='text_time', addition_time_embed_dim=32,
    projection_class_embeddings_input_dim=64 + 6 * 32,
  )
  vae = diffusers.AutoencoderKL(
    block_out_channels=(32, 64, 128, 128), layers_per_block=2, latent_channels=4,
    down_block_types=['DownEncoderBlock2D'] * 4, up_block_types=['UpDecoderBlock2D'] * 4,
  )
  clip = transformers.CLIPTextModel(transformers.CLIPTextConfig(**TOWER, vocab_size=1000))
  t5 = transformers.T5EncoderModel(transformers.T5Config(
    vocab_size=1000, d_model=256, d_kv=64, d_ff=640, num_layers=12, num_heads=4,
    feed_forward_proj='gated-gelu', tie_word_embeddings=False,
  ))
  dit = diffusers.DiTTransformer2DModel(
    num_attention_heads=4, attention_head_dim=64, num_layers=12, sample_size=32,
  )
  return {
    'U-Net, SD1': ('unet', unet(), with_unet, lambda m: m(x, t, Condition(text))),
    'U-Net, SDXL': (
      'unet', sdxl, lambda m, d: m(nchw(x).to(d), torch.tensor(t), torch.tensor(text).to(d),
                                   added_cond_kwargs=added(d)).sample,
      lambda m: m(x, t, Condition(text, pooled, sizes)),
    ),
    'autoencoder, encoding': (
      'autoencoder', vae, lambda m, d: m.encode(nchw(image).to(d)).latent_dist.mean,
      lambda m: m.encode(image)[0],
    ),
    'autoencoder, decoding': (
      'autoencoder', vae, lambda m, d: m.decode(nchw(x[:1]).to(d)).sample, lambda m: m.decode(x[:1])
    ),
    'CLIP, text': (
      'clip_text', clip, lambda m, d: m(torch.tensor(ids)).last_hidden_state,
      lambda m: m.encode_text(ids)[0],
    ),
    'T5': ('t5', t5, lambda m, d: m(torch.tensor(ids)).last_hidden_state,
           lambda m: m.encode_text(ids)[0]),
    'DiT': (
      'dit', dit, lambda m, d: m(nchw(x).to(d), timestep=torch.tensor(t),
                                 class_labels=torch.tensor([1, 2])).sample,
      lambda m: m(x, t, Condition(labels=jnp.array([1, 2]))),
    ),
  }


def share(found, wanted) -> float:
  """RMS of the difference over RMS of what is wanted."""
  found, wanted = (np.asarray(a, np.float64) for a in (found, wanted))
  return float(np.sqrt(np.square(found - wanted).mean() / np.square(wanted).mean()))


def measure(kind: str, model, theirs, ours) -> dict[str, float]:
  """The figures of one network."""
  with torch.no_grad():
    for parameter in model.parameters():
      parameter.add_(0.01 * torch.randn_like(parameter))
    model.eval()
    with tempfile.TemporaryDirectory() as folder:
      model.save_pretrained(folder)
      config, params = load_params(kind, folder)
    run = lambda dtype, cast: np.asarray(jax.jit(
      lambda p: ours(network_format(kind).network(config, dtype=dtype).bind(p))
    )(jax.tree.map(lambda p: jnp.asarray(p, cast), params)).astype(jnp.float32))
    exact = run(jnp.float32, jnp.float32)
    theirs_exact = theirs(model, torch.float32)
    half = theirs(copy.deepcopy(model).to(torch.bfloat16), torch.bfloat16).float()
  arrange = lambda a: a.numpy().transpose(0, 2, 3, 1) if a.ndim == 4 else a.numpy()
  return {
    'float32_from_torch': share(exact, arrange(theirs_exact)),
    'computed_in_bfloat16': share(run(jnp.bfloat16, jnp.float32), exact),
    'all_bfloat16': share(run(jnp.bfloat16, jnp.bfloat16), exact),
    'torch_bfloat16': share(arrange(half), arrange(theirs_exact)),
  }


def main() -> None:
  """Measures, prints, writes."""
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--json', metavar='FILE', help='where the figures go')
  args = parser.parse_args()
  torch.manual_seed(0)
  figures = {}
  for name, parts in references().items():
    figures[name] = measure(*parts)
    print(f'{name:24}' + ''.join(f'{k} {v:.2e}  ' for k, v in figures[name].items()), flush=True)
  if args.json:
    Path(args.json).write_text(json.dumps({
      'device': f'{jax.devices()[0].device_kind} ({platform.machine()})',
      'command': 'python benchmarks/half_precision.py --json FILE',
      'versions': {'diffusion_jax': __version__, 'jax': jax.__version__,
                   'torch': torch.__version__, 'diffusers': diffusers.__version__},
      'relative_rms': figures,
    }, indent=2) + '\n')


if __name__ == '__main__':
  main()
