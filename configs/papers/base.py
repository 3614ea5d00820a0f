"""What the recipes of papers share: pixels of pictures that a user brings, at the papers' sizes."""

from diffusion_jax.configs.base import base
from ml_collections import ConfigDict

EMA_HALF_LIFE = 6931.1
"""Steps after which an old weight counts half in an average that keeps 0.9999 of it each step."""


def pixels_base(dataset: str, size: int, batch_size: int) -> ConfigDict:
  """DDPM without a condition: Ho, Jain & Abbeel 2020, appendix B, and its released code.

  dataset: for the user to give, as --config.data.dataset=folder:PATH or any other source. The
  U-Net is left to the recipe. Scores are in the features of the package's CLIP; those of papers
  need the weights of the FID Inception, --config.settings.evaluation.features=... (README.md).
  The papers' dropout, 0.1 within residual blocks on small sets, is left out.
  """
  config = base('diffusion')
  config.data.update({
    'dataset': dataset, 'size': size,
    'transforms': (('random_flip', {}), ('normalize', {})),
  })
  config.settings = ConfigDict({
    'space': {'type': 'pixels'},
    'denoiser': {
      'type': 'unet2d', 'sample_size': size, 'in_channels': 3, 'out_channels': 3,
      'layers_per_block': 2, 'norm_num_groups': 32, 'norm_eps': 1e-6, 'attention_head_dim': None,
      'downsample_padding': 0, 'flip_sin_to_cos': False, 'freq_shift': 1,
    },
    'conditioners': {},
    'schedule': {'beta_schedule': 'linear', 'beta_start': 1e-4, 'beta_end': 0.02},
    'objective': {'prediction': 'epsilon'},
    'sample': {'sampler': 'ddpm_large', 'steps': 1000, 'guidance': 1.0, 'threshold': 'static',
               'threshold_limit': 1.0},
    'evaluation': {'features': (), 'metrics': ('fd', 'kid')},
    'preview_captions': ('',) * 16,
    'export_dtype': 'float32',
  })
  config.optimizer.update({
    'name': 'adam', 'learning_rate': 2e-4, 'warmup_steps': 5000, 'clip_norm': 1.0,
    'weight_decay': 0.0,
  })
  config.loop.update({
    'batch_size': batch_size, 'ema_halflife_images': EMA_HALF_LIFE * batch_size,
    'checkpoint_every_steps': 5000, 'sample_every_steps': 10_000, 'evaluate_samples': 10_000,
    'log_every_steps': 100,
  })
  return config


def levels(count: int, *attended: int) -> dict[str, tuple[str, ...]]:
  """Return the types of a U-Net's blocks, those of some levels, from 0, with attention."""
  down = tuple('AttnDownBlock2D' if i in attended else 'DownBlock2D' for i in range(count))
  up = tuple(name.replace('Down', 'Up') for name in reversed(down))
  return {'down_block_types': down, 'up_block_types': up}
