"""Bits per dimension of test images under a variational autoencoder (Kingma & Welling 2014, eq. 3).

-log2 P(x) <= E_q(z | x)[-log2 P(x | z) + log2 q(z | x) - log2 p(z)]. P(x | z) is a Gaussian's mass
in the bins of the 256 levels, whose variance is the mean squared error on training images (Rybkin
et al. 2021, section 3.2). The importance-weighted bound of k samples is tighter (Burda et al. 2016,
eq. 8).
"""

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from diffusion_jax.backend.xla import jit
from diffusion_jax.diffusion.bounds import discretized_gaussian, gaussian_log_density
from diffusion_jax.diffusion.losses import total
from diffusion_jax.evaluation.evaluator import EVALUATE, Cached, Value, named, seed_of
from diffusion_jax.evaluation.generated import fresh_weights
from diffusion_jax.evaluation.images import shuffled
from diffusion_jax.evaluation.likelihood import (
  TRAIN_LIMIT,
  check_count,
  image_keys,
  images_of,
  over_images,
)
from diffusion_jax.pipelines.spaces import AUTOENCODER
from diffusion_jax.pipelines.vae import VAE
from diffusion_jax.pixels import to_float
from diffusion_jax.types import Source, Weights

FIRST = 'model'


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Elbo(Cached):
  """Means over the first `samples` test images, in the order of `shuffled`, with standard errors.

  elbo_bits_per_dim, of which kl_bits_per_dim is the divergence's share, and
  importance_bits_per_dim, by `draws` samples of each. 'untrained' is a fresh network.
  """

  train: Source
  test: Source
  mesh: Mesh
  samples: int = 64
  draws: int = 32
  batch_size: int = 16
  baselines: bool = True
  name = 'elbo'
  when = EVALUATE

  def run(self, model: VAE, params: Weights, key: jax.Array) -> Iterator[tuple[str, Value]]:
    count = self.samples
    check_count(count, len(self.test))
    key_train, key_test = jax.random.split(jax.random.key(seed_of(key)))
    score = self.once('elbo', lambda: make_elbo(model, self.draws))
    records = shuffled(self.test, count)
    fitted = images_of(shuffled(self.train, min(TRAIN_LIMIT, len(self.train))))
    batches = partial(over_images, mesh=self.mesh, batch_size=self.batch_size)

    def rows(weights: Weights) -> tuple[dict[str, float], float]:
      known = batches(
        score, (weights, jnp.ones(())), fitted, image_keys(key_train, len(fitted)), label='encoding'
      )
      variance = jnp.asarray(known['error'].mean(), jnp.float32)
      found = batches(
        score, (weights, variance), images_of(records), image_keys(key_test, count), label='bound'
      )
      del found['error']
      out = {}
      for name, value in found.items():
        value = np.asarray(value, np.float64)
        out[name] = float(value.mean())
        out[f'{name}_stderr'] = float(value.std(ddof=1) / count**0.5)
      return out, float(variance)

    own, variance = rows(params)
    yield from named({FIRST: own})
    if self.baselines:
      yield from named({'untrained': rows(fresh_weights(model, params, self.mesh))[0]})
    yield 'settings', {
      'samples': count, 'training_images': len(fitted), 'draws': self.draws,
      'seed': seed_of(key), 'latent_dims': int(np.prod(model.shape)),
      'decoder_std_in_levels': float(127.5 * np.sqrt(variance)),
    }


def make_elbo(model: VAE, draws: int) -> Callable:
  """((weights, decoder variance []), uint8 images [b h w 3], key data [b k]) -> arrays [b] by name.

  Bits per dimension as of `Elbo`; 'error': mean squared error of the images of one sample of z.
  """

  @jit
  def score(params, images, keys):
    weights, variance = params
    network, x = model.autoencoder.bind(weights[AUTOENCODER]), to_float(images)
    mean, logvar = (part.astype(jnp.float32) for part in network.encode(x))
    keys = jax.random.wrap_key_data(keys)

    def one(number: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
      """Return (ln P(x | z) [b], ln q(z | x) - ln p(z) [b], squared error [b]) of a sample."""
      own = jax.vmap(lambda key: jax.random.fold_in(key, number))(keys)
      eps = jax.vmap(lambda key: jax.random.normal(key, mean.shape[1:]))(own)
      z = mean + jnp.exp(logvar / 2) * eps
      output = jnp.clip(network.decode(z).astype(jnp.float32), -1, 1)
      log_q = total(gaussian_log_density(eps, 0.0, 0.0) - logvar / 2)
      log_p = total(gaussian_log_density(z, 0.0, 0.0))
      decoder = total(discretized_gaussian(x, output, jnp.log(variance)))
      return decoder, log_q - log_p, ((x - output) ** 2).mean((1, 2, 3))

    decoder, ratio, error = jax.lax.map(one, jnp.arange(draws))
    kl = total(0.5 * (mean**2 + jnp.exp(logvar) - 1 - logvar))
    weighted = jax.nn.logsumexp(decoder - ratio, axis=0) - jnp.log(draws)
    bits = jnp.log(2) * x[0].size
    return {
      'elbo_bits_per_dim': (kl - decoder.mean(0)) / bits, 'kl_bits_per_dim': kl / bits,
      'importance_bits_per_dim': -weighted / bits, 'error': error.mean(0),
    }

  return score
