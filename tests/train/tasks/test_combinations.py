"""Any denoiser on any process in any space: a step, gradients to every parameter, and a picture."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from diffusion_jax.config import typed
from diffusion_jax.parallel.mesh import MeshConfig, make_mesh
from diffusion_jax.pipelines.assembly import assemble
from diffusion_jax.train.tasks.diffusion import DiffusionTask
from diffusion_jax.train.tasks.diffusion_settings import DiffusionTaskConfig
from tests import tiny
from tests.tiny_pipeline import random_params
from tests.train.tasks.test_models import PROCESSES
from tests.train.tasks.test_transformers import DIT, HEADS, LATENTS, MMDIT, PIXELS

UNET = {
  'type': 'unet', 'block_out_channels': [8], 'layers_per_block': 1, 'norm_num_groups': 4,
  'cross_attention_dim': 16, 'attention_head_dim': 2, 'down_block_types': ['DownBlock2D'],
  'up_block_types': ['UpBlock2D'],
}
DENOISERS = {'unet': UNET, 'dit': DIT | HEADS, 'mmdit': MMDIT | HEADS}
SPACES = {'latents': LATENTS, 'pixels': PIXELS}
UNUSED = ('mmdit', '.attn.add_q_proj.'), ('mmdit', '.attn.norm_added_q.')
"""Of the last block, here the only one, whose text nothing reads any more."""
NUMBER, TEXTS = 4, ['red apple', 'cat face', 'sun', '']


@pytest.fixture
def quick_jit():
  options = {'xla_backend_optimization_level': 0, 'xla_llvm_disable_expensive_passes': True}
  return lambda run: jax.jit(run, compiler_options=options)


def made(denoiser, process, space, parts, sources):
  """The task, not trained."""
  schedule, objective, sample = PROCESSES[process]
  sizes = {k: v for k, v in SPACES[space].items() if k != 'patch_size' or denoiser != 'unet'}
  where = {'type': space} | ({'autoencoder': parts['autoencoder']} if space == 'latents' else {})
  config = typed(DiffusionTaskConfig, {
    'space': where, 'denoiser': DENOISERS[denoiser] | sizes, 'clip': parts['clip'],
    'schedule': schedule, 'objective': objective, 'sample': sample | {'guidance': 2.0},
    'caption_dropout': 0.5, 'preview_captions': ['cat'],
  })
  model, found = assemble(
    config.denoiser, config.space, config.conditioned, config.schedule,
    config.objective.parameterization, size=(tiny.SIZE, tiny.SIZE),
  )
  return DiffusionTask(config, model, {role: p.load() for role, p in found.items()}, *sources)


@pytest.mark.parametrize(('denoiser', 'process', 'space'), [
  # Every pair, and each third with another space.
  *((d, p, ('latents', 'pixels')[(i + j) % 2]) for (i, d), (j, p) in itertools.product(
    enumerate(DENOISERS), enumerate(PROCESSES)
  ))
])
def test_a_step_gradients_and_a_picture(denoiser, process, space, parts, sources, quick_jit):
  task = made(denoiser, process, space, parts, sources)
  images = np.random.default_rng(0).uniform(-1, 1, (NUMBER, tiny.SIZE, tiny.SIZE, 3))
  batch = {'image': images.astype(np.float32), 'tokens': task.model.text.tokens(TEXTS)}
  # At first some layers are zero, which would hide those before them.
  params = random_params(task.config.denoiser)

  def step(params):
    (loss, _), gradients = jax.value_and_grad(task.loss, has_aux=True)(
      params, task.frozen, task.carry(), batch, jax.random.key(1), 0
    )
    updates, _ = (optimizer := optax.adam(1e-3)).update(gradients, optimizer.init(params))
    return loss, optax.apply_updates(params, updates), gradients

  loss, params, gradients = quick_jit(step)(params)
  assert jnp.isfinite(loss)
  dead = [name for name, g in gradients.items() if not np.abs(g).max() > 1e-10]
  unused = [part for network, part in UNUSED if network == denoiser]
  assert not [name for name in dead if not any(part in name for part in unused)]
  mesh = make_mesh(MeshConfig(), jax.devices()[:1])
  weights = task.model.on_mesh(jax.device_get(task.weights(params, task.frozen)), mesh)
  [images] = task.model.sample(
    weights, TEXTS[:2], task.config.sample, seed=0, mesh=mesh, batch_size=2
  )
  assert images.shape == (2, tiny.SIZE, tiny.SIZE, 3) and np.isfinite(images).all()
  assert np.abs(images[0] - images[1]).max() > 1e-3
