"""Speed of drawing pictures, and of the networks that come before training: encoders."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.timing import peak_memory, quartiles, repeat, utilisation
from benchmarks.training import Counts
from diffusion_jax.data.cache import moments_encoder
from diffusion_jax.diffusion.samplers import sampler
from diffusion_jax.errors import UserError
from diffusion_jax.parallel.mesh import in_batches
from diffusion_jax.pipelines.model import Diffusion
from diffusion_jax.pipelines.sampling import SampleConfig
from diffusion_jax.planning.flops import Flops, count_flops
from diffusion_jax.registry import TASKS, load
from diffusion_jax.train.tasks.diffusion_settings import SharedConfig
from diffusion_jax.train.training import Training
from diffusion_jax.types import Weights


def check(config: dict[str, Any], what: str) -> None:
  """Raise UserError for a config of a model that does not sample from prompts alone."""
  settings = config['settings']
  if not issubclass(load(TASKS, config['task']).Config, SharedConfig):
    raise UserError(
      f'{what} is of models that sample from prompts, and this config trains {config["task"]}; '
      'use train or data.'
    )
  if what == 'sample' and (
    settings.get('train') == 'controlnet' or settings.get('inputs', 'none') != 'none'
  ):
    raise UserError('sample is of models that are conditioned on a prompt alone; use train.')


def measure_sampling(training: Training, counts: Counts, batch_size: int) -> dict[str, Any]:
  """Pictures by the run's own sampler, from prompts to pixels, with weights that begin a run."""
  task, mesh = training.task, training.mesh
  model, config = task.model, task.config.sample
  params = task.beginning(mesh, jax.random.key(0))
  weights = model.on_mesh(_read(model, task.weights(params, task.frozen)), mesh)
  prompts = [f'picture {index}' for index in range(batch_size)]
  draw = lambda: list(model.generate(
    weights, prompts, config, seed=0, mesh=mesh, batch_size=batch_size
  ))
  first, seconds = repeat(draw, counts.warmup, counts.measured)
  calls, median = count_calls(model, config), quartiles(seconds)['median']
  flops = sampling_flops(model, weights, config, calls, batch_size)
  return {
    'batch_size': batch_size, 'sampler': config.sampler, 'sampler_steps': config.steps,
    'guidance': config.guidance, 'network_calls': calls,
    'batch_seconds': quartiles(seconds), 'batches': len(seconds),
    'seconds_per_image': round(median / batch_size, 6),
    'images_per_second': round(batch_size / median, 3),
    **utilisation(flops, median, mesh, training.config['dtype']),
    'compile': {'cold_seconds': round(first - median, 2)}, 'memory': peak_memory(),
  }


def _read(model: Diffusion, weights: Weights) -> Weights:
  """Return those of the weights of training that sampling reads."""
  return {role: weights[role] for role in model.networks}


def count_calls(model: Diffusion, config: SampleConfig) -> int:
  """Count how often the sampler calls its denoiser, on one that does nothing."""
  calls: list[int] = []

  def denoise(x, alpha, sigma):
    jax.debug.callback(lambda: calls.append(1))
    return alpha * x

  x = jnp.ones((1, 1, 1, model.space.channels))
  keys = jax.random.split(jax.random.key(0), 1)
  run = sampler(config.program.sampler, **dict(config.program.options))
  grid = config.numbers(model.noise).grid
  jax.block_until_ready(jax.jit(lambda: run(denoise, x, grid, keys))())
  jax.effects_barrier()
  return len(calls)


def sampling_flops(
  model: Diffusion, weights: Weights, config: SampleConfig, calls: int, batch_size: int
) -> Flops:
  """Return the operations of a batch: text once, the network so many times, the decoder once."""
  guided = 2 if config.program.guided else 1
  shape = lambda tree: jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), tree)
  weights = shape(weights)
  rows = shape(model.rows([''] * 2 * batch_size))
  told = jax.eval_shape(model.condition, weights, rows)
  told = jax.tree.map(
    lambda a: jax.ShapeDtypeStruct((guided * batch_size, *a.shape[1:]), a.dtype), told
  )
  size = model.space.shape(*model.trained_size)
  latents = lambda n: jax.ShapeDtypeStruct((n, *size), jnp.float32)
  times = jax.ShapeDtypeStruct((guided * batch_size,), jnp.float32)
  network = lambda weights, x, t, told: model.network(weights)(x, t, told)
  return (
    count_flops(model.condition, weights, rows)
    + count_flops(network, weights, latents(guided * batch_size), times, told).times(calls)
    + count_flops(model.space.decode, weights, latents(batch_size))
  )


def measure_encoding(training: Training, counts: Counts, batch_size: int) -> dict[str, Any]:
  """Compute what `settings.cache` does once: moments of latents, one caption an image."""
  task, mesh = training.task, training.mesh
  model, dtype = task.model, training.config['dtype']
  weights = model.on_mesh({r: task.frozen[r] for r in model.networks if r in task.frozen}, mesh)
  edge = max(model.trained_size)
  images = np.random.default_rng(0).integers(0, 256, (batch_size, edge, edge, 3), np.uint8)
  tokens = model.text.tokens([f'picture {index}' for index in range(batch_size)])
  captions = jax.jit(lambda weights, tokens: model.text.encode(weights, {'tokens': tokens}))
  parts = {
    'images': (moments_encoder(model), weights, images),
    'captions': (captions, weights, tokens),
  }
  found, total = {}, 0.0
  for name, (encode, params, rows) in parts.items():
    run = lambda: list(in_batches(encode, params, rows, mesh=mesh, batch_size=batch_size))  # noqa: B023
    first, seconds = repeat(run, counts.warmup, counts.measured)
    times = quartiles(seconds)
    total += times['median']
    found[name] = {
      'batch_seconds': times, 'per_second': round(batch_size / times['median'], 2),
      **utilisation(count_flops(encode, params, rows), times['median'], mesh, dtype),
      'compile': {'cold_seconds': round(first - times['median'], 2)},
    }
  return {
    'batch_size': batch_size, 'images_per_second': round(batch_size / total, 3), **found,
    'memory': peak_memory(),
  }
