"""Imagen's base model (Saharia et al. 2022), at 16 pixels.

The paper draws a thumbnail from a text and lets two other models enlarge it, 64 to 256 to 1024.
Its text encoder is a frozen T5 that has seen no picture: a larger one helped more than a larger
U-Net. Here 16 is enlarged to 32 and 64 (imagen_32.py, imagen_64.py), and T5 is the one that
openmoji/t5.py trained on the glosses of WordNet.

- The model is of pixels, not of latents. The paper's is a U-Net; here it is the transformer of
  `notes/ddpm` over squares of 2 x 2 pixels: at equal compute transformers followed captions better
  here (`benchmarks/denoisers`).
- The text is dropped for a tenth of the examples (section 2.2), so that one network is both of the
  guidance's.
- Large guidance weights follow the text better and leave [-1, 1], which training never does.
  Dynamic thresholding (section 2.3) clips each estimate at its own percentile and scales it back.
- In the paper: 2 billion parameters, batches of 2,048, 2.5 million steps (section 4.1); MS-COCO
  FID 7.27 without having seen it, with a guidance of 1.35 here and 8 in the stages (table 1).

The cascade is put together by

  python -m diffusion_jax convert --from runs/notes/imagen_base/model \
    --stage runs/notes/imagen_32/model --stage runs/notes/imagen/model \
    --to runs/notes/imagen/cascade --layout cascade
"""

from diffusion_jax.configs.notes import ddpm
from diffusion_jax.configs.openmoji import quickstart
from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  config = quickstart.get_config()
  config.data.size = 16
  for old in ('autoencoder', 'latent_patch_size', 'unet'):
    del config.settings[old]
  config.settings.update({
    'space': {'type': 'pixels'},
    'conditioners': {'text': {'path': 'asset:t5-wordnet', 'length': 48}},
    'denoiser': ddpm.get_config().settings.denoiser,
    'schedule': {'beta_schedule': 'cosine', 'beta_end': 0.999},
    'sample': {
      'sampler': 'dpmpp_2m', 'steps': 20, 'guidance': 4.0, 'threshold': 'dynamic',
      'threshold_percentile': 0.95, 'threshold_limit': 4.0,
    },
  })
  config.settings.denoiser.update({
    'sample_size': 16, 'patch_size': 2, 'cross_attention_dim': 256,
  })
  config.loop.update({'total_steps': 1500, 'sample_every_steps': 750})
  return config
