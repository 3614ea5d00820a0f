"""Work that no step changes leaves the loop, and nothing else changes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.diffusion.denoiser import classifier_free
from diffusion_jax.diffusion.samplers import SAMPLERS, initial_noise, sampler
from diffusion_jax.diffusion.samplers.hoisting import hoisted
from tests.diffusion.exact_mixture import geometric

TEXT = jax.random.normal(jax.random.key(0), (2, 7, 5))
PARAMS = jax.random.normal(jax.random.key(1), (2, 5, 3)) / 4
PAIR = (jnp.float32(0.8), jnp.float32(0.6))


def attention(params, text):
  """A denoiser that attends to text: its keys and values are the same at every step."""

  @jax.jit
  def project(text, weights):
    return jnp.tanh(text @ weights)

  def denoise(x, alpha, sigma):
    key, value = project(text, params[0]), text.astype(jnp.bfloat16) @ params[1]
    shares = jax.nn.softmax(jnp.einsum('bqd,bkd->bqk', x, key) / sigma)
    return alpha * jnp.einsum('bqk,bkd->bqd', shares, value) + 0.1 * x + 1.0

  return denoise


def products(jaxpr):
  """Matrix products in a jaxpr, those within its equations counted too."""
  inner = jax.extend.core.jaxprs_in_params
  here = sum(eqn.primitive.name == 'dot_general' for eqn in jaxpr.eqns)
  return here + sum(products(sub) for eqn in jaxpr.eqns for sub in inner(eqn.params))


def loop_of(jaxpr):
  """The body of the first loop."""
  for eqn in jaxpr.eqns:
    if eqn.primitive.name in ('scan', 'while'):
      return eqn.params.get('jaxpr', eqn.params.get('body_jaxpr')).jaxpr
  raise AssertionError('no loop')


@pytest.mark.parametrize('wrap', [lambda denoise: denoise, jax.jit])
def test_products_of_the_text_leave_the_denoiser(wrap):
  x, keys = initial_noise(0, 0, 2, (4, 3))
  plain = wrap(attention(PARAMS, TEXT))
  fixed = hoisted(plain, x, *PAIR)
  assert products(jax.make_jaxpr(plain)(x, *PAIR).jaxpr) == 4
  assert products(jax.make_jaxpr(fixed)(x, *PAIR).jaxpr) == 2
  np.testing.assert_allclose(fixed(x, *PAIR), plain(x, *PAIR), rtol=1e-6)
  # Of another shape it is the denoiser itself.
  np.testing.assert_allclose(fixed(x[:, :2], *PAIR), plain(x[:, :2], *PAIR), rtol=1e-6)
  grid = geometric(8.0, 0.1, 3)
  draw = lambda x: sampler('heun')(plain, x, grid, keys)
  assert products(loop_of(jax.make_jaxpr(draw)(x).jaxpr)) == 4  # Two calls of two.


@pytest.mark.parametrize('wrap', [lambda denoise: denoise, jax.jit])
def test_products_of_the_text_leave_the_branches_of_an_interval(wrap):
  """Guided and not: each branch keeps the products of what changes, two of four."""
  x, keys = initial_noise(0, 0, 2, (4, 3))
  told = lambda x, alpha, sigma, text: attention(PARAMS, text)(x, alpha, sigma)
  plain = wrap(classifier_free(told, TEXT, -TEXT, 3.0, interval=(0.3, 2.0)))
  fixed = hoisted(plain, x, *PAIR)
  assert products(jax.make_jaxpr(plain)(x, *PAIR).jaxpr) == 8
  assert products(jax.make_jaxpr(fixed)(x, *PAIR).jaxpr) == 4
  for alpha in (0.1, 0.8):  # Outside, and within.
    pair = jnp.float32(alpha), PAIR[1]
    np.testing.assert_allclose(fixed(x, *pair), plain(x, *pair), rtol=1e-5)
  grid = geometric(8.0, 0.1, 6)
  draw = lambda hoist: jax.jit(
    lambda x: (sampler('heun') if hoist else SAMPLERS['heun'].function)(plain, x, grid, keys)
  )(x)
  np.testing.assert_allclose(draw(True), draw(False), rtol=2e-5)


def test_gradients_and_samples_stay_the_same():
  x, keys = initial_noise(0, 0, 2, (4, 3))
  grid = tuple(part.astype(jnp.float32) for part in geometric(8.0, 0.1, 3))

  def loss(params, hoist):
    draw = sampler('dpmpp_2m') if hoist else SAMPLERS['dpmpp_2m'].function
    return (draw(attention(params, TEXT), x, grid, keys) ** 2).sum()

  run = jax.jit(jax.value_and_grad(loss), static_argnums=1)
  found, wanted = run(PARAMS, True), run(PARAMS, False)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5), found, wanted)
  assert np.abs(found[1]).min() > 0


def test_effects_and_denoisers_without_such_work_are_left_alone():
  x = jnp.ones((1, 2, 3))
  plain = lambda x, alpha, sigma: alpha * x + jnp.zeros_like(x)
  assert hoisted(plain, x, *PAIR) is plain
  calls = []

  def counted(x, alpha, sigma):
    jax.debug.callback(lambda: calls.append(1))
    return attention(PARAMS[:, :, :3], TEXT[:1])(x, alpha, sigma)

  fixed = hoisted(counted, x, *PAIR)
  for _ in range(3):
    fixed(x, *PAIR)
  jax.effects_barrier()
  assert len(calls) == 3
