"""What every sampler of the table does: keys, trajectories, partial grids, compilation, calls."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.diffusion.samplers import infos, initial_noise, padded, part_way, sampler
from diffusion_jax.errors import UserError
from tests.diffusion.exact_mixture import denoise, gaussian, geometric, of_levels

SAMPLERS = infos()

ADAPTIVE = ('dpm_adaptive', 'probability_flow')
# Fewer steps than usual within a step.
QUICK = {'annealed_langevin': {'steps': 3}, 'restart': {'steps': 2, 'repeats': 1}}


def quick(name):
  return sampler(name, **QUICK.get(name, {}))


@pytest.mark.parametrize('name', SAMPLERS)
def test_one_compilation_and_the_same_image_in_every_batch(name):
  """In the default dtype; also counts network calls, and those of padded grids."""
  noise, keys = initial_noise(3, 0, 5, (2, 2, 2))
  traces, calls = [], []

  def counted(x, alpha, sigma):
    jax.debug.callback(lambda: calls.append(1))
    return denoise(x, alpha, sigma).astype(x.dtype)

  @jax.jit
  def run(x, keys, grid):
    traces.append(1)
    return quick(name)(counted, x, grid, keys)

  in_float32 = lambda grid: tuple(part.astype(jnp.float32) for part in grid)
  grid = in_float32(geometric(8.0, 0.05, 5))
  first = jax.block_until_ready(run(noise[:3], keys[:3], grid))
  jax.effects_barrier()
  assert first.dtype == jnp.float32 and np.isfinite(first).all()
  if name not in ADAPTIVE:
    in_a_step = 4 if name == 'annealed_langevin' else SAMPLERS[name].calls
    # On this grid, without end, Langevin's last level is left without a denoising step.
    wanted = 15 if name == 'annealed_langevin' else 5 * in_a_step + SAMPLERS[name].more_calls
    wanted += 4 * (name == 'restart')  # Of its two steps more.
    assert len(calls) == wanted
  other = run(noise[2:], keys[2:], grid)
  if name in ADAPTIVE:
    np.testing.assert_allclose(other[0], first[2], atol=0.05)
  else:
    np.testing.assert_array_equal(other[0], first[2])
  assert not np.allclose(other[0], other[1])
  clean = in_float32(of_levels([5.0, 2.0, 1.0, 0.4, 0.1, 0.0], 'flow'))
  again = run(noise[:3], keys[1:4], clean)
  assert len(traces) == 1
  assert SAMPLERS[name].stochastic == (not np.allclose(again, run(noise[:3], keys[:3], clean)))
  pure = tuple(part[jnp.array([0, 2, 3, 5])] for part in clean)
  pure = (pure[0].at[0].set(0.0), pure[1].at[0].set(1.0))
  for short in (part_way(clean, 0.6), tuple(part[:4] for part in grid), pure):
    counts, found = [], []
    for one in (short, padded(short, 5)):
      calls.clear()
      found.append(jax.block_until_ready(run(noise[:3], keys[:3], one)))
      jax.effects_barrier()
      counts.append(len(calls))
    np.testing.assert_allclose(found[1], found[0], rtol=1e-5, atol=1e-5)
    assert counts[0] == counts[1] > 0
  assert len(traces) == 2


@pytest.mark.parametrize('name', SAMPLERS)
def test_noise_needs_keys(name):
  run = lambda: jax.eval_shape(
    lambda x: quick(name)(gaussian, x, geometric(8.0, 0.1, 3), None), jnp.ones((1, 1, 1, 1))
  )
  if SAMPLERS[name].stochastic:
    with pytest.raises(UserError, match='key'):
      run()
  else:
    run()


def test_unknown_names_and_options_are_refused():
  with pytest.raises(UserError, match='ddim'):
    sampler('euler_b')
  with pytest.raises(UserError, match='s_churn'):
    sampler('heun', churn=3.0)


@pytest.mark.parametrize(
  'name,options',
  [
    ('ddpm', {'variance': 'medium'}), ('unipc', {'variant': 'bh3'}),
    ('dpmpp_2m_sde', {'slope': 'steep'}), ('sa_solver', {'corrector_order': 1}),
    ('dpm_adaptive', {'order': 4}),
  ],
)
def test_bad_options_are_refused(name, options):
  with pytest.raises(UserError, match='choose'):
    sampler(name, **options)(gaussian, jnp.ones((1, 1, 1, 1)), geometric(8.0, 0.1, 3), None)


def test_table_is_complete():
  for name, info in SAMPLERS.items():
    assert info.description and info.citation, name
    assert info.calls is not None or name in ADAPTIVE


def test_an_image_has_its_own_noise():
  noise, keys = initial_noise(7, 0, 5, (4, 4, 2))
  noise_3, keys_3 = initial_noise(7, 3, 2, (4, 4, 2))
  np.testing.assert_array_equal(noise[3:], noise_3)
  np.testing.assert_array_equal(jax.random.key_data(keys[3:]), jax.random.key_data(keys_3))
  assert not np.allclose(noise[0], noise[1])


def test_noise_is_made_by_one_program_beside_those_of_the_seed():
  """Small programs are too quick to compile to be kept for the next start."""
  compiled = []
  listen = lambda name, *_, **more: 'backend_compile' in name and compiled.append(more['fun_name'])
  jax.clear_caches()
  jax.monitoring.register_event_duration_secs_listener(listen)
  try:
    initial_noise(7, 0, 5, (4, 4, 3))
  finally:
    jax.monitoring.unregister_event_duration_listener(listen)
  assert [name for name in compiled if 'noise' in name] and len(compiled) <= 3, compiled
