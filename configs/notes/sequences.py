"""A transformer on sequences: the denoising task of pictures, where the data are none.

Nothing of DDPM (Ho et al. 2020) or of rectified flow (Liu et al. 2022) is of pictures: z is
noised, and a network says what to take away. Here z is a signal of 128 numbers, and the network the
DiT of pictures (Peebles & Xie 2023), which sees one row of 32 patches with sinusoidal positions.

`autoregressive` is a stationary Gaussian process, x_t = 1.56 x_{t-1} - 0.81 x_{t-2} + noise, whose
covariance and mean periodogram are known exactly (Yule-Walker), so the score `spectrum_error` has a
known answer: the decibels, in the mean over frequencies, by which the drawn signals' power is off.
Its column `real` is what chance alone does to as many true signals. Other data:

  --config.data.dataset=sines                   two sines of random phase, and noise
  --config.data.dataset=outlines                outlines of OpenMoji's drawings, points in the plane
  --config.data.dataset=sequences:FILE.npy      your own, [n length] or [n length channels]

For outlines in_channels and out_channels are 8: a place has two numbers, and a patch four places.
"""

from diffusion_jax.configs.base import base
from ml_collections import ConfigDict

LENGTH, PATCH = 128, 4


def get_config() -> ConfigDict:
  config = base('sequences')
  config.settings = ConfigDict({
    'patch': PATCH,
    'denoiser': {
      'type': 'dit', 'sample_size': LENGTH // PATCH, 'patch_size': 1, 'in_channels': PATCH,
      'out_channels': PATCH, 'num_layers': 4, 'num_attention_heads': 4, 'attention_head_dim': 24,
      'num_embeds_ada_norm': None,
    },
    'schedule': {'process': 'flow'},
    'objective': {'prediction': 'flow_prediction', 'times': 'logit_normal'},
    'sample': {'sampler': 'flow_heun', 'steps': 24, 'guidance': 1.0},
  })
  config.data.update({'dataset': 'autoregressive', 'size': LENGTH, 'prepare': False})
  config.optimizer.update(
    {'learning_rate': 1e-3, 'schedule': 'cosine', 'warmup_steps': 100, 'b2': 0.99}
  )
  config.loop.update({
    'total_steps': 2000, 'batch_size': 64, 'ema_halflife_images': 4000.0, 'log_every_steps': 100,
    'checkpoint_every_steps': 500, 'sample_every_steps': 1000, 'evaluate_samples': 1024,
  })
  return config
