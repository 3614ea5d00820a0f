"""Denoising diffusion probabilistic models (Ho, Jain & Abbeel 2020) on pixels, by caption.

The forward process adds Gaussian noise in T = 1000 steps, x_t = sqrt(1 - beta_t) x_{t-1} +
sqrt(beta_t) z with betas from 1e-4 to 0.02, until nothing of the picture is left. Its marginals are
known, so that training jumps to any step at once:

  Algorithm 1   t uniform, eps ~ N(0, I); minimise |eps - eps_theta(a_t x_0 + s_t eps, t)|^2 with
                a_t = sqrt(prod_s (1 - beta_s)), s_t = sqrt(1 - a_t^2).
  Algorithm 2   from x_T ~ N(0, I): x_{t-1} = (x_t - beta_t / s_t eps_theta(x_t, t)) /
                sqrt(1 - beta_t) + sigma_t z, without z in the last step.

sigma_t^2 is the posterior's, beta_t s_{t-1}^2 / s_t^2 (sampler ddpm), or beta_t (ddpm_large); both
do about as well over 1000 steps. The loss is the bound on -ln p(x_0) with each step's weight left
out, which draws better pictures and codes them worse. `evaluate likelihood` has the bound itself.

The paper's network is a U-Net with attention at 16 x 16, as `ddpm_unconditional` has it in small
and `configs/papers` in full. This one is a transformer of squares of 4 x 4 pixels, which learns the
noise faster on two cores: after 200 steps its loss was 0.070, at 38 GFLOP a step, that of a U-Net
over squares of 2 x 2 was 0.107, at 60. `ddpm_classes` is the same by class. Steps are a
choice of sampling: `--sampler ddpm --steps 1000` is Algorithm 2 as written, `--sampler ddim` (Song,
Meng & Ermon 2021) draws from the same weights in 20 to 100.
"""

from diffusion_jax.configs.base import base
from diffusion_jax.configs.openmoji.quickstart import CAPTIONS
from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  config = base('diffusion')
  config.settings = ConfigDict({
    'space': {'type': 'pixels'},
    'clip': 'asset:clip-openmoji-64',
    'denoiser': {
      'type': 'dit', 'sample_size': 32, 'patch_size': 4, 'in_channels': 3, 'out_channels': 3,
      'num_layers': 5, 'num_attention_heads': 6, 'attention_head_dim': 32,
      'num_embeds_ada_norm': None, 'cross_attention_dim': 128,
      'positions': 'rotary', 'qk_norm': 'rms_norm', 'long_skips': True,
    },
    'schedule': {'beta_schedule': 'linear', 'beta_start': 1e-4, 'beta_end': 0.02},
    'objective': {'prediction': 'epsilon'},
    'caption_dropout': 0.1,
    'cache': True,
    'sample': {'sampler': 'ddpm', 'steps': 50, 'guidance': 2.0, 'threshold': 'static',
               'threshold_limit': 1.0},
    'evaluation': {'features': (), 'metrics': ('fd', 'kid', 'clip_score', 'retrieval')},
    'preview_captions': CAPTIONS,
  })
  config.data.size = 32
  config.optimizer.update({
    'learning_rate': 1.5e-3, 'schedule': 'cosine', 'warmup_steps': 60, 'b2': 0.99,
    'weight_decay': 0.01,
  })
  config.loop.update({
    'total_steps': 1500, 'batch_size': 32, 'ema_halflife_images': 3000.0,
    'checkpoint_every_steps': 250, 'sample_every_steps': 750, 'evaluate_samples': 128,
  })
  return config
