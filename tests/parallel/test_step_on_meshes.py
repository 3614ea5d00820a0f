"""One training step on every kind of mesh: the same numbers, and memory that falls as it should.

The task is that of text-to-image: frozen autoencoder and text encoder, then the U-Net.
"""

import math
import re
import types

import jax
import numpy as np
import pytest

from benchmarks.collectives import beside_parameters
from diffusion_jax import build
from diffusion_jax.config import parse
from diffusion_jax.parallel.collectives import by_kind, moved, read_collectives
from diffusion_jax.parallel.mesh import MeshConfig, make_mesh, put_batch, put_params, to_host
from diffusion_jax.train.compile import held
from diffusion_jax.train.optimizer import OptimizerConfig, make_optimizer
from diffusion_jax.train.state import abstract_state, initializer
from diffusion_jax.train.step import make_step
from tests import tiny

BATCH = 16
MESHES = {
  'data': MeshConfig(data=8),
  'fsdp': MeshConfig(data=1, fsdp=8),
  'fsdp_tensor': MeshConfig(data=1, fsdp=4, tensor=2),
  'spatial': MeshConfig(data=2, fsdp=2, spatial=2),
  'slices': MeshConfig(data=1, fsdp=2, tensor=2, dcn_data=2),
}
# Of the frozen networks, what no loss of a denoiser reads; jit drops it.
UNREAD = ('decoder.', 'post_quant_conv.', 'vision_model.', 'visual_projection.',
          'text_projection.', 'logit_scale')


@pytest.fixture(scope='module')
def task(parts, sources):
  """A U-Net of eight channels on latents of 8 x 8, of pictures and captions that are encoded."""
  config = parse(tiny.diffusion_config(parts, {'cache': False}))
  return build.build_task(config, *sources, None, None)


@pytest.fixture(scope='module')
def batch(task, sources):
  records = [sources[0][i] for i in range(BATCH)]
  images = np.stack([record['image'] for record in records]).astype(np.float32) / 127.5 - 1
  return {'image': images, 'tokens': task.model.text.tokens([r['captions'][0] for r in records])}


@pytest.fixture(scope='module')
def optimizer(task):
  shapes = jax.eval_shape(task.initialize, jax.random.key(0))
  # A large epsilon, so that rounding in a gradient near zero does not decide an update's sign.
  config = OptimizerConfig(learning_rate=1e-2, warmup_steps=0, eps=1e-2)
  return make_optimizer(config, shapes, 10, 'cpu')


@pytest.fixture(scope='module')
def fresh(task, optimizer):
  return to_host(initializer(
    task, optimizer, 0, abstract_state(task, optimizer, True, one_device())
  )(None))


def one_device():
  return make_mesh(MeshConfig(), jax.devices()[:1])


def run(task, optimizer, fresh, batch, mesh):
  """One compiled step: what it returns, what it is given on each device, and what it needs."""
  abstract = abstract_state(task, optimizer, True, mesh)
  shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
  update = make_step(task, optimizer, abstract, batch_size=BATCH, ema_halflife_images=100.0)
  frozen = {role: put_params(params, mesh) for role, params in task.frozen.items()}
  read = {r: {n: p for n, p in params.items() if not n.startswith(UNREAD)}
          for r, params in frozen.items()}
  inputs = jax.device_put(fresh, shardings), frozen, put_batch(batch, mesh)
  bytes_held = {'state': held(inputs[0]), 'all': held((inputs[0], read, inputs[2]))}
  compiled = update.lower(*inputs).compile()
  state, metrics = compiled(*inputs)
  return types.SimpleNamespace(
    state=to_host(state), metrics=to_host(metrics), held=bytes_held, text=compiled.as_text(),
    memory=compiled.memory_analysis(),
  )


@pytest.fixture(scope='module')
def one(task, optimizer, fresh, batch):
  return run(task, optimizer, fresh, batch, one_device())


@pytest.fixture(scope='module')
def many(task, optimizer, fresh, batch):
  """many(name): the step on that mesh, compiled once."""
  results = {}

  def get(name):
    if name not in results:
      results[name] = run(task, optimizer, fresh, batch, make_mesh(MESHES[name]))
    return results[name]

  return get


