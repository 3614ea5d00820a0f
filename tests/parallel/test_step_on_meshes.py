"""One training step on every kind of mesh: the same numbers, and memory that falls as it should.

The task is that of text-to-image: frozen autoencoder and text encoder, then the U-Net.
"""

import math
import re
import types

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from diffusion_jax import build
from diffusion_jax.layout import constrain, fitted, parameter_spec
from diffusion_jax.parallel.mesh import MeshConfig, make_mesh
from diffusion_jax.parallel.sharding import put_batch, put_params, to_host
from diffusion_jax.train.optimizer import OptimizerConfig, make_optimizer
from diffusion_jax.train.state import abstract_state, create_state
from diffusion_jax.train.step import make_step
from tests import tiny

BATCH = 16
MESHES = {
  'data': MeshConfig(data=8),
  'fsdp': MeshConfig(data=1, fsdp=8),
  'fsdp_tensor': MeshConfig(data=1, fsdp=4, tensor=2),
  'tensor_spatial': MeshConfig(data=1, fsdp=2, tensor=2, spatial=2),
  'slices': MeshConfig(data=1, fsdp=2, tensor=2, dcn_data=2),
}


@pytest.fixture(scope='module')
def task(parts, sources):
  """A U-Net with eight channels on latents of 8 x 8, told of the picture and the caption."""
  values = tiny.diffusion_config(parts, {'cache': False})
  config = build.parse(values)
  return build.build_task(config, *sources, None, None)


def batch_of(task, sources):
  records = [sources[0][i] for i in range(BATCH)]
  images = np.stack([record['image'] for record in records]).astype(np.float32) / 127.5 - 1
  return {'image': images, 'tokens': task.model.tokens([r['captions'][0] for r in records])}


def run(task, batch, mesh):
  """One compiled step on a fresh state: what it returns, and what it needs."""
  shapes = jax.eval_shape(task.initialize, jax.random.key(0))
  # A large epsilon, so that rounding in a gradient near zero does not decide an update's sign.
  optimizer = make_optimizer(OptimizerConfig(learning_rate=1e-2, warmup_steps=0, eps=1e-2),
                             shapes, 10)
  abstract = abstract_state(task, optimizer, True, mesh)
  shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
  update = make_step(task, optimizer, batch_size=BATCH, ema_halflife_images=100.0, accumulation=1,
                     mesh=mesh, shardings=shardings)
  inputs = (
    create_state(task, optimizer, True, 0, mesh),
    {role: put_params(params, mesh) for role, params in task.frozen.items()},
    put_batch(batch, mesh),
  )
  compiled = update.lower(*inputs).compile()
  like = lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
  shaped = jax.tree.map(like, inputs)
  state, metrics = compiled(*inputs)
  return types.SimpleNamespace(
    state=to_host(state), inputs=shaped, memory=compiled.memory_analysis(),
    text=compiled.as_text(), mesh=mesh,
    metrics=to_host(metrics),
  )


@pytest.fixture(scope='module')
def one(task, sources):
  return run(task, batch_of(task, sources), make_mesh(MeshConfig(), jax.devices()[:1]))


@pytest.fixture(scope='module', params=MESHES)
def many(request, task, sources):
  result = run(task, batch_of(task, sources), make_mesh(MESHES[request.param]))
  result.name = request.param
  return result


def test_the_same_losses_parameters_and_averages(one, many):
  for name, pair in one.metrics.items():
    np.testing.assert_allclose(many.metrics[name], pair, rtol=1e-5, err_msg=name)
  before = create_state_params(one)
  for tree, wanted in ((many.state.params, one.state.params), (many.state.ema, one.state.ema)):
    for name, value in wanted.items():
      np.testing.assert_allclose(tree[name], value, atol=2e-6, err_msg=name)
  moved = [np.abs(one.state.params[name] - before[name]).max() for name in before]
  assert min(moved) > 0 and max(moved) > 1e-3


def create_state_params(one):
  return one.state.params
def test_x(one, many):
  m=many.memory
  print(many.name, m.argument_size_in_bytes, m.output_size_in_bytes, m.temp_size_in_bytes, 'one', one.memory.argument_size_in_bytes, one.memory.temp_size_in_bytes)
  held=lambda t: sum(math.prod(l.sharding.shard_shape(l.shape))*l.dtype.itemsize for l in jax.tree.leaves(t))
  print('held', held(many.inputs))
  for n in one.state.params:
    d=np.abs(many.state.params[n]-one.state.params[n]).max()
    if d>1e-6: print(n,d)
  print(many.metrics, one.metrics)
