"""One executable for each shape of batch, compiled when it comes and kept."""

import contextlib
import threading

import jax
import numpy as np
import pytest

from diffusion_jax.errors import UserError
from diffusion_jax.parallel.mesh import MeshConfig, make_mesh, put_batch
from diffusion_jax.train.compile import StepPrograms
from diffusion_jax.train.health import Compilations
from diffusion_jax.train.optimizer import OptimizerConfig, make_optimizer
from diffusion_jax.train.state import abstract_state, initializer
from diffusion_jax.train.step import make_step
from tests.regression import Regression

BATCH = 8


class Pooled(Regression):
  """A regression on the mean over any number of rows, x [b rows 8]."""

  def loss(self, params, frozen, carry, batch, key, step):
    return super().loss(params, frozen, carry, batch | {'x': batch['x'].mean(1)}, key, step)


def _batch(rows, mesh):
  rng = np.random.default_rng(rows)
  x, y = rng.normal(size=(BATCH, rows, 8)), rng.normal(size=(BATCH, 4))
  return put_batch({'x': x.astype('f4'), 'y': y.astype('f4')}, mesh)


def test_each_shape_is_compiled_once_and_trains_as_the_jitted_step_does():
  task, mesh = Pooled(), make_mesh(MeshConfig(), jax.devices()[:2])
  shapes = jax.eval_shape(task.initialize, jax.random.key(0))
  optimizer = make_optimizer(OptimizerConfig(learning_rate=1e-2), shapes, 10, 'cpu')
  abstract = abstract_state(task, optimizer, False, mesh)
  step = make_step(task, optimizer, abstract, batch_size=BATCH, ema_halflife_images=0.0)
  around = []

  @contextlib.contextmanager
  def compiling():
    around.append('begins')
    yield
    around.append('ends')

  programs, batches = StepPrograms(step, compiling), {n: _batch(n, mesh) for n in (3, 5)}
  report = programs.prepare(abstract, {}, batches[3])
  assert report.parameters == 36 and report.batch == 4 * BATCH * (3 * 8 + 4) // 2
  assert report.optimizer == 4 * (2 * 36 + 1) < report.state
  compilations, counts = Compilations(), []
  state, wanted = (initializer(task, optimizer, 0, abstract)(None) for _ in range(2))
  for rows in (3, 5, 3, 5):
    before = compilations.count
    state, metrics = programs(state, {}, batches[rows])
    counts.append(compilations.count - before)
    wanted, expected = step(wanted, {}, batches[rows])
    jax.tree.map(np.testing.assert_array_equal, metrics, expected)
  compilations.close()
  assert counts == [0, 1, 0, 0] and around == ['begins', 'ends'] * 2
  jax.tree.map(np.testing.assert_array_equal, state.params, wanted.params)


def test_other_shapes_are_compiled_ahead_in_a_thread_also_in_parts_of_a_batch():
  """Of arrays that are donated meanwhile; a step waits for its own, and an error is its error."""
  task, mesh = Pooled(), make_mesh(MeshConfig(), jax.devices()[:2])
  shapes = jax.eval_shape(task.initialize, jax.random.key(0))
  optimizer = make_optimizer(OptimizerConfig(learning_rate=1e-2), shapes, 10, 'cpu')
  abstract = abstract_state(task, optimizer, False, mesh)
  step = make_step(
    task, optimizer, abstract, batch_size=BATCH, ema_halflife_images=0.0, accumulation=2
  )
  met, batches = [], {n: _batch(n, mesh) for n in (3, 5, 7)}
  programs = StepPrograms(step, meet=lambda: met.append(programs.busy))
  programs.prepare(abstract, {}, batches[3])
  state, wanted = (initializer(task, optimizer, 0, abstract)(None) for _ in range(2))
  compilations, go_on, end = Compilations(), threading.Event(), threading.Event()

  def later():
    go_on.wait()
    return batches[5]

  def broken():
    end.wait()
    raise UserError('a picture is gone')

  programs.prepare_ahead(state, {}, [later, lambda: batches[7], broken])
  for rows in (3, 3, 5, 7):
    if rows == 5:
      assert programs.busy and len(programs.reports) == 1
      go_on.set()
    before = compilations.count
    state, metrics = programs(state, {}, batches[rows])
    assert compilations.count == before
    wanted, expected = step(wanted, {}, batches[rows])
    jax.tree.map(np.testing.assert_array_equal, metrics, expected)
  compilations.close()
  jax.tree.map(np.testing.assert_array_equal, state.params, wanted.params)
  assert len(met) == len(programs.reports) == 3 and programs.reports[1].size == ''
  end.set()
  programs._thread.join()
  with pytest.raises(UserError, match='a picture is gone'):
    programs(state, {}, batches[3])
