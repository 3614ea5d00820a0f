"""Bits per dimension of test images under a text-to-image model, given their captions.

The density is that of the denoiser's scaled latents, one posterior sample of the autoencoder per
image, as in training, without guidance (a guided denoiser has no density). Three estimates: the
bound over the steps of the schedule, the bound in continuous time, and the probability-flow ODE.
All start at the table's first level, t = 1 / T, at alpha x_0 + sigma eps, and give x_0 the density
N(x / alpha, sigma^2 / alpha^2) around the sample: upper bounds in expectation on -log2 p(x_0), and
for an ideal network the density of latents blurred by sigma / alpha.

With the autoencoder they bound the bits of the pixels (Kingma & Welling 2014, eq. 3): -log P(image)
<= E_q(z | image)[-log P(image | z) + log q(z | image) - log p(z)].
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from diffusion_jax.backend.xla import jit
from diffusion_jax.config import typed
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
from diffusion_jax.evaluation.evaluator import EVALUATE, Cached, Value, named, seed_of
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

ESTIMATES = ('discrete', 'continuous', 'flow')
MINIMUM = 2
TRAIN_LIMIT = 1024


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Likelihood(LikelihoodConfig, Cached):
  """Mean bits per dimension of the first `images` test images, in the order of `shuffled`.

  The three of `latent_bits`, and image_bits_per_dim_bound, from the continuous one and a decoder
  whose variance is its mean squared error on training images; with standard errors over images.
  Baselines: 'untrained', a fresh denoiser, and 'gaussian', a diagonal Gaussian of training latents,
  in closed form, blind to captions. An image's values depend on the seed and its number alone.
  `run` raises a UserError for fewer than 2 images, or more than there are.
  """

  train: Source
  test: Source
  mesh: Mesh
  images: int = 64
  batch_size: int = 16
  baselines: bool = True
  name = 'likelihood'
  when = EVALUATE

  def __post_init__(self):
    typed(LikelihoodConfig, self.settings, 'likelihood.')

  @property
  def settings(self) -> dict:
    """The fields of `LikelihoodConfig`."""
    return {field.name: getattr(self, field.name) for field in dataclasses.fields(LikelihoodConfig)}

  @property
  def metrics(self) -> list[str]:
    """Names of all values of the model."""
    bits = [*(f'latent_bits_per_dim_{name}' for name in ESTIMATES), 'image_bits_per_dim_bound']
    return [name for one in bits for name in (one, f'{one}_stderr')]

  def run(self, model: Diffusion, params: Weights, key: jax.Array) -> Iterator[tuple[str, Value]]:
    check_count(self.images, len(self.test))
    seed, batches = check_seed(seed_of(key)), partial(over_images, mesh=self.mesh)
    key_train, key_latents, key_noise, key_offset = jax.random.split(jax.random.key(seed), 4)
    encode = self.once('encode', lambda: make_encoder(model))
    records = shuffled(self.test, self.images)
    fitted = images_of(shuffled(self.train, min(TRAIN_LIMIT, len(self.train))))
    known = batches(encode, (params[AUTOENCODER], jnp.ones(())), fitted,
                    image_keys(key_train, len(fitted)), batch_size=64, label='encoding')
    variance = jnp.asarray(known['error'].mean(), jnp.float32)
    given = batches(encode, (params[AUTOENCODER], variance), images_of(records),
                    image_keys(key_latents, len(records)), batch_size=64, label='encoding')
    rows = model.rows([record['captions'][0] for record in records])
    score = self.once(f'score {seed}', lambda: make_scorer(
      model, tuple(rows), self, jax.random.uniform(key_offset)
    ))
    bits = lambda label, weights: batches(
      score, weights, given['latents'], image_keys(key_noise, len(records)), *rows.values(),
      batch_size=min(self.batch_size, len(records)), label=label,
    )
    pixels = int(np.prod(records[0]['image'].shape))
    yield from _rows(bits('model', params), given, pixels).items()
    levels = model.noise.levels()
    if self.baselines:
      fresh = bits('untrained', fresh_weights(model, params, self.mesh))
      moments = known['latents'].mean(axis=0), known['latents'].var(axis=0)
      fit = gaussian_bits(given['latents'], *moments, *levels)
      yield from named({
        'untrained': _rows(fresh, given, pixels), 'gaussian': _rows(fit, given, pixels),
      })
    yield 'settings', {
      'samples': len(records), 'training_images': len(fitted), 'seed': seed,
      'latent_dims': int(given['latents'][0].size),
      'latent_blur_std': float(np.divide(*(part[0] for part in reversed(levels)))),
      'decoder_std_in_levels': float(127.5 * np.sqrt(variance)), **self.settings,
    }


def check_count(count: int, available: int) -> None:
  """Raise UserError for fewer than 2 images, or more than there are."""
  if not MINIMUM <= count <= available:
    raise UserError(
      f'{count} samples cannot be scored; choose {MINIMUM} to {available}, the number of test '
      'images.'
    )


def latent_bits(
  denoise: Denoiser, noise: NoiseSchedule, x0: Latents, keys: jax.Array, config: LikelihoodConfig,
  offset: float | jax.Array = 0.5, estimates: Sequence[str] = ESTIMATES,
) -> dict[str, PerExample]:
  """Bits per dimension [b] of latents x0 [b h w c], by names of ESTIMATES, all of the same noise.

  keys: [b], one per example. offset: of `discrete_bound`.
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
  return {name: compute[name]() for name in estimates}