@pytest.mark.parametrize('name', MESHES)
def test_the_same_losses_parameters_and_averages(name, one, many, fresh):
  found = many(name)
  for metric, wanted in one.metrics.items():
    for part in ('total', 'count'):
      np.testing.assert_allclose(
        getattr(found.metrics[metric], part), getattr(wanted, part), rtol=2e-5, err_msg=metric
      )
  for tree, wanted in ((found.state.params, one.state.params), (found.state.ema, one.state.ema)):
    for key, value in wanted.items():
      np.testing.assert_allclose(tree[key], value, atol=2e-6, err_msg=key)
  moved = [np.abs(value - fresh.params[key]).max() for key, value in one.state.params.items()]
  assert max(moved) > 1e-3


@pytest.mark.parametrize('name', MESHES)
def test_a_device_is_given_its_share_of_the_table_and_no_more(name, one, many):
  found = many(name)
  assert found.memory.argument_size_in_bytes == found.held['all']
  assert found.memory.alias_size_in_bytes >= 0.95 * found.held['state']  # It is donated.
  config, share = MESHES[name], found.held['state'] / one.held['state']
  ways = config.fsdp * config.tensor
  assert 1 / ways <= share < 1 / ways + 0.12  # Norms and biases, which are much of a tiny U-Net.


@pytest.mark.parametrize(('name', 'most'), [
  ('data', 0.2), ('fsdp', 0.2), ('fsdp_tensor', 0.35), ('spatial', 0.2), ('slices', 0.35),
])
def test_temporary_memory_falls(name, most, one, many):
  """Two examples on a device instead of 16, or four, or four halves."""
  assert many(name).memory.temp_size_in_bytes < most * one.memory.temp_size_in_bytes


def maps(text: str, *ends: int) -> set[int]:
  """How many arrays of those last dimensions an array of the compiled program holds."""
  found = re.findall(r'f32\[([\d,]+)\]', text)
  shapes = {tuple(map(int, shape.split(','))) for shape in found}
  return {math.prod(shape[: -len(ends)]) for shape in shapes if shape[-len(ends):] == ends}


def test_heads_are_split_over_tensor_and_images_over_spatial(many):
  """Two heads' logits over 64 positions, of the 2 examples of a device or of 4; then features of
  pictures at full size, of 2 examples or of the halves of 4."""
  assert max(maps(many('fsdp').text, 64, 64)) == 2 * 2
  assert max(maps(many('fsdp_tensor').text, 64, 64)) == 4 * 1
  assert maps(many('fsdp').text, 32, 32, 4) == {2}
  assert maps(many('spatial').text, 16, 32, 4) == {4} and not maps(many('spatial').text, 32, 32, 4)


def test_data_parallelism_reduces_gradients_and_nothing_else(many, task, fresh):
  found = read_collectives(many('data').text, 8)
  assert beside_parameters(found, [fresh.params]) == []
  sent = by_kind(found)
  gradients = moved('all-reduce', sum(value.nbytes for value in fresh.params.values()), 8)
  assert sent.keys() == {'all-reduce'} and 0 <= sent['all-reduce'] - gradients < 2000


def test_fsdp_gathers_parameters_and_nothing_else(many, task, fresh):
  """But for the texts' embeddings, which are smaller than the table that they are taken from."""
  found = read_collectives(many('fsdp').text, 8)
  beside = beside_parameters(found, [fresh.params, task.frozen])
  assert all('_take' in one or '(take' in one for one in beside) and len(beside) <= 2
  sent, whole = by_kind(found), sum(value.nbytes for value in fresh.params.values())
  assert {'all-gather', 'all-reduce'} <= sent.keys() <= {'all-gather', 'all-reduce', 'all-to-all'}
  # XLA for CPUs has no reduce-scatter: it reduces everywhere, and each device keeps its part.
  assert 0 <= sent['all-reduce'] - moved('all-reduce', whole, 8) < 4000
  frozen = sum(value.nbytes for params in task.frozen.values() for value in params.values())
  assert sent['all-gather'] <= 2 * moved('all-gather', whole, 8) + moved('all-gather', frozen, 8)
