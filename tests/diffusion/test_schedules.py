"""Schedules against the published tables."""

import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.diffusion.schedules import (
  Schedule,
  ScheduleConfig,
  sampling_grid,
  spaced_timesteps,
)
from diffusion_jax.errors import UserError

TABLE = {
  'linear': (ScheduleConfig('linear', 1e-4, 0.02), (0.9999, 0.07858724, 4.03583e-5)),
  'scaled': (ScheduleConfig(), (0.99915, 0.2776697, 0.00466010)),
  'cosine': (ScheduleConfig('cosine', 0.0, 0.999), (0.9999587, 0.4938436, 2.42877e-9)),
  'zero_snr': (ScheduleConfig(rescale_betas_zero_snr=True), (0.99915, 0.2423592, 0.0)),
}


@pytest.mark.parametrize('name', TABLE)
def test_alpha_bar_has_the_published_values(name):
  config, wanted = TABLE[name]
  np.testing.assert_allclose(Schedule(config).alpha_bar[[0, 499, 999]], wanted, rtol=2e-6)


@pytest.mark.parametrize('name', TABLE)
def test_timestep_inverts_the_schedule(name):
  schedule = Schedule(TABLE[name][0])
  t = jnp.array([0, 1, 17, 250, 500, 803, 990, 999])
  np.testing.assert_allclose(schedule.timestep(*schedule(t)), t, atol=0.02)


def test_spacings_have_the_values_of_lin_et_al():
  np.testing.assert_array_equal(
    spaced_timesteps(1000, 10, 'trailing'), [999, 899, 799, 699, 599, 499, 399, 299, 199, 99]
  )
  np.testing.assert_array_equal(
    spaced_timesteps(1000, 10, 'leading'), [900, 800, 700, 600, 500, 400, 300, 200, 100, 0]
  )
  np.testing.assert_array_equal(
    spaced_timesteps(1000, 10, 'linspace'), [999, 888, 777, 666, 555, 444, 333, 222, 111, 0]
  )
  for spacing in ('trailing', 'leading', 'linspace'):
    for count in (1, 7, 30, 999, 1000):
      steps = spaced_timesteps(1000, count, spacing)
      assert (
        len(steps) == count and (np.diff(steps) < 0).all() and 0 <= steps[-1] <= steps[0] < 1000
      )


def test_the_grid_ends_clean():
  alphas, sigmas = sampling_grid(Schedule(ScheduleConfig()), 5)
  assert len(alphas) == 6 and alphas[-1] == 1 and sigmas[-1] == 0


@pytest.mark.parametrize(
  'make',
  [
    lambda: ScheduleConfig('quadratic'),
    lambda: ScheduleConfig(num_train_timesteps=1),
    lambda: spaced_timesteps(1000, 1001, 'trailing'),
    lambda: spaced_timesteps(1000, 0, 'trailing'),
    lambda: spaced_timesteps(1000, 10, 'middle'),
  ],
)
def test_bad_values_are_refused(make):
  with pytest.raises(UserError, match=r'choose|at least'):
    make()
