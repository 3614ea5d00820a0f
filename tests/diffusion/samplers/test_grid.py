"""Step spacings against the published ones."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from diffusion_jax.diffusion.noise import NoiseSchedule, Schedule, ScheduleConfig
from diffusion_jax.diffusion.samplers.common import pair_between, pairs_at
from diffusion_jax.diffusion.samplers.grid import (
  AYS_TABLES,
  LEVEL_SPACINGS,
  SPACINGS,
  TIME_SPACINGS,
  level_grid,
  part_way,
  process_grid,
  sampling_grid,
  section,
  spaced_levels,
  spaced_timesteps,
)
from diffusion_jax.errors import UserError


def schedule(alpha_bar):
  return types.SimpleNamespace(alphas=np.sqrt(alpha_bar), sigmas=np.sqrt(1 - alpha_bar))


BETAS = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
STABLE = schedule(np.cumprod(1 - BETAS))
ROOT = np.sqrt(np.cumprod(1 - BETAS))
ZERO_SNR = schedule(((ROOT - ROOT[-1]) * ROOT[0] / (ROOT[0] - ROOT[-1])) ** 2)
flow = lambda t: (1 - t, t)
exploding = lambda t: (jnp.ones_like(t), 0.01 * 8000.0**t)
cosine = lambda t: (jnp.sin((1 - t) * jnp.pi / 2), jnp.sin(t * jnp.pi / 2))


def test_timesteps_have_the_values_of_lin_et_al():
  np.testing.assert_array_equal(
    spaced_timesteps(1000, 10, 'trailing'), [999, 899, 799, 699, 599, 499, 399, 299, 199, 99]
  )
  np.testing.assert_array_equal(
    spaced_timesteps(1000, 10, 'leading'), [900, 800, 700, 600, 500, 400, 300, 200, 100, 0]
  )
  np.testing.assert_array_equal(
    spaced_timesteps(1000, 10, 'linspace'), [999, 888, 777, 666, 555, 444, 333, 222, 111, 0]
  )


def test_offsets_and_what_the_solvers_leave_out():
  np.testing.assert_array_equal(
    spaced_timesteps(1000, 10, 'leading', steps_offset=1),
    [901, 801, 701, 601, 501, 401, 301, 201, 101, 1],
  )
  np.testing.assert_array_equal(
    spaced_timesteps(1000, 4, 'leading', steps_offset=1, drop_last=True), [801, 601, 401, 201]
  )
  np.testing.assert_array_equal(
    spaced_timesteps(1000, 4, 'linspace', drop_last=True), [999, 749, 500, 250]
  )
  np.testing.assert_array_equal(
    spaced_timesteps(1000, 5, 'linspace', fractional=True), [999, 749.25, 499.5, 249.75, 0]
  )
  for spacing in ('trailing', 'linspace'):  # As in diffusers, which adds it to leading alone.
    np.testing.assert_array_equal(
      spaced_timesteps(1000, 7, spacing, steps_offset=1), spaced_timesteps(1000, 7, spacing)
    )
  with pytest.raises(UserError, match='offset of 1 leave the 1000 timesteps'):
    spaced_timesteps(1000, 1000, 'leading', steps_offset=1)


@pytest.mark.parametrize('spacing', ['leading', 'karras'])
def test_a_grid_may_end_at_the_first_level(spacing):
  with jax.enable_x64(True):
    clean = sampling_grid(STABLE, 7, spacing)
    grid = sampling_grid(STABLE, 7, spacing, set_alpha_to_one=False)
    for part, other, table in zip(grid, clean, (STABLE.alphas, STABLE.sigmas), strict=True):
      np.testing.assert_array_equal(part[:-1], other[:-1])
      assert part[-1] == table[0]


@pytest.mark.parametrize('spacing', TIME_SPACINGS)
def test_timesteps_fall_and_stay_in_range(spacing):
  for count in (1, 7, 30, 999, 1000):
    steps = spaced_timesteps(1000, count, spacing)
    assert len(steps) == count and (np.diff(steps) < 0).all() and 0 <= steps[-1] <= steps[0] < 1000


def test_beta_timesteps_are_quantiles():
  steps = spaced_timesteps(1000, 8, 'beta')
  np.testing.assert_allclose(steps, 999 * stats.beta.ppf(1 - np.arange(8) / 8, 0.6, 0.6))


def test_levels_by_hand():
  ramp = (80 ** (1 / 7) + np.arange(18) / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
  np.testing.assert_allclose(spaced_levels(18, 'karras', 0.002, 80), ramp, rtol=1e-12)
  np.testing.assert_allclose(spaced_levels(5, 'exponential', 0.01, 100), np.geomspace(100, 0.01, 5))
  np.testing.assert_allclose(
    spaced_levels(3, 'polyexponential', 0.01, 100), [100, 0.01 * 10000**0.25, 0.01]
  )


def test_align_your_steps_tables_as_they_are_and_interpolated():
  for name, table in AYS_TABLES.items():
    np.testing.assert_allclose(spaced_levels(10, name, 0.0, 0.0), table[:10])
  np.testing.assert_allclose(
    spaced_levels(20, 'ays_sd1', 0.0, 0.0)[:4],
    [14.615, np.sqrt(14.615 * 6.475), 6.475, np.sqrt(6.475 * 3.861)],
  )
  np.testing.assert_allclose(spaced_levels(2, (8.0, 2.0, 0.5), 0.0, 0.0), [8.0, 2.0])


@pytest.mark.parametrize('spacing', SPACINGS)
def test_grids_on_timesteps_are_variance_preserving_and_end_clean(spacing):
  alphas, sigmas = map(np.asarray, sampling_grid(STABLE, 12, spacing))
  assert alphas.dtype == sigmas.dtype == np.float32
  np.testing.assert_allclose(alphas**2 + sigmas**2, 1, atol=1e-6)
  assert len(alphas) == 13 and alphas[-1] == 1 and sigmas[-1] == 0
  assert (np.diff(sigmas / alphas) < 0).all()
  if spacing in LEVEL_SPACINGS and spacing not in AYS_TABLES:
    low, high = (STABLE.sigmas / STABLE.alphas)[[0, -1]]
    np.testing.assert_allclose((sigmas / alphas)[[0, -2]], [high, low], rtol=1e-5)


def test_a_grid_has_the_schedule_s_pairs():
  with jax.enable_x64(True):
    alphas, sigmas = sampling_grid(STABLE, 10, 'trailing')
    steps = spaced_timesteps(1000, 10, 'trailing')
    np.testing.assert_array_equal(alphas[:-1], STABLE.alphas[steps])
    np.testing.assert_array_equal(sigmas[:-1], STABLE.sigmas[steps])
    alphas, sigmas = sampling_grid(STABLE, 9, 'karras', rho=5.0)
    low, high = (STABLE.sigmas / STABLE.alphas)[[0, -1]]
    np.testing.assert_allclose((sigmas / alphas)[:-1], spaced_levels(9, 'karras', low, high, 5.0))


@pytest.mark.parametrize('spacing', TIME_SPACINGS)
def test_zero_terminal_snr_starts_at_pure_noise(spacing):
  alphas, sigmas = sampling_grid(ZERO_SNR, 6, spacing)
  if spacing != 'leading':
    assert alphas[0] == 0 and sigmas[0] == 1
  assert (np.diff(np.arctan2(sigmas, alphas)) < 0).all()


@pytest.mark.parametrize('spacing', SPACINGS)
@pytest.mark.parametrize('process', [flow, exploding, cosine])
def test_grids_lie_on_their_process(process, spacing):
  if spacing in LEVEL_SPACINGS and spacing not in AYS_TABLES and process is not exploding:
    with pytest.raises(UserError, match='trailing'):
      process_grid(process, 7, spacing)
    return
  with jax.enable_x64(True):
    alphas, sigmas = map(np.asarray, process_grid(process, 7, spacing))
  on_process = {flow: alphas + sigmas, exploding: alphas, cosine: alphas**2 + sigmas**2}[process]
  np.testing.assert_allclose(on_process, 1, atol=1e-12)
  assert (np.diff(np.arctan2(sigmas, alphas)) < 0).all() and len(alphas) == 8
  assert alphas[-1] == 1 and sigmas[-1] == 0
  if spacing in ('karras', 'exponential'):
    np.testing.assert_allclose(sigmas[[0, -2]], [80, 0.01 * 8000**1e-3], rtol=1e-9)


def test_flow_by_trailing_times():
  alphas, sigmas = process_grid(flow, 4)
  np.testing.assert_allclose(sigmas, [1, 0.75, 0.5, 0.25, 0], atol=1e-7)
  np.testing.assert_allclose(alphas, [0, 0.25, 0.5, 0.75, 1], atol=1e-7)


def test_a_grid_can_be_made_while_tracing():
  made = jax.jit(lambda x: x + process_grid(cosine, 5, 'beta')[1].sum())(0.0)
  np.testing.assert_allclose(made, np.sum(process_grid(cosine, 5, 'beta')[1]), rtol=1e-6)


def test_levels_on_each_kind_of_process():
  levels = np.array([30.0, 3.0, 0.1])
  with jax.enable_x64(True):
    for table, scale in (
      (([1.0, 1.0], [0.01, 50.0]), np.ones(3)), (([1.0, 0.3, 0.0], [0.0, 0.7, 1.0]), 1 + levels),
      ((STABLE.alphas, STABLE.sigmas), np.sqrt(1 + levels**2)),
    ):
      alphas, sigmas = level_grid(table, levels)
      np.testing.assert_allclose(alphas[:-1], 1 / scale, rtol=1e-12)
      np.testing.assert_allclose(sigmas[:-1], levels / scale, rtol=1e-12)


def test_pairs_between_lie_on_the_process_and_beyond_it():
  with jax.enable_x64(True):
    levels = jnp.array([9.0, 2.5, 0.4, 0.01])
    for to_pair in (
      lambda r: (jnp.ones_like(r), r), lambda r: (1 / (1 + r), r / (1 + r)),
      lambda r: (1 / jnp.sqrt(1 + r**2), r / jnp.sqrt(1 + r**2)),
    ):
      here, there = to_pair(jnp.array(5.0)), to_pair(jnp.array(1.0))
      for level in levels:
        pair = pair_between(here, there, (1.0, level))
        np.testing.assert_allclose(pair, to_pair(level), rtol=1e-12)
      found = pairs_at(to_pair(jnp.array([8.0, 4.0, 1.0, 0.2])), (jnp.ones(4), levels))
      np.testing.assert_allclose(found, to_pair(levels), rtol=1e-12)


@pytest.mark.parametrize('via', [None, 'stride'])
def test_sections_make_up_the_grid(via):
  """Steps from the timestep of the level on are the first model's."""
  table = Schedule(ScheduleConfig())
  grid = jax.tree.map(np.asarray, sampling_grid(table, 10, 'leading', steps_offset=1, via=via))
  for fraction, steps in ((0.6, 6), (0.5, 5), (0.499, 5), (0.899, 9), (0.5005, 5)):
    level = table.after(fraction)
    first, last = section(grid, None, level), section(grid, level)
    assert (len(first[0]) - 1, len(last[0]) - 1) == (steps, 10 - steps)
    for part, (a, b) in enumerate(zip(first[:2], last[:2], strict=True)):
      np.testing.assert_array_equal(np.append(a, b[1:]), grid[part])
    if via:
      np.testing.assert_array_equal(np.append(first[2][0], last[2][0]), grid[2][0])
  with pytest.raises(UserError, match='no step of 10'):
    section(grid, table.after(0.9999))
  np.testing.assert_allclose(NoiseSchedule(flow).after(0.75), (0.75, 0.25), atol=1e-6)


