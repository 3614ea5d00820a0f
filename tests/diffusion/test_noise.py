"""Schedules against the published tables, and tables against their processes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.diffusion import processes
from diffusion_jax.diffusion.noise import BETAS, Schedule, ScheduleConfig
from diffusion_jax.diffusion.processes import tabulate
from diffusion_jax.errors import UserError
from tests.diffusion.tables import sampled

TABLE = {
  'linear': (ScheduleConfig('linear', 1e-4, 0.02), (0.9999, 0.07858724, 4.03583e-5)),
  'scaled': (ScheduleConfig(), (0.99915, 0.2776697, 0.00466010)),
  'cosine': (ScheduleConfig('cosine', 0.0, 0.999), (0.9999587, 0.4938436, 2.42877e-9)),
  'diffusers_cosine': (ScheduleConfig('squaredcos_cap_v2'), (0.9999587, 0.4938436, 2.42877e-9)),
  'zero_snr': (ScheduleConfig(rescale_betas_zero_snr=True), (0.99915, 0.2423592, 0.0)),
}
SAMPLED = {
  'flow': (ScheduleConfig('flow'), (0.999**2, 0.25, 0.0)),
  'flow_shifted': (ScheduleConfig('flow', shift=3.0), ((0.999 / 1.002) ** 2, 0.0625, 0.0)),
  'log_linear': (
    ScheduleConfig('log_linear'),
    tuple(1 / (1 + np.exp(-13.3 + 18.3 * t)) for t in (0.001, 0.5, 1.0)),
  ),
}


@pytest.mark.parametrize('name', [*TABLE, *SAMPLED])
def test_alpha_bar_has_the_published_values(name):
  config, wanted = (TABLE | SAMPLED)[name]
  np.testing.assert_allclose(Schedule(config).alpha_bar[[0, 499, 999]], wanted, rtol=2e-6)


def test_sigmoid_betas():
  x = np.linspace(-6, 6, 1000)
  wanted = np.cumprod(1 - (1e-4 + (0.02 - 1e-4) / (1 + np.exp(-x))))
  found = Schedule(ScheduleConfig('sigmoid', 1e-4, 0.02)).alpha_bar
  np.testing.assert_allclose(found, wanted, rtol=1e-12)


def test_a_shift_lowers_the_log_snr_of_betas():
  plain, shifted = Schedule(ScheduleConfig()), Schedule(ScheduleConfig(shift=2.0))
  ratio = lambda schedule: schedule.sigmas / schedule.alphas
  np.testing.assert_allclose(ratio(shifted), 2 * ratio(plain), rtol=1e-12)
  np.testing.assert_allclose(shifted.alphas**2 + shifted.sigmas**2, 1, rtol=1e-12)


@pytest.mark.parametrize('name', [*TABLE, *SAMPLED])
def test_timestep_inverts_the_schedule(name):
  schedule = Schedule((TABLE | SAMPLED)[name][0])
  t = jnp.array([0, 1, 17, 250, 500, 803, 990, 999])
  np.testing.assert_allclose(schedule.label(*schedule(t)), t, atol=0.02)


@pytest.mark.parametrize('name', [*TABLE, *SAMPLED])
def test_a_table_is_its_own_process_sampled(name):
  """Table -> process -> table loses nothing, and the process stays between its neighbours."""
  schedule = Schedule((TABLE | SAMPLED)[name][0])
  again = sampled(schedule.process, len(schedule))
  np.testing.assert_allclose(again.alphas, schedule.alphas, rtol=1e-9, atol=1e-15)
  np.testing.assert_allclose(again.sigmas, schedule.sigmas, rtol=1e-9)
  with jax.enable_x64(True):
    alpha, sigma = map(np.asarray, schedule.process(jnp.linspace(0, 1, 3001)))
  assert (np.diff(np.arctan2(sigma, alpha)) > 0).all()
  assert alpha[0] == 1 and sigma[0] == 0
  norm = 'alpha + sigma' if 'flow' in name else 'alpha^2 + sigma^2'
  values = alpha + sigma if 'flow' in name else alpha**2 + sigma**2
  np.testing.assert_allclose(values, 1, rtol=1e-12, err_msg=norm)


@pytest.mark.parametrize('name,made', [
  ('linear', processes.linear(0.1, 20.0)),
  ('scaled_linear', processes.scaled_linear(0.1, 20.0)),
  ('sigmoid', processes.variance_preserving(processes.sigmoid_rate(0.1, 20.0))),
])
def test_tables_of_betas_tend_to_the_process_of_the_same_rate(name, made):
  """T betas of rate / T: the difference of alpha from the process falls as 1 / T."""
  def distance(steps):
    config = ScheduleConfig(name, 0.1 / steps, 20.0 / steps, steps)
    return np.abs(Schedule(config).alphas - sampled(made, steps).alphas).max()

  assert distance(1000) < 4e-3
  assert distance(1000) / distance(4000) == pytest.approx(4, rel=0.03)


@pytest.mark.parametrize('name', [*TABLE, *SAMPLED])
def test_the_smooth_process_has_the_levels_of_the_table_and_no_kinks(name):
  schedule = Schedule((TABLE | SAMPLED)[name][0])
  alphas, sigmas = tabulate(schedule.smooth_process, np.linspace(0, 1, 2001))
  for found, table in ((alphas, schedule.alphas), (sigmas, schedule.sigmas)):
    np.testing.assert_allclose(found[[0, -1]], table[[0, -1]], rtol=1e-6, atol=1e-12)
  angles = np.arctan2(sigmas, alphas)
  if schedule.variance_preserving:
    np.testing.assert_allclose(alphas**2 + sigmas**2, 1, rtol=1e-12)
    np.testing.assert_allclose(np.diff(angles), np.diff(angles)[0], rtol=1e-6)
  else:
    assert 'flow' in name and (np.diff(angles) > 0).all()
    np.testing.assert_allclose(alphas + sigmas, 1, rtol=1e-6)


def test_a_process_survives_a_table():
  """Process -> table -> process: equal up to the interpolation, whose error falls as 1 / T^2."""
  def distance(steps):
    with jax.enable_x64(True):
      t = jnp.linspace(0.2, 1, 777)
      pairs = sampled(made, steps).process(t), made(t)
      return max(float(jnp.abs(f - w).max()) for f, w in zip(*pairs, strict=True))

  made = processes.linear()
  assert distance(400) < 2e-5
  assert distance(100) / distance(400) == pytest.approx(16, rel=0.2)
  exploding = sampled(processes.exponential(), 50)
  alpha, _ = exploding.process(jnp.linspace(0, 1, 99))
  np.testing.assert_array_equal(alpha, 1)


@pytest.mark.parametrize('name', sorted(BETAS))
def test_the_chain_of_small_steps_has_the_marginals(name):
  """x_t = sqrt(1 - beta_t) x_{t-1} + sqrt(beta_t) eps: mean and variance through T steps."""
  end = 0.999 if name == 'cosine' else 0.02
  schedule = Schedule(ScheduleConfig(name, 1e-4, end))
  mean, variance = 3.0, 0.4
  for t, beta in enumerate(BETAS[name](1000, 1e-4, end)):
    mean, variance = np.sqrt(1 - beta) * mean, (1 - beta) * variance + beta
    if t % 111 == 0:
      np.testing.assert_allclose(schedule.alphas[t] * 3.0, mean, rtol=1e-10)
      wanted = schedule.alphas[t] ** 2 * 0.4 + schedule.sigmas[t] ** 2
      np.testing.assert_allclose(wanted, variance, rtol=1e-10)


def test_zero_terminal_is_known():
  assert Schedule(TABLE['zero_snr'][0]).zero_terminal and Schedule(SAMPLED['flow'][0]).zero_terminal
  assert not Schedule(ScheduleConfig()).zero_terminal


def test_the_type_is_that_of_the_session():
  schedule = Schedule(ScheduleConfig())
  assert schedule(jnp.array(3))[0].dtype == jnp.float32
  assert schedule.process(jnp.float32(0.3))[0].dtype == jnp.float32
  with jax.enable_x64(True):
    assert schedule(jnp.array(3))[0].dtype == jnp.float64
    assert schedule.process(jnp.float32(0.3))[0].dtype == jnp.float32


def test_a_table_can_be_made_while_tracing():
  made = []
  jax.jit(lambda: made.append(Schedule(ScheduleConfig('flow')).alphas))()
  np.testing.assert_allclose(made[0][[0, -1]], [0.999, 0], atol=1e-12)


def test_a_table_of_a_process_is_karras_eq_5():
  alphas, sigmas = tabulate(processes.karras(0.002, 80, 7), np.linspace(1, 0, 10))
  i = np.arange(10)
  wanted = (80 ** (1 / 7) + i / 9 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
  np.testing.assert_allclose(sigmas, wanted, rtol=1e-6)
  np.testing.assert_array_equal(alphas, 1)


@pytest.mark.parametrize(
  'make',
  [
    lambda: ScheduleConfig('quadratic'),
    lambda: ScheduleConfig(num_train_timesteps=1),
    lambda: ScheduleConfig('flow', rescale_betas_zero_snr=True),
    lambda: ScheduleConfig('flow', shift=0.0),
  ],
)
def test_bad_values_are_refused(make):
  with pytest.raises(UserError, match=r'choose|give'):
    make()
