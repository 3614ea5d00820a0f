"""Our side of benchmarks/peers.py: the training step and the sampler as users run them."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from benchmarks.timing import compile_twice, cpu_cores
from diffusion_jax import __version__
from diffusion_jax.backend.xla import jit
from diffusion_jax.diffusion.denoiser import classifier_free, make_denoiser
from diffusion_jax.diffusion.noise import Schedule, ScheduleConfig
from diffusion_jax.diffusion.parameterization import Parameterization
from diffusion_jax.diffusion.samplers import sampler, sampling_grid
from diffusion_jax.formats.published import published_name, to_published_layout
from diffusion_jax.formats.unet import UNETS
from diffusion_jax.models.network import Network
from diffusion_jax.models.unet import UNet, UNetConfig
from diffusion_jax.parallel.mesh import MeshConfig, make_mesh, put_batch, put_params
from diffusion_jax.planning.flops import count_flops
from diffusion_jax.train.compile import compile_step
from diffusion_jax.train.meter import mean_metric
from diffusion_jax.train.optimizer import OptimizerConfig, make_optimizer
from diffusion_jax.train.state import abstract_state, initializer
from diffusion_jax.train.step import make_step
from diffusion_jax.train.tasks.task import Task
from diffusion_jax.types import Condition

LEARNING_RATE, HALFLIFE = 1e-4, 10_000.0


def facts() -> dict[str, Any]:
  """Return the device and the software."""
  device = jax.devices()[0]
  return {
    'device': {'platform': device.platform, 'kind': device.device_kind, 'cpu_cores': cpu_cores()},
    'versions': {'diffusion_jax': __version__, 'jax': jax.__version__},
  }


class Denoising(Task):
  """The squared error of the U-Net's output on latents, times, texts and noise of the batch."""

  def __init__(self, network: Network):
    self.network = network

  def initialize(self, key):
    return self.network.initialize(key)

  def constrain(self, params, carry):
    return params

  def loss(self, params, frozen, carry, batch, key, step):
    out = self.network.bind(params)(batch['x'], batch['t'], Condition(batch['text']))
    error = jnp.square(out.astype(jnp.float32) - batch['noise']).mean((1, 2, 3))
    return error.mean(), ({'loss': mean_metric(error)}, ())


class Side:
  """The U-Net with its weights, and what is done with it; arrays come and go as numpy, NHWC."""

  def __init__(self, model: str | dict[str, Any], dtype: str):
    """model: the name of a published U-Net, or fields of UNetConfig."""
    self.config = UNETS[model] if isinstance(model, str) else UNetConfig(**model)
    self.network = Network.of(UNet, self.config, dtype=jnp.dtype(dtype))
    self.mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    quick = {'xla_backend_optimization_level': 0}  # It runs once.
    initialize = jax.jit(self.network.initialize, compiler_options=quick)
    self.params = jax.tree.map(np.asarray, initialize(jax.random.key(0)))
    self.compiling: dict[str, Any] = {}

  def describe(self) -> dict[str, Any]:
    """The model's config and number of parameters, and what `compile_twice` has measured."""
    return {
      'config': dataclasses.asdict(self.config), 'compiling': self.compiling,
      'parameters': sum(leaf.size for leaf in self.network.shapes.values()),
    }

  def save(self, path: str) -> None:
    """Write the weights as diffusers names and shapes them."""
    layout = lambda name, x: np.ascontiguousarray(to_published_layout(name, x))
    save_file({published_name(n): layout(n, x) for n, x in self.params.items()}, path)

  def flops(self, batch: dict) -> float:
    """Operations of a training step, by formula."""
    loss = lambda params, x, t, text: self.network.bind(params)(x, t, Condition(text)).sum()
    arrays = (batch[name] for name in ('x', 't', 'text'))
    return count_flops(loss, self.network.shapes, *arrays, trained=0).total

  def output(self, batch: dict) -> np.ndarray:
    """The U-Net's output."""
    run = jit(lambda params, x, t, text: self.network.bind(params)(x, t, Condition(text)))
    out = run(self.params, batch['x'], batch['t'], batch['text'])
    return np.asarray(out, np.float32)

  def _take_params(self) -> dict[str, jax.Array]:
    """The weights on the device; they are kept nowhere else, as in a user's run."""
    params, self.params = self.params, {}
    return put_params(params, self.mesh)

  def stepper(self, batch: dict):
    """A function that makes one training step and returns its loss, when all of it is done."""
    task = Denoising(self.network)
    optimizer = make_optimizer(
      OptimizerConfig(learning_rate=LEARNING_RATE), self.network.shapes, 1000,
      self.mesh.devices.flat[0].platform,
    )
    abstract = abstract_state(task, optimizer, True, self.mesh)
    state = initializer(task, optimizer, 0, abstract)(self._take_params())
    step = make_step(
      task, optimizer, abstract, batch_size=len(batch['x']), ema_halflife_images=HALFLIFE
    )
    batch = put_batch(batch, self.mesh)
    (update, _), self.compiling = compile_twice(lambda: compile_step(step, state, {}, batch))

    def run() -> float:
      nonlocal state
      state, metrics = jax.block_until_ready(update(state, {}, batch))
      return float(metrics['loss'].compute())

    return run

  def drawer(self, noise: np.ndarray, text: np.ndarray, negative: np.ndarray, steps: int,
             guidance: float):
    """A function that draws latents from the noise by DDIM with guidance."""
    schedule = Schedule(ScheduleConfig())
    grid = sampling_grid(schedule, steps, 'trailing')
    keys = jax.random.split(jax.random.key(0), len(noise))

    def draw(params, x, text, negative):
      network = self.network.bind(params)
      denoise = lambda x, alpha, sigma, text: make_denoiser(
        lambda x, t: network(x, t, Condition(text)), Parameterization(), schedule.label
      )(x, alpha, sigma)
      return sampler('ddim')(classifier_free(denoise, text, negative, guidance), x, grid, keys)

    params = self._take_params()
    compiled, self.compiling = compile_twice(
      lambda: jit(draw).lower(params, noise, text, negative).compile()
    )
    return lambda: np.asarray(compiled(params, noise, text, negative))
