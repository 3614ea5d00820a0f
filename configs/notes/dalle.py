"""DALL-E (Ramesh et al. 2021): captions, then pictures, as one sequence of tokens.

Two stages. The discrete VAE of `dvae`, whose run this recipe takes, makes 8 x 8 tokens of a picture
of 32 x 32 pixels. A transformer then learns the joint distribution of the caption's tokens and the
picture's, each predicted from all before it; the two cross-entropies are weighted 1/8 and 7/8
(section 2.2). Sampling writes the caption and draws the picture's tokens one by one, keys and
values kept; `--candidates N` draws N pictures and CLIP keeps the one most like the caption (section
2.6; the paper draws 512). That flatters scores by the same CLIP, so that here it is one unless
asked for. Guidance on logits came later (Make-A-Scene, Gafni et al. 2022): a tenth of the captions
is left out in training for it.

The paper: 12 billion parameters, 64 layers of width 3968, 256 text tokens of 16,384 and 32 x 32
image tokens of 8192, 250 million pairs, 430,000 steps of 1024; FID about 28 on MS-COCO without
having seen it (Ramesh et al. 2022, table 2). Its attention is sparse (by row, column, convolution);
88 tokens need no such thing.
"""

from diffusion_jax.configs.base import base
from diffusion_jax.configs.openmoji.quickstart import CAPTIONS
from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  config = base('image_tokens')
  config.data.size = 32
  config.data.transforms = (
    ('choose_caption', {}), ('tokenize', {}), ('random_flip', {}), ('normalize', {}),
  )
  config.settings = ConfigDict({
    'autoencoder': 'runs/notes/dvae/model',
    'clip': 'asset:clip-openmoji-64',
    'transformer': {
      'hidden_size': 192, 'num_hidden_layers': 6, 'num_attention_heads': 6,
      'intermediate_size': 768,
    },
    'text_weight': 0.125, 'caption_dropout': 0.1,
    'sample': {'guidance': 3.0, 'top_p': 0.95, 'candidates': 1},
    'preview_captions': CAPTIONS,
  })
  config.optimizer.update({
    'learning_rate': 1e-3, 'schedule': 'cosine', 'warmup_steps': 100, 'b2': 0.96,
    'weight_decay': 0.045,
  })
  config.loop.update({
    'total_steps': 1000, 'batch_size': 16, 'ema_halflife_images': 2000.0,
    'checkpoint_every_steps': 250, 'sample_every_steps': 500, 'evaluate_samples': 128,
  })
  return config
