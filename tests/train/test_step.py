"""The step: repeatable, the same on every mesh, exact when it accumulates."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.checkpoint.checkpoints import Checkpoints
from diffusion_jax.parallel.mesh import MeshConfig, make_mesh, put_batch
from diffusion_jax.registry import OPTIMIZERS
from diffusion_jax.train.compile import held
from diffusion_jax.train.optimizer import OptimizerConfig, make_optimizer
from diffusion_jax.train.state import abstract_state, initializer
from diffusion_jax.train.step import make_step
from diffusion_jax.train.tasks.clip import CLIPTask, CLIPTaskConfig
from tests import tiny
from tests.regression import Regression, regression_batch

BATCH = 16


def _clip_task(dtype=jnp.float32):
  return CLIPTask(CLIPTaskConfig(tiny.CLIP), None, None, dtype=dtype)


def _clip_batch():
  rng = np.random.default_rng(0)
  tokens = rng.integers(2, 300, (BATCH, tiny.LENGTH))
  tokens[:, 8:] = 1
  return {'image': rng.uniform(-1, 1, (BATCH, tiny.SIZE, tiny.SIZE, 3)), 'tokens': tokens}


def _cast(batch):
  return {n: x.astype(np.int32 if x.dtype == np.int64 else np.float32) for n, x in batch.items()}


def _run(task, batch, *, steps=1, mesh=None, accumulation=1, repeat=False, optimizer='adamw'):
  """(state, metrics of each step) from a fresh state; with `repeat` the first step runs twice."""
  mesh = mesh or make_mesh(MeshConfig(), jax.devices()[:1])
  shapes = jax.eval_shape(task.initialize, jax.random.key(0))
  rate = 1.0 if optimizer == 'prodigy' else 1e-2
  optimizer = make_optimizer(OptimizerConfig(optimizer, learning_rate=rate), shapes, 10, 'cpu')
  abstract = abstract_state(task, optimizer, True, mesh)
  update = make_step(
    task, optimizer, abstract, batch_size=BATCH, ema_halflife_images=100.0,
    accumulation=accumulation,
  )
  fresh = lambda: initializer(task, optimizer, 0, abstract)(None)
  on_mesh = put_batch(_cast(batch), mesh)
  if repeat:
    return [update(fresh(), {}, on_mesh) for _ in range(2)]
  state, out = fresh(), []
  for _ in range(steps):
    state, metrics = update(state, {}, on_mesh)
    out.append({name: float(one.compute()) for name, one in metrics.items()})
  return types.SimpleNamespace(state=state, metrics=out)


@pytest.fixture(scope='module')
def clip_on_one_device():
  return _run(_clip_task(), _clip_batch(), steps=3)


@pytest.mark.parametrize('accumulation', [1, 4])
def test_the_state_is_updated_in_place(accumulation):
  """A step's results lie where its arguments lay, though the optimizer is a part of its own."""
  task, mesh = Regression(), make_mesh(MeshConfig(), jax.devices()[:1])
  shapes = jax.eval_shape(task.initialize, jax.random.key(0))
  optimizer = make_optimizer(OptimizerConfig(), shapes, 10, 'cpu')
  abstract = abstract_state(task, optimizer, True, mesh)
  step = make_step(
    task, optimizer, abstract, batch_size=BATCH, ema_halflife_images=100.0,
    accumulation=accumulation,
  )
  compiled = step.lower(abstract, {}, _cast(regression_batch(BATCH))).compile()
  weights = (abstract.params, abstract.ema, abstract.opt_state.mu, abstract.opt_state.nu)
  assert compiled.memory_analysis().alias_size_in_bytes >= held(weights) > 0


def test_a_step_is_repeatable_to_the_bit_and_steps_differ():
  task = Regression(noise=1.0)
  first, second = _run(task, regression_batch(BATCH), repeat=True)
  jax.tree.map(np.testing.assert_array_equal, first, second)
  assert int(first[0].step) == 1
  x, y = (_run(task, regression_batch(BATCH), steps=2).metrics[i]['loss'] for i in (0, 1))
  assert x != y


