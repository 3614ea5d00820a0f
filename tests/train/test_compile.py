"""One executable for each shape of batch, compiled when it comes and kept."""

import contextlib

import jax
import numpy as np

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
