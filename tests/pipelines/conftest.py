"""Tiny models of latents and of pixels, and the programs that are compiled for them."""

import jax
import pytest

from diffusion_jax.diffusion.noise import NoiseConfig, ScheduleConfig
from diffusion_jax.diffusion.parameterization import Parameterization
from diffusion_jax.models.dit import DiTConfig
from diffusion_jax.pipelines import assembly
from diffusion_jax.pipelines.model import DENOISER
from diffusion_jax.pipelines.spaces import PixelSpace
from tests import tiny, tiny_pipeline

CLASSES = ('red', 'green')
DIT = DiTConfig(
  sample_size=8, patch_size=4, in_channels=3, out_channels=3, num_layers=1, num_attention_heads=2,
  attention_head_dim=4, num_embeds_ada_norm=len(CLASSES),
)


@pytest.fixture(scope='session')
def model_and_weights(parts):
  schedule = ScheduleConfig(rescale_betas_zero_snr=True)
  v = Parameterization('v_prediction')
  model, frozen = tiny.assemble(tiny.UNET, **parts, schedule=schedule, parameterization=v)
  denoiser = jax.jit(model.denoiser.initialize)(jax.random.key(0))
  return model, {**frozen, 'denoiser': denoiser}


@pytest.fixture(scope='session')
def by_class():
  """(model, weights) of classes on pixels."""
  model, _ = assembly.assemble(
    DIT, PixelSpace(), {'class': {'classes': CLASSES}}, NoiseConfig(process='cosine'),
    Parameterization('v_prediction'),
  )
  return model, {DENOISER: tiny_pipeline.random_params(DIT)}


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
