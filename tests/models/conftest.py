import functools

import jax
import numpy as np
import pytest


@pytest.fixture(scope='session')
def quick_jit():
  """jax.jit for programs that run once: compiled quickly rather than well."""
  options = {'xla_backend_optimization_level': 0, 'xla_llvm_disable_expensive_passes': True}
  return functools.partial(jax.jit, compiler_options=options)


@pytest.fixture(scope='session')
def random_params():
  """Random values for parameter shapes, without compiling an initialiser; no bias is zero."""

  def make(shapes):
    rng = np.random.default_rng(0)
    draw = lambda leaf: rng.normal(0, 0.2, leaf.shape).astype(np.float32)
    return {n: jax.numpy.asarray(draw(s) + n.endswith('scale')) for n, s in shapes.items()}

  return make
