"""DALL-E 2 (Ramesh et al. 2022): a prior says what CLIP would see, a decoder draws it.

P(picture | caption) = P(picture | embedding) P(embedding | caption). The prior is a diffusion model
of the 128 numbers of CLIP's embedding of a picture: a causal transformer reads the caption, CLIP's
embedding of it, the time and the noised embedding, and a last token becomes the estimate of the
clean one, with a squared error (section 2.2). It takes the run of `dalle2_decoder`; the model that
it writes is both. Between the embeddings of two pictures or prompts lie others (section 3.2):

  python -m diffusion_jax sample --model runs/notes/dalle2_prior/model --prompt 'cat face' \
    --image cat.png --to dog.png --interpolate 9 --out strip

The paper: 1 billion parameters, 1000 steps of a cosine schedule and 64 of sampling for the prior of
a ViT-H/16's embeddings of 1024 numbers, of two drawn the better (table 3, section 2.2); FID 10.39
on MS-COCO without having seen it (table 2).
"""

from diffusion_jax.configs.notes import dalle2_decoder
from diffusion_jax.configs.openmoji.quickstart import CAPTIONS
from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  config = dalle2_decoder.get_config()
  config.task = 'prior'
  clip = 'asset:clip-openmoji-64'
  config.settings.decoder = 'runs/notes/dalle2_decoder/model'
  config.settings.space = ConfigDict({'type': 'embeddings', 'clip': clip, 'scale': 1.0})
  config.settings.conditioners = ConfigDict({'text': {'path': clip, 'pooled': True}})
  config.settings.denoiser = ConfigDict({
    'type': 'prior', 'num_attention_heads': 4, 'attention_head_dim': 48, 'num_layers': 4,
    'embedding_dim': 128, 'num_embeddings': 24,
  })
  config.data.transforms = ()
  config.settings.cache = True
  config.settings.objective = ConfigDict({'prediction': 'sample'})
  config.settings.sample = ConfigDict({'sampler': 'ddim', 'steps': 25, 'guidance': 2.0})
  config.optimizer.learning_rate = 1e-3
  config.settings.preview_captions = CAPTIONS
  config.loop.update({'total_steps': 1500, 'batch_size': 64, 'evaluate_samples': 128})
  return config
