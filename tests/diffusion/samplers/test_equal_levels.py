"""Steps from a pair to itself: as if they were not there, but for correctors."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.diffusion.samplers import padded, sampler
from tests.diffusion import exact_mixture

X = np.random.default_rng(0).standard_normal((2, 1, 1, 2))
LEVELS = np.geomspace(15.0, 0.03, 9)
PREDICTORS = [
  ('lms', {}), ('deis', {}), ('dpmpp_2m', {}), ('plms', {}), ('pndm', {}),
  ('dpmpp_3m_sde', {'eta': 0.0}), ('heun', {}), ('dpm2', {}),
  ('euler', {}), ('ddim', {}), ('flow_heun', {}),
]
CORRECTED = [
  ('unipc', {}), ('unipc', {'order': 3}), ('sa_solver', {'tau': 0.0, 'corrector_order': 3}),
]


CALLS = []


@cache
def compiled(name, options):
  """One program for all grids of one length."""

  def denoise(x, alpha, sigma):
    jax.debug.callback(lambda: CALLS.append(1))
    return exact_mixture.denoise(x, alpha, sigma)

  return jax.jit(lambda x, grid: sampler(name, **dict(options))(denoise, x, grid, None))


def draw(name, levels, options, length=24):
  """(the sample, calls of the network) on a variance-preserving grid, filled up to a length."""
  CALLS.clear()
  with jax.enable_x64(True):
    norm = np.hypot(1, levels)
    grid = padded((1 / norm, levels / norm), max(length, len(levels) - 1))
    run = compiled(name, tuple(sorted(options.items())))
    found = np.asarray(run(jnp.asarray(X), grid))
    jax.effects_barrier()
  return found, len(CALLS)


@pytest.mark.parametrize('end', [(), (0.0,)])
@pytest.mark.parametrize(('name', 'options'), PREDICTORS)
def test_repeated_levels_change_nothing(name, options, end):
  levels = np.append(LEVELS, end)
  repeated = np.repeat(levels, np.where(np.isin(np.arange(len(levels)), (0, 3, 8)), 3, 1))
  wanted, calls = draw(name, levels, options)
  found, again = draw(name, repeated, options)
  np.testing.assert_allclose(found, wanted, rtol=1e-12)
  assert again == calls
  whole, same = draw(name, levels, options, length=0)
  np.testing.assert_allclose(found, whole, rtol=1e-12)
  assert same == calls


@pytest.mark.parametrize(('name', 'options'), CORRECTED)
def test_a_repeated_level_is_called_for_the_correction_alone(name, options):
  """With all levels repeated, each prediction and each correction has a call of its own."""
  options = options | {'lower_order_final': False}  # Which depends on the number of steps.
  exact, _ = draw('lms', np.geomspace(15.0, 0.03, 2000), {})
  error = lambda levels: np.abs(draw(name, levels, options)[0] - exact).max()
  plain, calls = draw(name, LEVELS, options)
  once, more = draw(name, np.append(LEVELS, LEVELS[-1]), options)
  assert more == calls + 1 and np.abs(once - plain).max() > 1e-6
  twice, still = draw(name, np.append(LEVELS, [LEVELS[-1]] * 2), options)
  np.testing.assert_allclose(twice, once, rtol=1e-12)
  assert still == more
  assert error(np.repeat(LEVELS, 2)) < 1.2 * error(LEVELS) < 0.1


@pytest.mark.parametrize(('name', 'options'), CORRECTED)
def test_filling_up_a_grid_corrects_nothing(name, options):
  for last in (LEVELS[-1], LEVELS[-1] / 2, 0.0):
    levels = np.append(LEVELS, last)
    whole, filled = (draw(name, levels, options, length) for length in (0, 24))
    np.testing.assert_allclose(filled[0], whole[0], rtol=1e-12)
    assert whole[1] == filled[1]
