"""Parameterisations: every conversion and back, at the ends too, and what a network is handed."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.diffusion.denoiser import (
  BLIND_AT_ZERO_SNR,
  PREDICTIONS,
  clamp_log_snr,
  convert,
  gain,
  network_denoiser,
  noise_label,
  preconditioning,
  target,
  text_denoiser,
  to_pair,
  to_x0,
)
from diffusion_jax.diffusion.schedules import Schedule, ScheduleConfig
from diffusion_jax.errors import UserError

STD = 0.5
LEVELS = [
  *((np.cos(angle), np.sin(angle)) for angle in (0.02, 0.3, np.pi / 4, 1.2, 1.55)),  # VP
  *((1.0, sigma) for sigma in (0.05, 1.0, 20.0)),  # VE
  *((1 - t, t) for t in (0.001, 0.03, 0.5, 0.97, 0.999)),  # flow
]
NO_SIGNAL, NO_NOISE = (0.0, 1.0), (1.0, 0.0)


@pytest.fixture(autouse=True)
def float64():
  with jax.enable_x64(True):
    yield


def draws(levels):
  rng = np.random.default_rng(0)
  x0, eps = rng.normal(size=(2, len(levels), 3, 2))
  alpha, sigma = np.array(levels).T
  x = alpha[:, None, None] * x0 + sigma[:, None, None] * eps
  return tuple(map(jnp.asarray, (x0, eps, x, alpha, sigma)))


@pytest.mark.parametrize('source,wanted', [*itertools.product(PREDICTIONS, PREDICTIONS)])
def test_every_conversion_and_back(source, wanted):
  """To the definition of the other, and back to the first, over VP, VE and flow levels."""
  x0, eps, x, alpha, sigma = draws(LEVELS)
  given = target(source, x0, eps, alpha, sigma, STD)
  other = convert(source, wanted, given, x, alpha, sigma, STD)
  scale = lambda values: np.abs(values).max(axis=(1, 2), keepdims=True)
  exact = target(wanted, x0, eps, alpha, sigma, STD)
  assert (np.abs(other - exact) / scale(exact) < 1e-12).all()
  back = convert(wanted, source, other, x, alpha, sigma, STD)
  assert (np.abs(back - given) / scale(given) < 1e-12).all()


@pytest.mark.parametrize('source', PREDICTIONS)
def test_conversions_at_the_ends(source):
  """Whatever a prediction determines at alpha = 0 or sigma = 0 comes out exactly."""
  blind = lambda name, level: name in (BLIND_AT_ZERO_SNR if level == NO_SIGNAL else ('sample',))
  for level in (NO_SIGNAL, NO_NOISE):
    x0, eps, x, alpha, sigma = draws([level])
    given = target(source, x0, eps, alpha, sigma, STD)
    if level == NO_NOISE and source in ('score', 'edm'):
      # Neither tells eps at sigma = 0: the score is infinite, F is -eps data_std.
      np.testing.assert_allclose(to_x0(source, jnp.ones_like(x), x, alpha, sigma, STD), x0)
      if source == 'score':
        continue
    if not blind(source, level):
      for wanted in PREDICTIONS:
        if wanted == 'score' and level == NO_NOISE:
          continue
        found = convert(source, wanted, given, x, alpha, sigma, STD)
        exact = target(wanted, x0, eps, alpha, sigma, STD)
        np.testing.assert_allclose(found, exact, rtol=1e-12, atol=1e-14)
    else:
      known = 1 if level == NO_SIGNAL else 0
      found = to_pair(source, given, x, alpha, sigma, STD)[known]
      np.testing.assert_allclose(found, (x0, eps)[known], rtol=1e-12)
      np.testing.assert_allclose(convert(source, source, given, x, alpha, sigma, STD), given)


@pytest.mark.parametrize('prediction', PREDICTIONS)
def test_all_ends_are_finite_with_finite_gradients_in_float32(prediction):
  for level in (NO_SIGNAL, NO_NOISE, (1e-3, 1.0), (1.0, 1e-3)):
    x0, eps, x, alpha, sigma = (v.astype(jnp.float32) for v in draws([level]))

    def everything(output, x0, alpha, sigma, eps=eps, x=x):
      pair = to_pair(prediction, output, x, alpha, sigma)
      wanted = target(prediction, x0, eps, alpha, sigma)
      return sum(v.sum() for v in (*pair, wanted, gain(prediction, alpha, sigma)))

    value, slopes = jax.value_and_grad(everything, (0, 1, 2, 3))(x0 / 2, x0, alpha, sigma)
    assert value.dtype == jnp.float32
    assert np.isfinite(value) and all(np.isfinite(slope).all() for slope in slopes)


def test_targets_by_hand():
  """x_0 = 2, eps = 3, alpha = .8, sigma = .6: x = 3.4."""
  found = {
    name: float(target(name, jnp.array([[2.0]]), jnp.array([[3.0]]), 0.8, 0.6, STD)[0, 0])
    for name in PREDICTIONS
  }
  spread = np.sqrt(0.16 + 0.36)
  skip, out = 0.8 * 0.25 / spread**2, 0.6 * 0.5 / spread
  assert found == pytest.approx({
    'epsilon': 3, 'sample': 2, 'v_prediction': 0.8 * 3 - 0.6 * 2, 'score': -3 / 0.6,
    'edm': (2 - skip * 3.4) / out, 'flow_prediction': 1,
  })


def test_the_score_is_the_gradient_of_the_kernel():
  log_q = lambda x: -((x - 0.8 * 2) ** 2) / (2 * 0.36)
  wanted = jax.grad(log_q)(0.8 * 2 + 0.6 * 3)
  found = target('score', jnp.array([[2.0]]), jnp.array([[3.0]]), 0.8, 0.6)
  np.testing.assert_allclose(found[0, 0], wanted, rtol=1e-12)


@pytest.mark.parametrize('sigma', [0.002, 0.5, 80.0])
def test_preconditioning_is_karras_table_1(sigma):
  found = preconditioning(jnp.ones(()), jnp.asarray(sigma), STD)
  total = sigma**2 + STD**2
  wanted = (
    STD**2 / total, sigma * STD / np.sqrt(total), 1 / np.sqrt(total), np.log(sigma) / 4
  )
  np.testing.assert_allclose(found, wanted, rtol=1e-12)


@pytest.mark.parametrize('level', LEVELS)
def test_preconditioning_keeps_unit_variances(level):
  """Input and target of F have variance 1 for data of that spread, and D = skip x + out F."""
  alpha, sigma = map(jnp.asarray, level)
  c = preconditioning(alpha, sigma, STD)
  np.testing.assert_allclose(c.scale**2 * ((alpha * STD) ** 2 + sigma**2), 1, rtol=1e-12)
  of_x0 = target('edm', jnp.ones((1, 1)), jnp.zeros((1, 1)), alpha, sigma, STD)
  of_eps = target('edm', jnp.zeros((1, 1)), jnp.ones((1, 1)), alpha, sigma, STD)
  np.testing.assert_allclose(of_x0**2 * STD**2 + of_eps**2, 1, rtol=1e-12)
  output, x = jnp.array([[0.3]]), jnp.array([[1.7]])
  found = to_x0('edm', output, x, alpha, sigma, STD)
  np.testing.assert_allclose(found, c.skip * 1.7 + c.out * 0.3, rtol=1e-12)


def test_edm_on_unit_data_with_unit_variance_is_minus_v():
  x0, eps, _, alpha, sigma = draws(LEVELS[:5])
  edm, v = (target(name, x0, eps, alpha, sigma) for name in ('edm', 'v_prediction'))
  np.testing.assert_allclose(edm, -v, rtol=1e-12)


@pytest.mark.parametrize('prediction', PREDICTIONS)
def test_gain_is_the_derivative_of_x0(prediction):
  for level in LEVELS:
    alpha, sigma = map(jnp.asarray, level)
    one = lambda y, a=alpha, s=sigma: to_x0(prediction, y[None], jnp.array([0.7]), a, s, STD)[0]
    found = gain(prediction, alpha, sigma, STD)
    np.testing.assert_allclose(found, jax.grad(one)(jnp.asarray(0.2)), rtol=1e-11)


def test_log_snr_is_clamped_at_20():
  for level, wanted in ((NO_SIGNAL, -20), (NO_NOISE, 20), ((0.6, 0.8), 2 * np.log(0.75))):
    alpha, sigma = clamp_log_snr(*map(jnp.asarray, level))
    np.testing.assert_allclose(2 * jnp.log(alpha / sigma), wanted, rtol=1e-12)


def test_a_network_sees_scaled_inputs_and_its_label():
  seen = []

  def network(x, label):
    seen.append((x, label))
    return jnp.zeros_like(x)

  x = jnp.full((2, 3), 4.0)
  alpha, sigma = jnp.ones(()), jnp.asarray(2.0)
  scaled = network_denoiser(network, 'edm', data_std=STD, scale_input=True)(x, alpha, sigma)
  plain = network_denoiser(network, 'epsilon', lambda a, s: 7 * s)(x, alpha, sigma)
  np.testing.assert_allclose(seen[0][0], 4 / np.sqrt(4.25))
  np.testing.assert_allclose(seen[0][1], [np.log(2) / 4] * 2)
  np.testing.assert_allclose(scaled, 0.25 / 4.25 * x)
  np.testing.assert_allclose(seen[1][0], x)
  np.testing.assert_allclose(seen[1][1], [14, 14])
  np.testing.assert_allclose(plain, x)
  assert np.isfinite(noise_label(*map(jnp.asarray, NO_SIGNAL)))


def test_one_level_per_example():
  """alpha and sigma [b] mean the same as b calls."""
  network = lambda x, label: x * label[:, None] + 1
  denoise = network_denoiser(network, 'v_prediction', scale_input=True)
  x, alpha, sigma = jnp.ones((3, 2)), jnp.array([0.9, 0.6, 0.1]), jnp.array([0.4, 0.8, 0.99])
  together = denoise(x, alpha, sigma)
  alone = jnp.concatenate([denoise(x[i : i + 1], alpha[i], sigma[i]) for i in range(3)])
  np.testing.assert_allclose(together, alone, rtol=1e-12)


def test_the_text_denoiser_hands_the_network_its_timestep():
  schedule = Schedule(ScheduleConfig())
  seen = []

  def network(x, t, text):
    seen.append((t, text))
    return jnp.zeros_like(x, jnp.bfloat16)

  alpha, sigma = schedule(jnp.array(321))
  x = jnp.ones((2, 1, 1, 1))
  x0 = text_denoiser(network, schedule, 'epsilon')(x, alpha, sigma, 'caption')
  np.testing.assert_allclose(seen[0][0], [321, 321], atol=0.02)
  assert seen[0][1] == 'caption' and x0.dtype == x.dtype
  np.testing.assert_allclose(x0, x / alpha, rtol=1e-6)


def test_unknown_predictions_are_refused():
  with pytest.raises(UserError, match='epsilon'):
    target('noise', jnp.ones((1, 1)), jnp.ones((1, 1)), 1.0, 1.0)
