"""Options of XLA that this version does not know are left out; parts of programs stay apart."""

import jax
import jax.numpy as jnp
import pytest

from diffusion_jax import xla


@pytest.fixture
def forget():
  """Options are looked up anew, before and after."""
  xla._known.cache_clear()
  yield
  xla._known.cache_clear()


def test_known_options_are_used_and_unknown_ones_left_out(forget, monkeypatch):
  known = {'xla_cpu_prefer_vector_width': '256'}
  monkeypatch.setitem(xla.OPTIONS, 'cpu', ({'xla_cpu_no_such_option': '1'}, known))
  assert xla.options() == known
  add = xla.jit(lambda x: x + 1)
  assert add(1) == 2 and xla.jitted()(lambda x: x - 1)(1) == 0
  # A program within another has the options of that one.
  assert jax.jit(lambda x: 2 * add(x))(1) == 4 and xla.jit(add)(1) == 2


def test_a_platform_without_options_has_none(forget, monkeypatch):
  monkeypatch.setattr(jax, 'default_backend', lambda: 'tpu')
  assert xla.options() is None
  x = jnp.ones(3)
  assert xla.settled(x) is x


def test_a_part_stays_apart_on_cpus_alone(monkeypatch):
  part = lambda x, y: {'sum': x + y, 'same': y}
  program = lambda: jax.jit(lambda x: xla.apart(part)(jnp.sin(x), x)).lower(2.0).compile()
  out = program()(2.0)
  assert out['sum'] == jnp.sin(2.0) + 2.0 and out['same'] == 2.0
  assert ' call(' in program().as_text()
  monkeypatch.setattr(jax, 'default_backend', lambda: 'tpu')
  assert ' call(' not in program().as_text()
