"""A tiny model of latents, and the programs that are compiled for it."""

import jax
import pytest

from diffusion_jax.diffusion.noise import ScheduleConfig
from diffusion_jax.diffusion.parameterization import Parameterization
from tests import tiny


@pytest.fixture(scope='session')
def model_and_weights(parts):
  schedule = ScheduleConfig(rescale_betas_zero_snr=True)
  v = Parameterization('v_prediction')
  model, frozen = tiny.assemble(tiny.UNET, **parts, schedule=schedule, parameterization=v)
  denoiser = jax.jit(model.denoiser.initialize)(jax.random.key(0))
  return model, {**frozen, 'denoiser': denoiser}


@pytest.fixture(scope='module')
def compilations():
  """Names of what JAX compiles, in the order in which it does."""
  events = []

  def listen(name, duration, **details):
    if name == '/jax/core/compile/backend_compile_duration':
      events.append(details.get('fun_name', ''))

  jax.monitoring.register_event_duration_secs_listener(listen)
  yield events
  jax.monitoring.unregister_event_duration_listener(listen)