def test_part_way_keeps_the_end():
  grid = process_grid(cosine, 10)
  alphas, sigmas = part_way(grid, 0.3)
  assert len(alphas) == 4
  np.testing.assert_array_equal(alphas, grid[0][7:])
  np.testing.assert_array_equal(sigmas, grid[1][7:])


@pytest.mark.parametrize(
  'make',
  [
    lambda: spaced_timesteps(1000, 1001, 'trailing'),
    lambda: spaced_timesteps(1000, 0, 'trailing'),
    lambda: spaced_timesteps(1000, 10, 'middle'),
    lambda: sampling_grid(STABLE, 10, 'middle'),
    lambda: sampling_grid(STABLE, 0, 'karras'),
    lambda: sampling_grid(ZERO_SNR, 10, 'karras'),
    lambda: sampling_grid(STABLE, 3, (1.0, 2.0)),
    lambda: sampling_grid(STABLE, 3, (1.0, 0.0)),
    lambda: process_grid(flow, 3, 'middle'),
    lambda: process_grid(flow, 0),
    lambda: part_way(process_grid(flow, 3), 0.1),
    lambda: part_way(process_grid(flow, 3), 1.5),
  ],
)
def test_bad_values_are_refused(make):
  with pytest.raises(UserError, match='choose'):
    make()