def test_accumulation_is_the_large_batch():
  """Exact only for a mean over examples without noise: every part draws noise of its own, and
  CLIP's loss is over the pairs of a part. Hence a regression."""
  whole = _run(Regression(), regression_batch(BATCH), steps=3)
  for mesh in (None, make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))):
    parts = _run(Regression(), regression_batch(BATCH), steps=3, accumulation=4, mesh=mesh)
    for a, b in zip(parts.metrics, whole.metrics, strict=True):
      assert a == pytest.approx(b, rel=1e-5)
    for name, value in whole.state.params.items():
      np.testing.assert_allclose(parts.state.params[name], value, rtol=1e-5, atol=1e-6)


def test_parts_of_a_batch_draw_different_noise():
  """The same example in every part: with one key for all, the parts would be one another."""
  batch = {name: np.repeat(x[:4], 4, axis=0) for name, x in regression_batch(BATCH).items()}
  apart = _run(Regression(noise=1.0), batch, accumulation=4).metrics[0]['loss']
  again = _run(Regression(noise=1.0), {n: x[::4] for n, x in batch.items()}).metrics[0]['loss']
  assert apart != pytest.approx(again, rel=1e-3)


def test_bfloat16_keeps_parameters_in_float32(clip_on_one_device):
  half = _run(_clip_task(jnp.bfloat16), _clip_batch())
  for tree in (half.state.params, half.state.ema, half.state.opt_state):
    floats = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating)]
    assert floats and all(x.dtype == jnp.float32 for x in floats)
  a, b = half.metrics[0]['loss'], clip_on_one_device.metrics[0]['loss']
  assert a != b and a == pytest.approx(b, rel=0.05)


@pytest.mark.parametrize('config', [
  MeshConfig(data=8), MeshConfig(data=2, fsdp=2, tensor=2), MeshConfig(data=1, fsdp=8),
])
def test_eight_devices_compute_what_one_does(config, clip_on_one_device):
  """CLIP, whose loss couples all examples of the global batch."""
  one = clip_on_one_device
  many = _run(_clip_task(), _clip_batch(), steps=3, mesh=make_mesh(config))
  assert one.metrics[0]['loss'] != one.metrics[2]['loss']
  for a, b in zip(many.metrics, one.metrics, strict=True):
    assert a == pytest.approx(b, rel=2e-4)
  if config.fsdp > 1:
    name = 'text_model.encoder.layers.0.mlp.fc1.kernel'
    for tree in (many.state.params, many.state.ema, many.state.opt_state.mu):
      whole, shard = tree[name].shape, tree[name].addressable_shards[0].data.shape
      assert shard == (whole[0] // config.fsdp, whole[1] // config.tensor)


@pytest.mark.parametrize('name', OPTIMIZERS)
def test_every_optimizer_lies_on_shards_and_is_saved(name, tmp_path):
  """The same numbers on eight devices as on one, and the state a checkpoint gives back."""
  mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
  one = _run(Regression(), regression_batch(BATCH), steps=3, optimizer=name)
  many = _run(Regression(), regression_batch(BATCH), steps=3, optimizer=name, mesh=mesh)
  assert one.metrics[0]['loss'] > one.metrics[2]['loss']
  for param, value in one.state.params.items():
    np.testing.assert_allclose(many.state.params[param], value, rtol=1e-4, atol=1e-6)
  parts = {'params': one.state.params, 'opt_state': one.state.opt_state, 'ema': {}, 'rest': {}}
  checkpoints = Checkpoints(tmp_path)
  assert checkpoints.save(3, parts, {})
  checkpoints.wait()
  checkpoints.close()
  abstract = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), parts
  )
  _, found, _ = Checkpoints(tmp_path, read_only=True).restore(abstract)
  jax.tree.map(np.testing.assert_array_equal, found['opt_state'], one.state.opt_state)
