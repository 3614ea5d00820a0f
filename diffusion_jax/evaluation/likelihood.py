"""Bits per dimension of test images under a text-to-image model, given their captions.

The density is that of the scaled latents which the U-Net sees, at one sample of the autoencoder's
posterior per image, as in training. Three figures of the same model, without guidance, as a guided
denoiser has no density: the variational bound over the steps of the model's schedule, the bound in
continuous time, and the probability-flow ODE. The noise of a table of T steps never gets smaller
than at its first one, t = 1 / T, so all three begin there, at alpha x_0 + sigma eps, and give x_0
the density N(x / alpha, sigma^2 / alpha^2) around what is generated: upper bounds in expectation on
-log2 p(x_0), and for an ideal network the density of latents blurred by sigma / alpha.

The bits of the pixels are bounded by them together with the autoencoder (Kingma & Welling 2014,
eq. 3): -log P(image) <= E_q(z | image)[-log P(image | z) + log q(z | image) - log p(z)].
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from diffusion_jax.backend.xla import jit
from diffusion_jax.diffusion.bounds import (
  continuous_bound,
  discrete_bound,
  discretized_gaussian,
  gaussian_bits,
  gaussian_log_density,
)
from diffusion_jax.diffusion.denoiser import Denoiser
from diffusion_jax.diffusion.likelihood import flow_likelihood, unit_noise
from diffusion_jax.diffusion.losses import total
from diffusion_jax.diffusion.noise import NoiseSchedule
from diffusion_jax.errors import UserError
from diffusion_jax.evaluation.generated import fresh_weights
from diffusion_jax.evaluation.images import shuffled
from diffusion_jax.evaluation.metrics.images import DISCRETE_BITS
from diffusion_jax.evaluation.options import LikelihoodConfig
from diffusion_jax.limits import check_seed
from diffusion_jax.parallel.mesh import in_batches
from diffusion_jax.pipelines.model import Diffusion
from diffusion_jax.pipelines.spaces import AUTOENCODER, LatentSpace
from diffusion_jax.pixels import to_float
from diffusion_jax.types import Latents, PerExample, Record, Source, Weights

FIGURES = ('discrete', 'continuous', 'flow')
MINIMUM = 2
TRAIN_LIMIT = 1024


def latent_bits(
  denoise: Denoiser, noise: NoiseSchedule, x0: Latents, keys: jax.Array, config: LikelihoodConfig,
  offset: float | jax.Array = 0.5, figures: Sequence[str] = FIGURES,
) -> dict[str, PerExample]:
  """By name, those of FIGURES: bits per dimension [b] of latents x0 [b h w c].

  Args:
    keys: [b], one per example; the figures share their noise.
    offset: of `discrete_bound`.
  """
  process = noise.smooth_process
  draws = {'draws': config.draws, 'offset': offset}
  compute = {
    'discrete': lambda: discrete_bound(denoise, x0, *noise.levels(), keys, **draws).total,
    'continuous': lambda: continuous_bound(denoise, x0, process, keys, t_min=0.0, **draws).total,
    'flow': lambda: flow_likelihood(
      denoise, x0, process, keys, trace=config.trace, probes=config.probes, solver=config.solver,
      steps=config.ode_steps, t_min=0.0, start_noise=True,
    ).bits,
  }
  return {name: compute[name]() for name in figures}


def image_keys(key: jax.Array, count: int) -> np.ndarray:
  """Key data, one row for each of `count` images."""
  keys = jax.vmap(partial(jax.random.fold_in, key))(jnp.arange(count))
  return np.asarray(jax.random.key_data(keys))


def make_encoder(model: Diffusion) -> Callable:
  """((autoencoder, decoder variance []), uint8 images [b h w 3], key data [b k]) -> a dictionary.

  'latents' [b h w c], scaled, sampled; 'log_q' [b], their log-density in nats; 'decoder' [b],
  -log P(image | latents) in nats, by a Gaussian of that variance in the bins of the 256 levels;
  'error' [b], mean squared error of the decoded image.
  """
  space = model.space
  if not isinstance(space, LatentSpace):
    raise UserError('the likelihood of an image is measured through latents; the model has none.')
  scale = space.autoencoder.config.scaling_factor

  @jit
  def encode(params, images, keys):
    autoencoder, variance = params
    weights, x = {AUTOENCODER: autoencoder}, to_float(images)
    moments = space.autoencoder.bind(autoencoder).encode(x)
    mean, logvar = (part.astype(jnp.float32) for part in moments)
    eps = unit_noise(jax.random.wrap_key_data(keys), 0, mean)
    latents = space.scaled(mean + jnp.exp(logvar / 2) * eps)
    output = space.decode(weights, latents)
    return {
      'latents': latents,
      'log_q': total(gaussian_log_density(eps, 0.0, 0.0) - logvar / 2 - jnp.log(scale)),
      'decoder': -total(discretized_gaussian(x, output, jnp.log(variance))),
      'error': ((x - output) ** 2).mean(axis=(1, 2, 3)),
    }

  return encode


def make_scorer(
  model: Diffusion, names: Sequence[str], config: LikelihoodConfig, offset: jax.Array,
  figures: Sequence[str] = FIGURES,
) -> Callable:
  """(weights, latents [b h w c], key data [b k], columns) -> what `latent_bits` returns.

  The columns are those of `Diffusion.rows` with these names.
  """

  @jit
  def score(weights: Weights, latents, keys, *columns):
    told = model.condition(weights, dict(zip(names, columns, strict=True)))
    denoise = model.denoise(weights)
    given = lambda x, alpha, sigma: denoise(x, alpha, sigma, told)
    keys = jax.random.wrap_key_data(keys)
    return latent_bits(given, model.noise, latents, keys, config, offset, figures)

  return score


def discrete_bits(
  model: Diffusion, records: Sequence[Record], *, draws: int, seed: int, mesh: Mesh,
  batch_size: int = 16,
) -> Callable[[Weights, range], dict[str, np.ndarray]]:
  """A function of weights and a range of records: their latent_bits_per_dim_discrete, [n].

  The figure of `evaluate_likelihood` for the same records, seed and draws.
  """
  _, key_latents, key_noise, key_offset = jax.random.split(jax.random.key(check_seed(seed)), 4)
  keys = [image_keys(key, len(records)) for key in (key_latents, key_noise)]
  config, offset = LikelihoodConfig(draws=draws), jax.random.uniform(key_offset)
  given = model.rows([record['captions'][0] for record in records])
  encode = make_encoder(model)
  score = make_scorer(model, tuple(given), config, offset, ('discrete',))
  batches = partial(_over_images, mesh=mesh, batch_size=batch_size, label='', progress=False)

  def bits(weights: Weights, items: range) -> dict[str, np.ndarray]:
    rows = slice(items.start, items.stop)
    known = (weights['autoencoder'], jnp.ones(()))
    latents = batches(encode, known, _images(records[rows]), keys[0][rows])['latents']
    columns = (column[rows] for column in given.values())
    found = batches(score, weights, latents, keys[1][rows], *columns)
    return {DISCRETE_BITS: found['discrete']}

  return bits


def evaluate_likelihood(
  model: Diffusion, weights: Weights, train: Source, test: Source,
  config: LikelihoodConfig, *, samples: int, seed: int, mesh: Mesh, batch_size: int = 16,
  progress: bool = True,
) -> dict[str, dict[str, float]]:
  """Bits per dimension of the first `samples` test images, shuffled as in `job.Evaluation`.

  Columns: 'model'; 'untrained', the same with a fresh denoiser; 'gaussian', a diagonal Gaussian
  fitted to the latents of training images, in closed form and blind to captions. Rows: means over
  images of the three figures of `latent_bits`, and image_bits_per_dim_bound, from the continuous
  one and a decoder whose variance is the mean squared error on those training images; to each row
  its standard error over images. An image's values depend on the seed and its number alone.

  Raises:
    UserError: fewer than 2 samples, or more than there are test images.
  """
  if not MINIMUM <= samples <= len(test):
    raise UserError(
      f'{samples} samples cannot be scored; choose {MINIMUM} to {len(test)}, the number of test '
      'images.'
    )
  root = jax.random.key(check_seed(seed))
  key_train, key_latents, key_noise, key_offset = jax.random.split(root, 4)
  batches = partial(_over_images, mesh=mesh, progress=progress)
  encode, records = make_encoder(model), shuffled(test, samples)
  samples = len(records)
  fitted = _images(shuffled(train, min(TRAIN_LIMIT, len(train))))
  known = batches(encode, (weights['autoencoder'], jnp.ones(())), fitted,
                  image_keys(key_train, len(fitted)), batch_size=64, label='encoding')
  variance = jnp.asarray(known['error'].mean(), jnp.float32)
  given = batches(encode, (weights['autoencoder'], variance), _images(records),
                  image_keys(key_latents, samples), batch_size=64, label='encoding')
  told = model.rows([record['captions'][0] for record in records])
  score = make_scorer(model, tuple(told), config, jax.random.uniform(key_offset))
  rows = (given['latents'], image_keys(key_noise, samples), *told.values())
  columns = {
    name: batches(score, params, *rows, batch_size=min(batch_size, samples), label=name)
    for name, params in {'model': weights, 'untrained': fresh_weights(model, weights, mesh)}.items()
  }
  moments = known['latents'].mean(axis=0), known['latents'].var(axis=0)
  columns['gaussian'] = gaussian_bits(given['latents'], *moments, *model.noise.levels())
  settings = {
    'samples': samples, 'training_images': len(fitted), 'seed': seed,
    'latent_dims': int(given['latents'][0].size),
    'latent_blur_std': float(np.divide(*(part[0] for part in reversed(model.noise.levels())))),
    'decoder_std_in_levels': float(127.5 * np.sqrt(variance)), **dataclasses.asdict(config),
  }
  pixels = int(np.prod(records[0]['image'].shape))
  return {name: _rows(bits, given, pixels) for name, bits in columns.items()} | {
    'settings': settings
  }


def _images(records: list) -> np.ndarray:
  return np.stack([record['image'] for record in records])


def _over_images(function, params, *arrays, mesh, batch_size, label, progress) -> dict:
  """function(params, *arrays) over the mesh, its dictionaries joined."""
  with tqdm(total=len(arrays[0]), desc=label, disable=not progress, leave=False) as bar:
    parts = []
    for part in in_batches(function, params, *arrays, mesh=mesh, batch_size=batch_size):
      parts.append(part)
      bar.update(len(next(iter(part.values()))))
  return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _rows(bits: dict[str, np.ndarray], given: dict, pixels: int) -> dict[str, float]:
  """Means and standard errors over images of bits per latent, and of the bound per pixel value."""
  per_image = {f'latent_bits_per_dim_{name}': bits[name] for name in FIGURES}
  latents = bits['continuous'] * given['latents'][0].size
  autoencoder = (given['decoder'] + given['log_q']) / np.log(2)
  per_image['image_bits_per_dim_bound'] = (latents + autoencoder) / pixels
  rows = {}
  for name, value in per_image.items():
    value = np.asarray(value, np.float64)
    rows[name] = float(value.mean())
    rows[f'{name}_stderr'] = float(value.std(ddof=1) / len(value) ** 0.5)
  return rows
