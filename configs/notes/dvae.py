"""The discrete VAE of DALL-E (Ramesh et al. 2021, section 2.1): the tokens of its pictures.

The encoder gives a distribution over 256 codes at each of 8 x 8 places; training draws from it by
the Gumbel-softmax relaxation, whose temperature falls from 1 to 1/16, so that mixtures of codes
become codes; afterwards the likeliest code stands. The KL divergence from the uniform distribution
makes codes be used alike. Per place and beside a mean squared error of 0.1 a value, the paper's 6.6
comes to about 3e-3. With 1e-4, and first logits far below the Gumbel noise, the codes' perplexity
was 8 after 1000 steps; so it is 33.

The paper: 256 x 256 pixels <-> 32 x 32 codes of 8192, 3,000,000 steps of 512 pictures on 64 V100,
temperature 1 to 1/16 within 150,000 steps, KL weight 0 to 6.6 within 5000 (appendix A.2). It
reconstructs by the logit-Laplace likelihood and its network is a plain residual one; here it is
the squared error and the network of the other autoencoders, so that the three can be compared.
"""

from diffusion_jax.configs.notes import vq
from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  config = vq.get_config()
  config.settings.autoencoder.latent_channels = 64
  config.settings.bottleneck = ConfigDict({
    'type': 'gumbel', 'codes': 256, 'code_channels': 64, 'temperature': 1.0,
    'final_temperature': 0.0625, 'temperature_steps': 750, 'weight': 2e-3, 'warmup_steps': 50,
  })
  config.optimizer.learning_rate = 2e-3
  return config
