"""A schedule of diffusers and what we read from its config, drawn side by side in float64.

The network is the dummy of diffusers' own tests, x t / (t + 1) at the timestep that it is told.
"""

import dataclasses
import importlib
import sys
import types
from functools import partial
from unittest import mock

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import torch

from diffusion_jax.diffusion.denoiser import make_denoiser
from diffusion_jax.diffusion.noise import NoiseSchedule
from diffusion_jax.diffusion.parameterization import Parameterization
from diffusion_jax.diffusion.samplers import sampler
from diffusion_jax.formats.scheduler import read_scheduler
from diffusion_jax.pipelines.directory import sample_config

X = np.linspace(-20, 30, 24).reshape(2, 3, 2, 2)
NOISES = np.random.default_rng(0).standard_normal((64, *X.shape))


def scheduler_class(kind):
  """The class; of one that needs torchsde, whose noise is given here, without that package."""
  if kind != 'DPMSolverSDEScheduler':
    return getattr(diffusers, kind)
  name = 'diffusers.schedulers.scheduling_dpmsolver_sde'
  if name not in sys.modules:
    with mock.patch.dict(sys.modules, {'torchsde': types.ModuleType('torchsde')}):
      module = importlib.import_module(name)
    sys.modules[name] = module
  return getattr(sys.modules[name], kind)


def make(kind, config):
  """The scheduler as a config file makes it, which heeds more keys than its arguments."""
  return scheduler_class(kind).from_config({'_class_name': kind, **config})


class Path:
  """A Brownian path in sigma, as `dpmpp_sde` draws it: to the middle of a step, then to its end."""

  def __init__(self, noises):
    self.noises, self.step, self.middle = noises, 0, None

  def __call__(self, start, end):
    start, end, first, second = float(start), float(end), *self.noises[2 * self.step :][:2]
    if self.middle is None:
      self.middle = end
      return torch.tensor(first)
    shared = np.sqrt((start - self.middle) / (start - end))
    self.step, self.middle = self.step + 1, None
    return torch.tensor(shared * first + np.sqrt(1 - shared**2) * second)


TOKENS = 1000
"""Of the image that is drawn, where noise levels depend on its size."""


def by_size(scheduler):
  """What the pipelines of diffusers hand a scheduler with dynamic shifting."""
  config = scheduler.config
  if not config.get('use_dynamic_shifting'):
    return {}
  slope = (config.max_shift - config.base_shift) / (
    config.max_image_seq_len - config.base_image_seq_len
  )
  return {'mu': config.base_shift + slope * (TOKENS - config.base_image_seq_len)}


def theirs(kind, config, steps, x=X, noises=NOISES, first=0):
  """States [m ...] after every call of the network, of a scheduler that computes in float64.

  first: how many steps are left out, as of a picture to start from; x is then noised already.
  """
  before = torch.get_default_dtype()
  torch.set_default_dtype(torch.float64)
  given = iter(torch.tensor(noises))
  draw = lambda *_, **__: next(given)
  try:
    with mock.patch.object(torch, 'float32', torch.float64), mock.patch.object(
      np, 'float32', np.float64
    ):
      scheduler = make(kind, config)
      scheduler.set_timesteps(steps, **by_size(scheduler))
      if kind == 'DPMSolverSDEScheduler':
        scheduler.noise_sampler = Path(noises)
      x, states = torch.tensor(x.copy()), []
      if not first:
        x = x * getattr(scheduler, 'init_noise_sigma', 1.0)
      module = sys.modules[type(scheduler).__module__]
      with mock.patch.object(module, 'randn_tensor', draw, create=True):
        for t in scheduler.timesteps[first * scheduler.order :]:
          seen = getattr(scheduler, 'scale_model_input', lambda x, t: x)(x, t)
          x = scheduler.step(seen * t / (t + 1), t, x).prev_sample
          states.append(x.numpy())
  finally:
    torch.set_default_dtype(before)
  return np.stack(states)


@dataclasses.dataclass
class Drawn:
  """states [n ...] after every step; alphas [n] of their pairs; first, the grid's first pair."""

  states: np.ndarray
  alphas: np.ndarray
  first: tuple[float, float]


def ours(kind, config, steps, x=X, noises=NOISES, strength=1.0):
  """The same config read by us, drawn as the pipelines do, without compiling each."""
  with jax.enable_x64(True), jax.disable_jit():
    found = read_scheduler({'_class_name': kind, **config}, 'scheduler_config.json')
    noise = NoiseSchedule.of(found.schedule)
    parameterization = Parameterization(found.prediction, found.data_std)
    settings = dataclasses.replace(sample_config(found), steps=steps, guidance=1.0)
    settings.check(noise, parameterization)
    program, numbers = settings.program, settings.numbers(noise, strength, TOKENS)
    grid = jax.tree.map(jnp.asarray, numbers.grid)
    network = lambda x, t: x * (t / (t + 1)).reshape(-1, 1, 1, 1)
    label = jax.jit(noise.label_as(program.timesteps, grid))

    def quick_label(alpha, sigma):
      with jax.disable_jit(False):  # Its interpolation takes most of the time otherwise.
        return label(alpha, sigma)

    bound = make_denoiser(network, parameterization, quick_label)
    denoise = lambda x, alpha, sigma, nothing: bound(x, alpha, sigma)
    nothing = jnp.zeros((len(x), 1))
    guided = program.guide(denoise, nothing, nothing, numbers, parameterization)
    run = partial(sampler(program.sampler, **dict(program.options)), trajectory=True)
    scale = numbers.start if strength == 1 else 1.0
    drawn = run(guided, scale * jnp.asarray(x), grid, lambda i, like: jnp.asarray(noises)[i])
    count = int(((grid[0] > 0) | (grid[1] > 0)).sum()) - 1
  return Drawn(
    np.asarray(drawn.states)[:count], np.asarray(drawn.alphas)[:count],
    (float(grid[0][0]), float(grid[1][0])),
  )


AFTER_STEPS = {
  'HeunDiscreteScheduler', 'KDPM2DiscreteScheduler', 'KDPM2AncestralDiscreteScheduler',
  'DPMSolverSDEScheduler', 'FlowMatchHeunDiscreteScheduler',
}
"""Two calls a step, one in the last."""


def after_steps(kind, config, states):
  """Those states that are reached after a whole step."""
  if kind in AFTER_STEPS:
    return np.concatenate([states[1::2], states[-1:]])
  if kind == 'PNDMScheduler':
    skips = config.get('skip_prk_steps')
    return states[1:] if skips else np.concatenate([states[3:12:4], states[12:]])
  return states


def scale_of(kind, drawn):
  """Ours to theirs, [n 1 1 1 1]: schedulers after k-diffusion have alpha = 1 throughout."""
  sigma = kind.startswith(('Euler', 'LMS', 'Heun', 'KDPM2', 'DPMSolverSDE'))
  return (1 / drawn.alphas if sigma else np.ones_like(drawn.alphas)).reshape(-1, 1, 1, 1, 1)


def difference(kind, config, steps, wanted=None, **how):
  """The largest difference between both over all states, in shares of each state's largest.

  wanted: theirs, where they are known.
  """
  drawn = ours(kind, config, steps, **how)
  wanted = theirs(kind, config, steps, **how) if wanted is None else wanted
  wanted = after_steps(kind, config, wanted)
  found = scale_of(kind, drawn) * drawn.states
  assert found.shape == wanted.shape, (found.shape, wanted.shape)
  axes = tuple(range(1, wanted.ndim))
  return (np.abs(found - wanted).max(axes) / np.abs(wanted).max(axes)).max()
