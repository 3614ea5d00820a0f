"""VQ-VAE (van den Oord et al. 2017; Razavi et al. 2019): 32 x 32 pixels <-> 8 x 8 codes of 512.

The latent at each place is replaced by the nearest of a set of code vectors, and the gradient is
passed on as if it had not been (eq. 1-2). The set follows the latents by an exponential moving
average of decay 0.99 (appendix A.1), and the encoder pays 0.25 times its distance from the codes
(eq. 3). Sets learned so tend to collapse: most codes are never nearest to anything. Codes that fall
into disuse are therefore put in the place of latents of the batch (random restarts, Dhariwal et al.
2020). The log has the fraction of the codes that a batch uses, the perplexity of their use, and how
many were revived; the scores have the same of the test images.

The paper: 128 x 128 pixels of ImageNet <-> 32 x 32 codes of 512 (section 4.2), at most 4.67 bits
per dimension of CIFAR-10 (section 4.1). Parti and MaskGIT stand on such codes.
"""

from diffusion_jax.configs.openmoji import autoencoder
from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  config = autoencoder.get_config()
  config.data.size = 32
  config.settings = ConfigDict({
    'autoencoder': {
      'latent_channels': 16, 'block_out_channels': (32, 64, 64), 'layers_per_block': 1,
      'norm_num_groups': 8, 'mid_block_add_attention': False,
    },
    'bottleneck': {'type': 'vq', 'codes': 512, 'decay': 0.99, 'commitment': 0.25},
    'reconstruction': 'l2', 'adversarial_weight': 0.0,
  })
  config.loop.update({'total_steps': 1000, 'batch_size': 16, 'checkpoint_every_steps': 250})
  return config
