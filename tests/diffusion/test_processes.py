"""Continuous processes against the closed forms of their papers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.diffusion import processes
from diffusion_jax.errors import UserError

T = np.linspace(0, 1, 41)
PARAMS = processes.init_monotone(jax.random.key(1), 16)
MADE = {name: make() for name, make in processes.PROCESSES.items()} | {
  'sub_vp': processes.sub_vp(processes.linear()),
  'zero_terminal': processes.zero_terminal(processes.scaled_linear()),
  'trigonometric': processes.cosine(0.0),
  'flow_shifted': processes.flow(3.0),
  'cosine_shifted': processes.shifted(processes.cosine(), 2.0),
  'sigmoid_rate': processes.variance_preserving(processes.sigmoid_rate(0.1, 20.0)),
  'learned': processes.learned(PARAMS, -13.3, 5.0),
}
VP = (
  'linear', 'scaled_linear', 'cosine', 'sigmoid', 'log_linear', 'zero_terminal', 'trigonometric',
  'cosine_shifted', 'sigmoid_rate', 'learned',
)


@pytest.fixture(autouse=True)
def float64():
  with jax.enable_x64(True):
    yield


def at(name, t=T):
  return MADE[name](jnp.asarray(t))


def softplus(x):
  return np.logaddexp(0, x)


@pytest.mark.parametrize(
  'name,integral',
  [
    # Song et al. 2021, eq. 33 with beta from 0.1 to 20.
    ('linear', 0.1 * T + 19.9 * T**2 / 2),
    (
      'scaled_linear',
      ((0.85**0.5 + T * (12**0.5 - 0.85**0.5)) ** 3 - 0.85**1.5) / (3 * (12**0.5 - 0.85**0.5)),
    ),
    ('sigmoid_rate', 0.1 * T + 19.9 * (softplus(12 * T - 6) - softplus(-6)) / 12),
  ],
)
def test_rates_integrate_to_the_closed_form(name, integral):
  alpha, sigma = at(name)
  np.testing.assert_allclose(alpha, np.exp(-integral / 2), rtol=1e-12)
  np.testing.assert_allclose(sigma, np.sqrt(-np.expm1(-integral)), rtol=1e-11, atol=2e-8)


def test_the_drift_gives_back_the_rate():
  rate = processes.sigmoid_rate(0.1, 20.0)
  t = jnp.linspace(0.01, 0.99, 9)
  np.testing.assert_allclose(-2 * processes.drift_rate(MADE['sigmoid_rate'], t), rate(t), rtol=1e-9)


def test_cosine_is_nichol_and_dhariwal_eq_17():
  f = lambda t: np.cos((t + 0.008) / 1.008 * np.pi / 2) ** 2
  alpha, _ = at('cosine')
  np.testing.assert_allclose(alpha**2, f(T) / f(0.0), atol=1e-15)
  assert alpha[-1] == 0 and at('trigonometric')[0][-1] == 0
  np.testing.assert_allclose(at('trigonometric')[1], np.sin(np.pi * T / 2), rtol=1e-14)


def test_sigmoid_is_chens_algorithm_1():
  sigmoid = lambda x: 1 / (1 + np.exp(-x))
  for start, end, tau in ((-3.0, 3.0, 1.0), (0.0, 3.0, 0.7)):
    v_start, v_end = sigmoid(start / tau), sigmoid(end / tau)
    wanted = (v_end - sigmoid((T * (end - start) + start) / tau)) / (v_end - v_start)
    alpha, sigma = processes.sigmoid(start, end, tau)(jnp.asarray(T))
    np.testing.assert_allclose(alpha**2, wanted, atol=1e-14)
    np.testing.assert_allclose(sigma**2, 1 - wanted, atol=1e-14)


@pytest.mark.parametrize('name', VP)
def test_variance_is_preserved(name):
  alpha, sigma = at(name)
  np.testing.assert_allclose(alpha**2 + sigma**2, 1, atol=2e-15)


def test_sub_vp_is_song_et_al_eq_29():
  alpha, sigma = at('sub_vp')
  np.testing.assert_allclose(sigma, 1 - np.exp(-(0.1 * T + 19.9 * T**2 / 2)), atol=1e-14)
  np.testing.assert_allclose(alpha, at('linear')[0], rtol=1e-15)


def test_exploding_sigmas_have_their_formulas():
  low, high = 0.002 ** (1 / 7), 80 ** (1 / 7)
  for make, wanted in (
    (processes.karras(0.002, 80, 7), (low + T * (high - low)) ** 7),
    (processes.karras(0.002, 80, 1), 0.002 + T * (80 - 0.002)),
    (processes.exponential(0.01, 50), 0.01 * 5000**T),
    (processes.polyexponential(0.01, 50, 3), np.exp(np.log(0.01) + T**3 * np.log(5000))),
  ):
    alpha, sigma = make(jnp.asarray(T))
    np.testing.assert_allclose(sigma, wanted, rtol=1e-12)
    np.testing.assert_array_equal(alpha, 1)


def test_log_linear_has_a_linear_log_snr():
  found = processes.log_snr(MADE['log_linear'], jnp.asarray(T))
  np.testing.assert_allclose(found, 13.3 - 18.3 * T, rtol=1e-12, atol=1e-12)
  np.testing.assert_allclose(processes.log_snr_rate(MADE['log_linear'], T), -18.3, rtol=1e-9)


@pytest.mark.parametrize('seed', [0, 1, 2])
def test_a_learned_schedule_falls_between_its_ends_for_any_parameters(seed):
  keys = jax.random.split(jax.random.key(seed), 5)
  params = {
    name: 3 * jax.random.normal(key, value.shape)
    for key, (name, value) in zip(keys, PARAMS.items(), strict=True)
  }
  made = lambda params, low: processes.learned(params, low, 5.0)
  log_snr = lambda params, low: processes.log_snr(made(params, low), jnp.asarray(T))
  value = log_snr(params, -13.3)
  np.testing.assert_allclose(value[jnp.array([0, -1])], [13.3, -5.0], rtol=1e-9)
  assert (np.diff(value) < 0).all()
  assert np.abs(value - (13.3 - 18.3 * T)).max() > 0.03  # It is no straight line.
  slopes, by_end = jax.jacobian(log_snr, argnums=(0, 1))(params, -13.3)
  assert all(np.abs(slopes[name][20]).max() > 0 for name in params if name != 'l1.bias')
  np.testing.assert_allclose(by_end[jnp.array([0, -1])], [-1, 0], atol=1e-9)


def test_flow_shift_is_esser_et_al_eq_23():
  alpha, sigma = at('flow_shifted')
  np.testing.assert_allclose(sigma, 3 * T / (1 + 2 * T), rtol=1e-14)
  np.testing.assert_allclose(alpha + sigma, 1, rtol=1e-14)
  inside = jnp.asarray(T[1:-1])
  for name, shifted, shift in (('flow', 'flow_shifted', 3), ('cosine', 'cosine_shifted', 2)):
    fall = processes.log_snr(MADE[name], inside) - processes.log_snr(MADE[shifted], inside)
    np.testing.assert_allclose(fall, 2 * np.log(shift), rtol=1e-9)


def test_zero_terminal_moves_alpha_affinely():
  alpha, _ = at('scaled_linear')
  found, sigma = at('zero_terminal')
  np.testing.assert_allclose(found, (alpha - alpha[-1]) / (1 - alpha[-1]), rtol=1e-13, atol=1e-16)
  assert found[-1] == 0 and sigma[-1] == 1 and found[0] == 1 and sigma[0] == 0


@pytest.mark.parametrize('name', MADE)
def test_snr_falls_from_data_to_noise(name):
  alpha, sigma = at(name)
  assert (np.diff(np.arctan2(sigma, alpha)) > 0).all()
  assert alpha[0] == pytest.approx(1, abs=1e-5) and sigma[0] <= 0.0101
  assert alpha[-1] / sigma[-1] < 0.17


@pytest.mark.parametrize('name', MADE)
def test_derivatives_are_the_differences(name):
  t, h = jnp.asarray(T[2:-2]), 1e-5
  _, rates = processes.time_derivative(MADE[name], t)
  after, before = MADE[name](t + h), MADE[name](t - h)
  for rate, b, a in zip(rates, after, before, strict=True):
    np.testing.assert_allclose(rate, (b - a) / (2 * h), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize('name', MADE)
def test_both_ends_are_finite_in_float32(name):
  ends = jnp.array([0.0, 1.0], jnp.float32)
  both = jax.jit(lambda t: (
    processes.time_derivative(MADE[name], t), processes.drift_rate(MADE[name], t),
    processes.log_snr_rate(MADE[name], t), jax.grad(lambda t: sum(MADE[name](t)).sum())(t),
  ))(ends)
  for value in jax.tree.leaves(both):
    assert np.isfinite(value).all()


@pytest.mark.parametrize('name', MADE)
def test_float32_keeps_its_type_and_its_relative_precision(name):
  """sigma near the data and alpha near the noise are small: no cancellation may eat them."""
  for t, which in ((1e-5, 1), (np.float32(0.9990234375), 0)):
    wanted = MADE[name](jnp.asarray(t, jnp.float64))[which]
    found = MADE[name](jnp.asarray(t, jnp.float32))[which]
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, wanted, rtol=2e-4 if name == 'zero_terminal' else 3e-5)


def test_integers_are_times_too():
  for value in MADE['linear'](0), MADE['flow'](1):
    assert all(jnp.issubdtype(part.dtype, jnp.floating) for part in value)


def test_names():
  exact = processes.named('flow', shift=3.0)(0.5)
  np.testing.assert_allclose(exact, processes.flow(3.0)(0.5))
  with pytest.raises(UserError, match='karras'):
    processes.named('quadratic')
  assert functools.reduce(lambda found, name: found and name in MADE, processes.PROCESSES, True)
