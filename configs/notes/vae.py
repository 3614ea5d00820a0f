"""A variational autoencoder that draws (Kingma & Welling 2014), beside diffusion on the same data.

An encoder gives a Gaussian over z, a decoder a Gaussian over pictures, and training minimises

  -ln p(x | z) + KL(q(z | x) || N(0, I)),  z ~ q(z | x),

a bound on -ln p(x). z is one vector of 64 numbers for a picture of 32 x 32 pixels, since places
that are drawn independently of each other would not make one picture. The decoder's variance is
the mean squared error (sigma-VAE, Rybkin et al. 2021), so that nothing weighs the two terms but the
bound itself: the KL counts 64 / 3072 per latent and pixel value. To draw is to decode a z of the
prior, in one call of the network where diffusion takes many; the pictures are blurred as the mean
of a Gaussian is. `evaluate likelihood` has the bound in bits per dimension, and that of importance
sampling (Burda et al. 2016).

The paper: MNIST and Frey faces. On CIFAR-10 the bound of a VAE is 4.51 bits per dimension (van den
Oord et al. 2017, section 4.1), that of DDPM 3.75 (Ho et al. 2020, table 1); hierarchies of latents
go below both (Child 2021).
"""

from diffusion_jax.configs.notes import vq
from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  config = vq.get_config()
  config.task = 'vae'
  config.settings = ConfigDict({
    'autoencoder': {
      'latent_channels': 64, 'block_out_channels': (32, 64, 64, 128, 128, 128),
      'layers_per_block': 1, 'norm_num_groups': 8, 'mid_block_add_attention': False,
    },
    'bottleneck': {'weight': 64 / 3072, 'warmup_steps': 300, 'initial_logvar': -2.0},
    'reconstruction': 'gaussian',
  })
  config.optimizer.learning_rate = 1.5e-3
  config.loop.update({'total_steps': 4000, 'evaluate_samples': 128})
  return config