def image_keys(key: jax.Array, count: int) -> np.ndarray:
  """Return key data, one row for each of `count` images."""
  keys = jax.vmap(partial(jax.random.fold_in, key))(jnp.arange(count))
  return np.asarray(jax.random.key_data(keys))


def make_encoder(model: Diffusion) -> Callable:
  """((autoencoder, decoder variance []), uint8 images [b h w 3], key data [b k]) -> arrays by name.

  'latents' [b h w c], scaled, sampled; 'log_q' [b], their log-density in nats; 'decoder' [b], -log
  P(image | latents) in nats, by a Gaussian of that variance in the bins of the 256 levels; 'error'
  [b], mean squared error of the decoded image.
  """
  space = model.space
  if not isinstance(space, LatentSpace):
    raise UserError(
      'bits per dimension beside other metrics are of latents, and the model has none; evaluate '
      'likelihood has them of pixels.'
    )
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
  estimates: Sequence[str] = ESTIMATES,
) -> Callable:
  """The function (weights, latents [b h w c], key data [b k], columns) -> `latent_bits`.

  columns: those of `Diffusion.rows` with these names.
  """

  @jit
  def score(weights: Weights, latents, keys, *columns):
    condition = model.condition(weights, dict(zip(names, columns, strict=True)))
    denoise = model.denoise(weights)
    given = lambda x, alpha, sigma: denoise(x, alpha, sigma, condition)
    keys = jax.random.wrap_key_data(keys)
    return latent_bits(given, model.noise, latents, keys, config, offset, estimates)

  return score


def discrete_bits(
  model: Diffusion, records: Sequence[Record], *, draws: int, seed: int, mesh: Mesh,
  batch_size: int = 16,
) -> Callable[[Weights, range], dict[str, np.ndarray]]:
  """(weights, range of records) -> their latent_bits_per_dim_discrete [n], as in `Likelihood`."""
  _, key_latents, key_noise, key_offset = jax.random.split(jax.random.key(check_seed(seed)), 4)
  keys = [image_keys(key, len(records)) for key in (key_latents, key_noise)]
  config, offset = LikelihoodConfig(draws=draws), jax.random.uniform(key_offset)
  given = model.rows([record['captions'][0] for record in records])
  encode = make_encoder(model)
  score = make_scorer(model, tuple(given), config, offset, ('discrete',))
  batches = partial(over_images, mesh=mesh, batch_size=batch_size, label='')

  def bits(weights: Weights, items: range) -> dict[str, np.ndarray]:
    rows = slice(items.start, items.stop)
    known = (weights[AUTOENCODER], jnp.ones(()))
    latents = batches(encode, known, images_of(records[rows]), keys[0][rows])['latents']
    columns = (column[rows] for column in given.values())
    found = batches(score, weights, latents, keys[1][rows], *columns)
    return {DISCRETE_BITS: found['discrete']}

  return bits


def images_of(records: list) -> np.ndarray:
  return np.stack([record['image'] for record in records])


def over_images(function, params, *arrays, mesh, batch_size, label) -> dict:
  """Return function(params, *arrays) over the mesh, its dictionaries joined; label: of the bar."""
  hidden = not label or jax.process_index() > 0
  with tqdm(total=len(arrays[0]), desc=label, disable=hidden, leave=False) as bar:
    parts = []
    for part in in_batches(function, params, *arrays, mesh=mesh, batch_size=batch_size):
      parts.append(part)
      bar.update(len(next(iter(part.values()))))
  return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _rows(bits: dict[str, np.ndarray], given: dict, pixels: int) -> dict[str, float]:
  """Return means and standard errors of bits per latent, and of the bound per pixel value."""
  per_image = {f'latent_bits_per_dim_{name}': bits[name] for name in ESTIMATES}
  latents = bits['continuous'] * given['latents'][0].size
  autoencoder = (given['decoder'] + given['log_q']) / np.log(2)
  per_image['image_bits_per_dim_bound'] = (latents + autoencoder) / pixels
  rows = {}
  for name, value in per_image.items():
    value = np.asarray(value, np.float64)
    rows[name] = float(value.mean())
    rows[f'{name}_stderr'] = float(value.std(ddof=1) / len(value) ** 0.5)
  return rows
